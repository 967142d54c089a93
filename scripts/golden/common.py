"""What the golden scripts share: where goldens live, determinism, compact JSON, random models and their adapters."""

import json
import os
import random
from collections.abc import Collection
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy
import peft
import torch
import transformers
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

GOLDEN = Path(__file__).resolve().parents[2] / "test" / "golden"
MADE_WITH = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"


def deterministic(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def exact(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal random multiples of 1/64: exact in f32 (and f16), short in JSON."""
    return (torch.randn(shape, dtype=torch.float64) * scale * 64).round().div(64).to(dtype)


def plain(tensor: torch.Tensor) -> dict:
    """Row-major data with its shape; Python prints each f64 so that it reads back exactly."""
    return {"shape": list(tensor.shape), "data": tensor.detach().reshape(-1).tolist()}


def write_json(path: Path, value: dict) -> None:
    """One line per entry of the two outer levels: readable diffs, no line per number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, entry in value.items():
        if isinstance(entry, dict) and len(entry) > 0:
            inner = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in entry.items())
            lines.append(f"  {json.dumps(key)}: {{\n{inner}\n  }}")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(entry)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path.relative_to(GOLDEN.parents[1])}: {path.stat().st_size} bytes")


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, path)


def randomize(model: torch.nn.Module, norm_mean: float = 1.0) -> None:
    """Trainable weights so large that attention is far from uniform and every gradient is far from zero.

    `norm_mean` is 0 for models that add 1 to the weight of a norm.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    transposed = {id(module.weight) for module in model.modules() if isinstance(module, Conv1D)}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            if name.endswith("bias"):
                weight.copy_(0.3 * torch.randn_like(weight))
            elif weight.ndim == 1:
                weight.copy_(norm_mean + 0.2 * torch.randn_like(weight))
            elif id(weight) in embeddings or ".lora_B." in name:
                weight.copy_(0.4 * torch.randn_like(weight))
            else:
                inputs = weight.shape[0 if id(weight) in transposed else 1]
                weight.copy_(1.5 * torch.randn_like(weight) / inputs**0.5)


def causal_batch(tokens: int) -> dict[str, torch.Tensor]:
    """A prompt of 4 tokens and its answer, and a shorter text followed by 4 tokens of padding; no attention mask."""
    valid = tokens - 4
    input_ids = torch.randint(3, 64, (2, tokens))
    input_ids[:, 0] = 1
    input_ids[1, valid:] = 0
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[1, valid:] = -100
    return {"input_ids": input_ids, "labels": labels}


def backward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """The logits and the mean loss (labels shifted by one where each token has one); gradients stay in the weights."""
    model.zero_grad()
    out = model(**batch)
    logits, labels = out.logits, batch["labels"]
    if labels.ndim == 2:
        logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    mean = torch.nn.functional.cross_entropy(logits, labels)
    assert abs(mean.item() - out.loss.item()) < 1e-6
    out.loss.backward()
    return out.logits.detach().contiguous(), out.loss.item()


def write_adapter(adapted: peft.PeftModel, directory: Path, base: str) -> None:
    adapted.save_pretrained(directory, save_embedding_layers=False)
    (directory / "README.md").unlink()
    config_path = directory / "adapter_config.json"
    config = json.loads(config_path.read_text())
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order changes by run
    config_path.write_text(json.dumps(config, indent=2) + "\n")


def trainable(adapted: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's weights by their keys on disk, where PEFT leaves out the adapter's name and its own wrappers."""
    return {
        name.replace("modules_to_save.default.", "")
        .replace("magnitude_vector.default.weight", "magnitude_vector")
        .replace(".default.", ".")
        .removesuffix(".default"): weight
        for name, weight in adapted.named_parameters()
        if weight.requires_grad
    }


def old_config(config: dict, drop: Collection[str] = ()) -> dict:
    """The same configuration with the keys that transformers 4 wrote, without those in `drop`."""
    drop = {*drop, "rope_parameters", "dtype", "transformers_version"}
    older = {key: value for key, value in config.items() if key not in drop}
    rope = dict(config["rope_parameters"])
    if "sliding_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    older["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    older["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    older["torch_dtype"] = config["dtype"]
    older["transformers_version"] = "4.51.0"
    return dict(sorted(older.items()))

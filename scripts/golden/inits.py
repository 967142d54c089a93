"""What PEFT makes of starts that need data: test/golden/adapters/eva and lora-ga; and lora-fa.

    python scripts/golden/inits.py

The base is models/qwen2. expected.json has the rows, two a batch, and the ranks and alphas of EVA by module; expected.safetensors A (and B) of every
module, of which signs are free. For LoRA-GA "DIRECTION.SCALE.module.A" and B. EVA sees one batch again and again, for then directions settle at
once; "pca.0" and so on are batches whose incremental components and singular values are "pca.components" and "pca.s".
"""

import json
import shutil

from common import GOLDEN, MADE_WITH, deterministic, write_json, write_tensors

import torch
from peft import EvaConfig, LoraConfig, LoraGAConfig, get_peft_model, initialize_lora_eva_weights
from peft.optimizers import lorafa
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.incremental_pca import IncrementalPCA
from transformers import AutoModelForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SEED = 77
BATCHES, TOKENS = 3, 24
SKETCH = torch.svd_lowrank


def load() -> torch.nn.Module:
    base = GOLDEN / "models" / "qwen2"
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")


def batches() -> list[dict[str, torch.Tensor]]:
    made = []
    for _ in range(BATCHES):
        ids = torch.randint(3, 64, (2, TOKENS))
        labels = ids.clone()
        labels[0, :4] = -100
        labels[1, :2] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def modules(adapted: torch.nn.Module):
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A"):
            yield name.removeprefix("base_model.model."), module


def write(name: str, data: list, tensors: dict, expected: dict) -> None:
    directory = GOLDEN / "adapters" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    rows = [
        {"inputIds": ids.tolist(), "labels": labels.tolist()}
        for batch in data
        for ids, labels in zip(batch["input_ids"], batch["labels"])
    ]
    write_tensors(directory / "expected.safetensors", tensors)
    (directory / "expected.safetensors").chmod(0o644)
    write_json(directory / "expected.json", {"made_with": MADE_WITH, "base": "qwen2", **expected, "rows": rows})


def make_eva() -> None:
    deterministic(SEED)
    data = batches()[:1]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ALL, "rank_pattern": {"down_proj": 2}}
    config = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(), task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(load(), config)
    initialize_lora_eva_weights(adapted, data, show_progress_bar=False)
    tensors, found = {}, {}
    for name, module in modules(adapted):
        tensors[f"{name}.A"] = module.lora_A["default"].weight
        found[name] = {
            "r": module.r["default"],
            "alpha": module.lora_alpha["default"],
            "scale": module.scaling["default"],
        }
    pca = IncrementalPCA(n_components=4, lowrank=True, lowrank_seed=42)
    for i, rows in enumerate((20, 9, 14)):
        tensors[f"pca.{i}"] = torch.randn(rows, 16) * 0.6 ** torch.arange(16) + i
        pca.partial_fit(tensors[f"pca.{i}"])
    tensors |= {"pca.components": pca.components_.float(), "pca.s": pca.singular_values_.float()[None]}
    tensors |= {"pca.explained": pca.explained_variance_ratio_.float()[None]}
    write("eva", data, tensors, {"modules": found})
    print(sorted(json.dumps(value) for value in found.values()))


def sketch_or_exact(matrix: torch.Tensor, q: int, niter: int):
    """torch.svd_lowrank, but exact for q = r = 4, where PEFT looks for the largest singular value of W: its sketch is up to 2 % below."""
    if q != 4:
        return SKETCH(matrix, q=q, niter=niter)
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :q], S[:q], Vh[:q].T


def make_lora_ga() -> None:
    deterministic(SEED)
    torch.svd_lowrank = sketch_or_exact
    data = batches()
    tensors = {}
    for direction, scale in [("ArB2r", "stable"), ("A2rBr", "weight_svd"), ("ArBr", "gd_scale"), ("ArB2r", "unit")]:
        model = load()
        settings = {"r": 4, "lora_alpha": 6, "target_modules": ALL}
        ga = LoraGAConfig(direction=direction, scale=scale)
        config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=ga, task_type="CAUSAL_LM", **settings)

        def step() -> None:
            for batch in data:
                model(**batch).loss.backward()

        preprocess_loraga(model, config, step)
        adapted = get_peft_model(model, config)
        for name, module in modules(adapted):
            if direction == "ArB2r" and scale == "stable" or ".layers.0." in name:
                tensors[f"{direction}.{scale}.{name}.A"] = module.lora_A["default"].weight
                tensors[f"{direction}.{scale}.{name}.B"] = module.lora_B["default"].weight
    write("lora-ga", data, tensors, {"alpha": 6, "r": 4})


def make_lora_fa() -> None:
    """lora-fa: A and B to begin with, and B after 4 steps of PEFT's optimizer, in f32 as its autocast to bf16 is switched off.

    It adds eps to √v before the bias correction, which makes it eps/√(1 − β2ᵗ) of Adam's rule, 32 times as much in the first step: eps is given
    so that it is Adam's 1e-6.
    """
    deterministic(SEED)
    data = batches()[:1]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
    adapted = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_B." in name:
                weight.copy_(0.1 * torch.randn_like(weight))
    tensors = {f"{name}.A": module.lora_A["default"].weight.clone() for name, module in modules(adapted)}
    tensors |= {f"{name}.B": module.lora_B["default"].weight.clone() for name, module in modules(adapted)}
    lorafa.is_bf16_available = lambda: False
    optimizer = lorafa.create_lorafa_optimizer(adapted, r=4, lora_alpha=6, lr=0.01)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["eps"] = 1e-6 * (1 - 0.999 ** (step + 1)) ** 0.5
        loss = adapted(**data[0]).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    tensors |= {f"{name}.final": module.lora_B["default"].weight for name, module in modules(adapted)}
    write("lora-fa", data, tensors, {"lr": 0.01, "losses": losses})


if __name__ == "__main__":
    make_lora_fa()
    make_eva()
    make_lora_ga()

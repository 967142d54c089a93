"""Makes test/golden/adapters/<name>/: PEFT's variants of LoRA on models of test/golden/models, with logits, gradients, steps.

    python scripts/golden/adapters.py [name ...]

Each directory holds
- adapter/: the adapter as PEFT writes it, all of it random;
- expected.json: `base`, the model it belongs to, whose batch is used; `lora_loss`, and `steps.losses`: the loss before each of
  5 steps of AdamW (as in models.py);
- expected.safetensors: `lora.logits`, and for each key of adapter_model.safetensors `lora.grad.<key>` at the start and
  `lora.final.<key>` after the steps (not of biases of keys). `merged.logits` are those of the model with the adapter merged into it by PEFT, where that
  can be done.

Of pissa, olora and pissa-rslora, which begin with a part of the base: adapter/ is what PEFT makes of the adapter after the steps for
the base as it was (twice the rank), `final.logits` are those after the steps, and there are no gradients.
"""

import json
import shutil
import sys
import tempfile

from common import GOLDEN, MADE_WITH, backward, deterministic, randomize, trainable, write_adapter, write_json, write_tensors
from models import LR, STEPS, rounding_error, train

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SEED = 501  # of every adapter: one for which rounding hardly moves the 5 steps of any of them

VARIANTS = {
    "rslora": {"base": "qwen2", "config": {"target_modules": ALL, "use_rslora": True}},
    "patterns": {
        "base": "qwen2",
        "config": {
            "target_modules": ALL,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6, "mlp.down_proj": 3},
            "alpha_pattern": {"up_proj": 3.5, r".*\.0\.self_attn\.k_proj": 16},
        },
    },
    "layers": {
        "base": "smollm3",
        "config": {
            "target_modules": ALL,
            "exclude_modules": ["o_proj", "vision_tower"],
            "layers_to_transform": [1, 3],
            "layers_pattern": "layers",
        },
    },
    "regex": {
        "base": "qwen3",
        "config": {"target_modules": r".*\.1\.(self_attn\.[qv]_proj|mlp\..*_proj)", "exclude_modules": r".*up_proj"},
    },
    "dora": {"base": "qwen2", "config": {"target_modules": ALL, "use_dora": True}},
    "dora-gpt2": {
        "base": "gpt2",
        "config": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
    },
    "dora-patterns": {
        "base": "gemma2",
        "config": {
            "target_modules": ALL,
            "use_dora": True,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 2},
            "alpha_pattern": {"down_proj": 5},
        },
    },
    "lora-bias": {"base": "qwen2", "config": {"target_modules": ["q_proj", "k_proj", "v_proj"], "lora_bias": True}},
    "bias": {"base": "qwen2", "config": {"target_modules": ["q_proj", "v_proj", "o_proj"], "bias": "lora_only"}},
    "bias-all": {
        "base": "gpt2",
        "config": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "bias": "all"},
    },
    "vocabulary": {"base": "qwen2", "config": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}},
    # tied, scaled embeddings and capped logits
    "vocabulary-tied": {"base": "gemma2", "config": {"target_modules": ["v_proj", "embed_tokens", "lm_head"]}},
    "whole": {
        "base": "qwen2",
        "config": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm", "lm_head"]},
    },
    "whole-tied": {
        "base": "smollm3",
        "config": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    },
    "tokens": {"base": "qwen2", "config": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 60, 41]}},
    "tokens-tied": {
        "base": "gemma2",
        "config": {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 60, 41]},
    },
    "tokens-head": {
        "base": "qwen2",
        "config": {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [5, 12], "lm_head": [12, 33, 9]},
        },
    },
}


BEGINNINGS = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora", "rank_pattern": {"q_proj": 2}},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
}


def make_beginning(name: str, config: dict) -> None:
    directory = GOLDEN / "adapters" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    base = GOLDEN / "models" / "qwen2"
    given = json.loads((base / "expected.json").read_text())
    batch = {key: torch.tensor(given[key]) for key in ("input_ids", "labels")}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").train()
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", target_modules=ALL, **config))
    with tempfile.TemporaryDirectory() as initial:
        adapted.peft_config["default"].init_lora_weights = True  # or the saved one would be initialised again
        adapted.save_pretrained(initial, save_embedding_layers=False)
        logits, loss = backward(adapted, batch)
        assert abs(loss - given["base_loss"]) < 1e-4
        losses = train(adapted, batch)
        final = adapted(batch["input_ids"]).logits
        adapted.peft_config["default"].init_lora_weights = config["init_lora_weights"]
        adapted.save_pretrained(
            directory / "adapter", path_initial_model_for_weight_conversion=initial, save_embedding_layers=False
        )
    (directory / "adapter" / "README.md").unlink()
    path = directory / "adapter" / "adapter_config.json"
    saved = json.loads(path.read_text()) | {"base_model_name_or_path": "qwen2"}
    saved["target_modules"] = sorted(saved["target_modules"])
    path.write_text(json.dumps(saved, indent=2) + "\n")
    write_tensors(directory / "expected.safetensors", {"final.logits": final})
    expected = {"made_with": MADE_WITH, "base": "qwen2", "steps": {"lr": LR, "losses": losses}}
    write_json(directory / "expected.json", expected)
    for file in directory.rglob("*.safetensors"):
        file.chmod(0o644)
    print(f"{name}: loss {loss:.6f}, after {STEPS - 1} steps {losses[-1]:.6f}")


METHODS = {
    "cat": {"combination_type": "cat"},
    "svd": {"combination_type": "svd", "svd_rank": 3},
    "linear": {"combination_type": "linear"},
    "ties": {"combination_type": "ties", "density": 0.5},
    "magnitude_prune": {"combination_type": "magnitude_prune", "density": 0.3},
}
WEIGHTS = [0.7, -0.4]


def make_combined() -> None:
    """combined/: two adapters, a and b, and the updates (s·B·A) of what PEFT makes of them with WEIGHTS, by method and module."""
    directory = GOLDEN / "adapters" / "combined"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    base = GOLDEN / "models" / "qwen2"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = {"r": 4, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], "layers_to_transform": None}
    adapted = get_peft_model(model, LoraConfig(lora_alpha=8, **config), "a")
    adapted.add_adapter("b", LoraConfig(lora_alpha=3, use_rslora=True, **config))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.4 * torch.randn_like(weight))
    adapted.save_pretrained(directory, save_embedding_layers=False)
    tensors = {}
    for method, options in METHODS.items():
        adapted.add_weighted_adapter(["a", "b"], WEIGHTS, method, **options)
        for name, module in adapted.named_modules():
            if hasattr(module, "lora_A") and ".layers.0." in name:
                delta = module.get_delta_weight(method)
                tensors[f"{method}.{name.removeprefix('base_model.model.')}"] = delta
    write_tensors(directory / "expected.safetensors", tensors)
    (directory / "README.md").unlink()
    for part in ("a", "b"):
        path = directory / part / "adapter_config.json"
        saved = json.loads(path.read_text()) | {"base_model_name_or_path": "qwen2"}
        saved["target_modules"] = sorted(saved["target_modules"])
        path.write_text(json.dumps(saved, indent=2) + "\n")
    for file in directory.rglob("*.safetensors"):
        file.chmod(0o644)
    print(f"combined: {len(tensors)} updates")


def make(name: str, spec: dict) -> None:
    directory = GOLDEN / "adapters" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    base = GOLDEN / "models" / spec["base"]
    given = json.loads((base / "expected.json").read_text())
    batch = {key: torch.tensor(given[key]) for key in ("input_ids", "labels")}

    def load() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").train()

    adapted = get_peft_model(load(), LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **spec["config"]))
    magnitudes = {key: weight.detach().clone() for key, weight in trainable(adapted).items() if "magnitude" in key}
    randomize(adapted)
    with torch.no_grad():
        for key, weight in trainable(adapted).items():
            if key in magnitudes:  # near what it begins with: a gain near 1
                weight.copy_(magnitudes[key] * (1 + 0.2 * torch.randn_like(weight)))
    adapted.save_pretrained(directory / "adapter", save_embedding_layers=False)
    write_adapter_config(adapted, directory, spec["base"])

    adapted = PeftModel.from_pretrained(load(), directory / "adapter", is_trainable=True).train()
    logits, loss = backward(adapted, batch)
    keys = set(load_file(directory / "adapter" / "adapter_model.safetensors"))
    weights = trainable(adapted)
    assert set(weights) == keys, set(weights) ^ keys
    tensors = {"lora.logits": logits} | {f"lora.grad.{key}": weight.grad.clone() for key, weight in weights.items()}
    assert all(tensor.abs().max() > 1e-4 for tensor in tensors.values())
    losses = train(adapted, batch)
    again = PeftModel.from_pretrained(load(), directory / "adapter", is_trainable=True).train()
    # Softmax cancels the biases of keys: their gradients are zero but for rounding, of which AdamW makes whole steps.
    steady = {key: weight for key, weight in weights.items() if not key.endswith("c_attn.base_layer.bias")}
    rounding = rounding_error(again, batch, steady)
    assert rounding < 2e-4, rounding
    tensors |= {f"lora.final.{key}": weight for key, weight in trainable(adapted).items() if key in steady}
    # PEFT's merge of an embedding and a head that are tied gives another model.
    if not spec["config"].get("bias") and name not in ("vocabulary-tied", "whole-tied"):
        merged = PeftModel.from_pretrained(load(), directory / "adapter").merge_and_unload()
        tensors["merged.logits"] = merged(batch["input_ids"]).logits
        assert (tensors["merged.logits"] - logits).abs().max() < 1e-3
    write_tensors(directory / "expected.safetensors", tensors)
    expected = {"made_with": MADE_WITH, "base": spec["base"], "lora_loss": loss, "steps": {"lr": LR, "losses": losses}}
    write_json(directory / "expected.json", expected)
    for file in directory.rglob("*.safetensors"):
        file.chmod(0o644)
    print(f"{name}: loss {loss:.6f}, after {STEPS - 1} steps {losses[-1]:.6f}; {len(keys)} tensors")


def write_adapter_config(adapted: PeftModel, directory, base: str) -> None:
    if isinstance(adapted.peft_config["default"].target_modules, str):
        (directory / "adapter" / "README.md").unlink()
        path = directory / "adapter" / "adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": base}
        path.write_text(json.dumps(config, indent=2) + "\n")
    else:
        write_adapter(adapted, directory / "adapter", base)


if __name__ == "__main__":
    for name, spec in VARIANTS.items():
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            deterministic(SEED)
            make(name, spec)
    for name, config in BEGINNINGS.items():
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            deterministic(SEED)
            make_beginning(name, config)
    if len(sys.argv) == 1 or "combined" in sys.argv[1:]:
        deterministic(SEED)
        make_combined()

"""Loads an adapter that lowrank wrote into real PEFT and compares one row's logits. Exit code 1 on any difference.

    python scripts/golden/check_adapter.py MODEL_DIR ADAPTER_DIR DATA.jsonl ROW LOGITS.safetensors [--tolerance 1e-3]

DATA.jsonl has one {"input_ids": […]} per line, ROW counts from 0, LOGITS.safetensors holds `logits` [T,V] or [1,T,V].
Every key of the adapter must be one that PEFT expects, in its shape, and none may be missing.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

from common import deterministic

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


OWN = ("lora_", "modules_to_save.", "trainable_tokens_delta")  # what an adapter's parameters have in their names


def fail(message: str) -> None:
    sys.exit(f"check_adapter: {message}")


def check_keys(base: torch.nn.Module, directory: Path) -> int:
    """Compares the file with the tensors of a fresh PEFT model of the same configuration."""
    config = PeftConfig.from_pretrained(directory)
    model = get_peft_model(base, config)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    # With bias="all" PEFT writes the biases of trained copies, and of what they are copies of, once more.
    again = (".modules_to_save.bias", ".original_module.bias")
    if config.bias == "all":
        wanted = {key: tensor for key, tensor in wanted.items() if not key.endswith(again)}
    found = load_file(directory / "adapter_model.safetensors")
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        fail(f"the keys must be PEFT's, missing {missing}, unexpected {unexpected}")
    for key, tensor in found.items():
        if tensor.shape != wanted[key].shape:
            fail(f"{key} must have shape {list(wanted[key].shape)}, got {list(tensor.shape)}")
        if not tensor.isfinite().all():
            fail(f"{key} must be finite")
    result = set_peft_model_state_dict(model, found)
    own = {name for name, _ in model.named_parameters()}  # rows that a tied head shares are there once
    missing = [key for key in result.missing_keys if key in own and any(part in key for part in OWN)]
    if missing or result.unexpected_keys:
        fail(f"PEFT reports missing {missing}, unexpected {result.unexpected_keys}")
    return len(found)


arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("model", type=Path)
arguments.add_argument("adapter", type=Path)
arguments.add_argument("data", type=Path)
arguments.add_argument("row", type=int)
arguments.add_argument("logits", type=Path)
arguments.add_argument("--tolerance", type=float, default=1e-3, help="largest absolute difference (default 1e-3)")
options = arguments.parse_args()

deterministic(0)
# Keys that PEFT would ignore, in the file or in adapter_config.json, are errors here.
warnings.filterwarnings("error", message=".*(missing|unexpected|mismatch)")
warnings.filterwarnings("ignore", message=".*base_model_name_or_path. was renamed")


def load_base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, attn_implementation="eager")


tensors = check_keys(load_base(), options.adapter)
model = PeftModel.from_pretrained(load_base(), options.adapter).eval()

row = json.loads(options.data.read_text().splitlines()[options.row])
with torch.no_grad():
    expected = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    with model.disable_adapter():
        without = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
got = load_file(options.logits)["logits"].float()
got = got[0] if got.dim() == 3 else got
if got.shape != expected.shape:
    fail(f"logits must have shape {list(expected.shape)}, got {list(got.shape)}")
difference = (got - expected).abs().max().item()
effect = (without - expected).abs().max().item()
print(f"{tensors} tensors, max abs difference {difference:.3e}, the adapter changes logits by up to {effect:.3e}")
if not difference <= options.tolerance:
    fail(f"logits must agree to {options.tolerance:g}, got {difference:g}")
print("OK")

"""Compares a GGUF adapter that lowrank wrote with the PEFT adapter it was made of. Exit code 1 on any difference.

    python scripts/golden/check_gguf.py MODEL_DIR PEFT_DIR ADAPTER.gguf [--tolerance 1e-6]

Reads the file with llama.cpp's own package, `gguf`, finds tensors by its table of names, and compares s·B·A of every
module with PEFT's; rows of q and k are put in llama.cpp's order where its models have them so.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
from safetensors.numpy import load_file

PERMUTED = ("llama", "mistral", "granite", "smollm3")
PREFIX = "base_model.model."


def fail(message: str) -> None:
    sys.exit(f"check_gguf: {message}")


def by_pattern(patterns: dict, module: str, fallback: float) -> float:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), fallback)


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head: the first half and the second, taken in turns."""
    first, second = rows.reshape(heads, 2, -1, rows.shape[-1]).transpose(1, 0, 2, 3)
    return np.stack([first, second], axis=2).reshape(rows.shape)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    args = parser.parse_args()

    model = json.loads((args.model / "config.json").read_text())
    config = json.loads((args.adapter / "adapter_config.json").read_text())
    peft = load_file(args.adapter / "adapter_model.safetensors")
    reader = GGUFReader(args.file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    for key, wanted in (("general.type", "adapter"), ("adapter.type", "lora")):
        if fields.get(key) != wanted:
            fail(f"{key} must be {wanted}, got {fields.get(key)}")
    architecture = next((a for a in MODEL_ARCH if MODEL_ARCH_NAMES[a] == fields["general.architecture"]), None)
    if architecture is None:
        fail(f"llama.cpp has no architecture {fields['general.architecture']}")
    names = get_tensor_name_map(architecture, model.get("num_hidden_layers") or model["n_layer"])
    tensors = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}

    modules = sorted(key[len(PREFIX) : -len(".lora_A.weight")] for key in peft if key.endswith(".lora_A.weight"))
    worst = 0.0
    for module in modules:
        name = names.get_name(module)
        if name is None:
            fail(f"llama.cpp has no name for {module}")
        try:
            a, b = (tensors.pop(f"{name}.weight.lora_{letter}") for letter in "ab")
        except KeyError as error:
            fail(f"the file must have {error}, for {module}")
        found = fields["adapter.lora.alpha"] / b.shape[1] * (b @ a)

        A, B = (peft[f"{PREFIX}{module}.lora_{letter}.weight"].astype(np.float64) for letter in "AB")
        rank = by_pattern(config["rank_pattern"], module, config["r"])
        alpha = by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
        wanted = alpha / (rank**0.5 if config.get("use_rslora") else rank) * (B @ A)
        if model["model_type"] in PERMUTED and re.search(r"\.[qk]_proj$", module):
            heads = model["num_attention_heads"]
            wanted = neighbours(wanted, heads if "q_proj" in module else model.get("num_key_value_heads") or heads)
        if found.shape != wanted.shape:
            fail(f"{module} must be {wanted.shape}, got {found.shape}")
        worst = max(worst, np.abs(found - wanted).max() / np.abs(wanted).max())
    if tensors:
        fail(f"the file must have nothing else, got {', '.join(tensors)}")
    if not worst <= args.tolerance:
        fail(f"updates must agree to {args.tolerance}, got {worst:.2g}")
    print(f"{args.file}: {len(modules)} modules, updates agree to {worst:.2g}")


if __name__ == "__main__":
    main()

"""Trains an adapter of every variant with the command line and loads each into real PEFT: no missing or unexpected key, the same logits.

    python scripts/golden/check_variants.py [name ...]

Models and rows are those of test/golden/models; see check_adapter.py for what is compared. Exit code 1 if one of them fails.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOWRANK = ["node", "--import", "tsx", "--import", "./scripts/wgsl.mjs", "src/cli/main.ts"]
TRAIN = ["--steps", "5", "--batch-size", "2", "--rank", "4", "--alpha", "8", "--learning-rate", "0.05"]

VARIANTS = {
    "lora": ("qwen2", []),
    "dropout, LoRA+": ("qwen2", ["--dropout", "0.1", "--loraplus-lr-ratio", "16"]),
    "rslora": ("qwen3", ["--use-rslora"]),
    "dora": ("qwen2", ["--use-dora"]),
    "dora of Conv1D": ("gpt2", ["--use-dora"]),
    "dora and rslora of fused layers": ("phi3", ["--use-dora", "--use-rslora"]),
    "some layers": (
        "gemma2",
        ["--target-modules", "q_proj,up_proj", "--layers-to-transform", "1", "--exclude-modules", "up_proj"],
    ),
    "regular expression": ("smollm3", ["--target-modules", r"/.*\.[02]\..*_proj/"]),
    "pissa": ("qwen2", ["--init", "pissa"]),
    "pissa by power iterations": ("mistral", ["--init", "pissa_niter_8"]),
    "olora and rslora": ("gemma2", ["--init", "olora", "--use-rslora"]),
    "olora and dora": ("granite", ["--init", "olora", "--use-dora"]),
    "orthogonal": ("olmo2", ["--init", "orthogonal"]),
    "eva": ("qwen2", ["--init", "eva"]),
    "eva and rslora": ("llama-linear", ["--init", "eva", "--use-rslora"]),
    "lora_ga": ("qwen2", ["--init", "lora_ga"]),
    "lora_ga of Conv1D": ("gpt2", ["--init", "lora_ga"]),
    "LoRA-FA": ("qwen2", ["--lora-fa"]),
    "gaussian": ("gemma3", ["--init", "gaussian"]),
    "embedding and head": ("qwen2", ["--target-modules", "q_proj,embed_tokens,lm_head"]),
    "embedding and head, tied and scaled": ("gemma3", ["--target-modules", "embed_tokens,lm_head"]),
    "head and dropout": ("gemma2", ["--target-modules", "q_proj,lm_head", "--dropout", "0.1"]),
    "trained whole": ("qwen2", ["--target-modules", "q_proj", "--modules-to-save", "embed_tokens,norm,lm_head"]),
    "trained whole, tied": ("smollm3", ["--target-modules", "q_proj", "--modules-to-save", "lm_head"]),
    "embeddings of Conv1D's model": ("gpt2", ["--target-modules", "c_attn,wte", "--modules-to-save", "wpe,ln_f"]),
    "rows of tokens": ("qwen2", ["--target-modules", "q_proj", "--trainable-token-indices", "7,3"]),
    "rows of tokens, tied and scaled": ("gemma3", ["--target-modules", "q_proj", "--trainable-token-indices", "7,3"]),
    "rows of tokens by name": (
        "smollm3",
        ["--target-modules", "q_proj", "--trainable-token-indices", "embed_tokens=7,3;lm_head=9"],
    ),
    "all biases": ("gpt2", ["--target-modules", "c_attn", "--bias", "all"]),
    "all biases and trained copies": (
        "qwen2",
        ["--target-modules", "q_proj", "--bias", "all", "--modules-to-save", "k_proj"],
    ),
    "bias of B": ("qwen2", ["--target-modules", "q_proj,o_proj", "--lora-bias", "--bias", "lora_only"]),
}


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip().splitlines()[-2] if "OK" in done.stdout else ""


def check(base: str, options: list[str]) -> str:
    model = ROOT / "test" / "golden" / "models" / base
    given = json.loads((model / "expected.json").read_text())
    with tempfile.TemporaryDirectory() as directory:
        rows, adapter, logits = (Path(directory) / name for name in ("rows.jsonl", "adapter", "logits.safetensors"))
        pairs = zip(given["input_ids"], given["labels"])
        rows.write_text("".join(json.dumps({"input_ids": ids, "labels": labels}) + "\n" for ids, labels in pairs))
        run(*LOWRANK, "train", "--model", model, "--data", rows, "--out", adapter, *TRAIN, *options)
        run(*LOWRANK, "logits", "--model", model, "--adapter", adapter, "--data", rows, "--row", 0, "--out", logits)
        script = Path(__file__).with_name("check_adapter.py")
        return run(sys.executable, "-W", "ignore", script, model, adapter, rows, 0, logits)


failed = 0
for name, (base, options) in VARIANTS.items():
    if len(sys.argv) > 1 and name not in sys.argv[1:]:
        continue
    try:
        print(f"{name} ({base}): {check(base, options)}", flush=True)
    except RuntimeError as error:
        failed += 1
        print(f"{name} ({base}): FAILED: {error}", flush=True)
sys.exit(1 if failed else 0)

"""What every golden script shares: where goldens live, determinism, and compact JSON."""

import json
import os
import random
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy
import peft
import torch
import transformers

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

"""NF4 as bitsandbytes computes and stores it, of a few matrices: test/golden/nf4.safetensors.

bitsandbytes is not among the packages of these scripts: this is its published algorithm, in IEEE arithmetic, one scalar at a time.
NF4: arXiv:2305.14314, section 3 and appendix E; the map of 8 bits: arXiv:2110.02861, section 2. Of each matrix M the file has

    M.values                     f32 [rows, columns]
    M.single.weight, .weight.*   as a Linear4bit is saved, the scales in f32
    M.double.weight, .weight.*   the same with the scales quantised once more

Where the tests allow a difference, and why, stands in test/kernels/nf4.test.ts.
"""

import json

import numpy as np
import torch
from common import GOLDEN
from safetensors.numpy import save_file

F32 = np.float32
LEVELS = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
    + [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
    + [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    dtype=F32,
)
# A value above so many of these has the level of that number.
MIDDLES = np.array(
    [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984]
    + [-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668]
    + [0.2920137718319893, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011],
    dtype=F32,
)


def dynamic_map() -> np.ndarray:
    """0, 1, and per decade the middles of ever more equal pieces of [0.1, 1], in PyTorch's own f32."""
    levels = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        levels += middles.tolist() + (-middles).tolist()
    return np.sort(np.array(levels, dtype=F32))


def nf4_code(x: np.float32) -> int:
    return int(np.count_nonzero(x > MIDDLES))


def map_code(levels: np.ndarray, x: np.float32) -> int:
    """Seven halvings from level 127, then the neighbour if it is nearer."""
    at = 127
    below, above = 0, 255
    for step in (64, 32, 16, 8, 4, 2, 1):
        if x > levels[at]:
            below, at = at, at + step
        else:
            above, at = at, at - step
    if x > levels[at]:
        return above if x > (levels[above] + levels[at]) * F32(0.5) else at
    return below if x < (levels[below] + levels[at]) * F32(0.5) else at


def blocks(values: np.ndarray, size: int) -> list[np.ndarray]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def quantize(values: np.ndarray, size: int, code) -> tuple[np.ndarray, np.ndarray]:
    absmax = np.array([np.abs(block).max() for block in blocks(values, size)], dtype=F32)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = [
            code(x) for block, most in zip(blocks(values, size), absmax) for x in block * (F32(1) / most)
        ]
    return np.array(codes, dtype=np.uint8), absmax


def saved(matrix: np.ndarray, nested: bool) -> dict[str, np.ndarray]:
    codes, absmax = quantize(matrix.reshape(-1), 64, nf4_code)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(matrix.shape)}
    parts = {"weight": (codes[0::2] << 4 | codes[1::2]).reshape(-1, 1), "weight.quant_map": LEVELS}
    if nested:
        offset = F32(absmax.astype(np.float64).mean())
        levels = dynamic_map()
        absmax, outer = quantize(absmax - offset, 256, lambda x: map_code(levels, x))
        parts |= {"weight.nested_absmax": outer, "weight.nested_quant_map": levels}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    text = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
    return parts | {"weight.absmax": absmax, "weight.quant_state.bitsandbytes__nf4": text}


def matrices() -> dict[str, np.ndarray]:
    random = np.random.default_rng(4)
    normal = random.normal(size=(24, 28)).astype(F32)
    ties = np.concatenate([MIDDLES, np.nextafter(MIDDLES, F32(2)), np.nextafter(MIDDLES, F32(-2)), LEVELS])
    steps = np.arange(1, 301, dtype=F32).repeat(64).reshape(300, 64) * F32(0.01)
    steps[:, 1:] *= random.uniform(-1, 1, size=(300, 63)).astype(F32)
    zeros = normal[:16, :16].copy()
    zeros[4:8] = 0  # the second of four blocks
    return {
        "normal": normal,
        "tail": random.normal(size=(3, 12)).astype(F32),
        "ties": np.pad(ties, (0, 64 - len(ties) % 64)).reshape(-1, 4).astype(F32),
        "tiny": (normal * F32(1e-30)).astype(F32),
        "large": (normal * F32(1e30)).astype(F32),
        "many": steps,
        "zero block": zeros,
        "zeros": np.zeros((4, 20), dtype=F32),
    }


def main() -> None:
    tensors = {}
    for name, matrix in matrices().items():
        tensors[f"{name}.values"] = matrix
        for kind, nested in (("single", False), ("double", True)):
            tensors |= {f"{name}.{kind}.{part}": value for part, value in saved(matrix, nested).items()}
    save_file(tensors, GOLDEN / "nf4.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()

"""PyTorch's matrix products, f32 (TF32 off) and bf16, for bench/gpu.ts or on their own.

python3 bench/torch.py [--quick] [--device cuda|cpu] [--shapes JSON]

--shapes: [{"layout": "nn"|"nt"|"tn", "M": ..., "N": ..., "K": ...}, ...], or "-" to read that from stdin. Prints one JSON object.
"""

import argparse
import json
import statistics
import sys
import time

sys.path.pop(0)  # this file's directory, where "torch" would be this file

import torch

SQUARES = [256, 512, 1024, 2048, 4096]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of |got - f64| / (1 + |f64|)


def parse_arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="small sizes, few and short repetitions")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shapes", help="JSON, or - for stdin")
    return parser.parse_args()


def shapes_of(options):
    if options.shapes == "-":
        return json.load(sys.stdin)
    if options.shapes:
        return json.loads(options.shapes)
    sizes = [128] if options.quick else SQUARES
    return [{"layout": layout, "M": n, "N": n, "K": n} for n in sizes for layout in ("nn", "nt", "tn")]


class Clock:
    """Times a number of runs in milliseconds, by the device's events where it has them."""

    def __init__(self, device):
        self.device = device

    def time(self, run, count):
        if self.device == "cpu":
            start = time.perf_counter()
            for _ in range(count):
                run()
            return 1000 * (time.perf_counter() - start)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def spread(samples):
    """The same as bench/harness.ts: linear interpolation between neighbours."""
    ordered = sorted(samples)

    def at(share):
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return {"median": statistics.median(ordered), "p10": at(0.1), "p90": at(0.9)}


def operands(shape, dtype, device):
    M, N, K = shape["M"], shape["N"], shape["K"]
    generator = torch.Generator(device=device).manual_seed(1)
    x = torch.randn(M, K, generator=generator, device=device).to(dtype)
    w = (torch.randn(K, N, generator=generator, device=device) / K**0.5).to(dtype)
    # Stored transposed, as the layout says, and used through a view.
    if shape["layout"] == "tn":
        x = x.t().contiguous().t()
    if shape["layout"] == "nt":
        w = w.t().contiguous().t()
    return x, w


def measure(shape, dtype, options):
    x, w = operands(shape, dtype, options.device)
    y = torch.empty(shape["M"], shape["N"], dtype=dtype, device=options.device)

    def run():
        torch.mm(x, w, out=y)

    run()
    rows = sorted({0, shape["M"] - 1})
    expected = x[rows].double() @ w.double()
    worst = ((y[rows].double() - expected).abs() / (1 + expected.abs())).max().item()
    if not worst <= TOLERANCE[dtype]:
        raise ValueError(f"y must be within {TOLERANCE[dtype]} of f64, got {worst}")

    clock = Clock(options.device)
    minimum_ms, repetitions = (5, 3) if options.quick else (20, 15)
    batch = 1
    while (elapsed := clock.time(run, batch)) < minimum_ms:
        batch = max(2 * batch, min(int(batch * minimum_ms / max(elapsed, 1e-3)), 100_000))
    times = [clock.time(run, batch) / batch for _ in range(repetitions)]
    flops = 2 * shape["M"] * shape["N"] * shape["K"]
    size = x.element_size() * (x.numel() + w.numel() + y.numel())
    ms = spread(times)
    rates = {"gflops": flops / ms["median"] / 1e6, "gbs": size / ms["median"] / 1e6}
    return {"flops": flops, "bytes": size, "batch": batch, "repetitions": repetitions, "ms": ms, **rates}


def main():
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch: no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    cases = []
    for shape in shapes_of(options):
        for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
            case = {"dtype": name, "shape": shape}
            try:
                case.update(measure(shape, dtype, options))
            except Exception as error:  # one that fails must not lose the others
                case["error"] = f"{type(error).__name__}: {error}"
            cases.append(case)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(json.dumps({"version": torch.__version__, "device": device, "cases": cases}))


main()

"""Makes test/golden/adamw.json: torch's AdamW and clip_grad_norm_, and transformers' learning-rate schedules.

    python scripts/golden/adapter-optim.py

All values are f64 results of inputs that f32 holds exactly. `adamw` uses the gradients as given, `adamw_clipped` clips
them to a global norm of `max_norm` first; `norm` is the norm before clipping. `schedules.<name>[k]` is the multiplier of
the learning rate for optimizer step k (from 0), k = 0 … total_steps: step 0 of a warm-up has multiplier 0. The `linear`
and `cosine` ones fall to 0 at total_steps; cosine is half a period.
"""

from common import GOLDEN, MADE_WITH, deterministic, exact, plain, write_json

import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

OPTIONS = {"lr": 0.01, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0
STEPS = 5
WARMUP, TOTAL = 3, 20


def run(start: list[torch.Tensor], grads: list[list[torch.Tensor]], clip: bool) -> list[dict]:
    params = [torch.nn.Parameter(value.clone()) for value in start]
    optimizer = torch.optim.AdamW(params, **OPTIONS, foreach=False, fused=False)
    steps = []
    for step_grads in grads:
        for param, grad in zip(params, step_grads):
            param.grad = grad.clone()
        step = {}
        if clip:
            step["norm"] = torch.nn.utils.clip_grad_norm_(params, MAX_NORM).item()
            step["clipped_grads"] = [plain(param.grad) for param in params]
        optimizer.step()
        states = [optimizer.state[param] for param in params]
        step["params"] = [plain(param) for param in params]
        step["exp_avg"] = [plain(state["exp_avg"]) for state in states]
        step["exp_avg_sq"] = [plain(state["exp_avg_sq"]) for state in states]
        steps.append(step)
    return steps


def multipliers(schedule) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer)
    values = []
    for _ in range(TOTAL + 1):
        values.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return values


deterministic(7)
start = [exact(5), exact(2, 3)]
# From a norm well above max_norm to one well below it, with an exact zero.
grads = [[exact(5, scale=scale), exact(2, 3, scale=scale)] for scale in (2.0, 0.5, 1.0, 0.125, 0.125)]
for step_grads in grads:
    step_grads[0][2] = 0.0
adamw, clipped = run(start, grads, False), run(start, grads, True)
norms = [step["norm"] for step in clipped]
assert max(norms) > MAX_NORM > min(norms)

write_json(
    GOLDEN / "adamw.json",
    {
        "made_with": MADE_WITH,
        "options": OPTIONS,
        "max_norm": MAX_NORM,
        "params": [plain(value) for value in start],
        "grads": {f"step{index}": [plain(grad) for grad in step_grads] for index, step_grads in enumerate(grads)},
        "adamw": {f"step{index}": step for index, step in enumerate(adamw)},
        "adamw_clipped": {f"step{index}": step for index, step in enumerate(clipped)},
        "warmup_steps": WARMUP,
        "total_steps": TOTAL,
        "schedules": {
            "constant_with_warmup": multipliers(lambda o: get_constant_schedule_with_warmup(o, WARMUP)),
            "linear": multipliers(lambda o: get_linear_schedule_with_warmup(o, WARMUP, TOTAL)),
            "cosine": multipliers(lambda o: get_cosine_schedule_with_warmup(o, WARMUP, TOTAL)),
            "linear_no_warmup": multipliers(lambda o: get_linear_schedule_with_warmup(o, 0, TOTAL)),
        },
    },
)
print("gradient norms", [round(norm, 4) for norm in norms])

"""Makes test/golden/dpo/: three steps of direct preference optimisation on llama-default and its adapter.

    python scripts/golden/dpo.py

The loss is that of the paper (arXiv:2305.18290, eq. 7) with label smoothing, the mean over all pairs of
−(1 − ε)·log σ(z) − ε·log σ(−z), z = β·((log π(chosen) − log π(rejected)) − (log π_ref(chosen) − log π_ref(rejected))),
the reference being the model with the adapter disabled. Each step takes all pairs.

- expected.json: the settings, the pairs, and the loss before each step;
- final.safetensors: the adapter after the last step, by the keys of adapter_model.safetensors.
"""

from common import GOLDEN, MADE_WITH, deterministic, trainable, write_json, write_tensors

import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid
from transformers import LlamaForCausalLM

BETA, SMOOTHING = 0.3, 0.1
OPTIONS = {"lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
STEPS = 3


def answer(prompt: list[int], length: int) -> dict[str, list[int]]:
    ids = torch.randint(3, 64, (length,)).tolist()
    return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}


def pair(prompt_length: int, chosen: int, rejected: int) -> dict[str, dict]:
    prompt = [1, *torch.randint(3, 64, (prompt_length - 1,)).tolist()]
    return {"chosen": answer(prompt, chosen), "rejected": answer(prompt, rejected)}


def log_prob(model: torch.nn.Module, row: dict[str, list[int]]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
    labels = torch.tensor(row["labels"][1:])
    learned = labels != -100
    return logits.log_softmax(-1)[learned].gather(1, labels[learned, None]).sum()


def margins(model: torch.nn.Module, pairs: list[dict]) -> torch.Tensor:
    return torch.stack([log_prob(model, p["chosen"]) - log_prob(model, p["rejected"]) for p in pairs])


deterministic(11)
pairs = [pair(4, 6, 3), pair(2, 1, 7), pair(5, 8, 8), pair(3, 5, 4)]
directory = GOLDEN / "llama-default"
base = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
model = PeftModel.from_pretrained(base, directory / "adapter", is_trainable=True)
with torch.no_grad(), model.disable_adapter():
    reference = margins(model, pairs)

optimizer = torch.optim.AdamW(trainable(model).values(), **OPTIONS, foreach=False, fused=False)
losses = []
for _ in range(STEPS):
    z = BETA * (margins(model, pairs) - reference)
    loss = (-(1 - SMOOTHING) * logsigmoid(z) - SMOOTHING * logsigmoid(-z)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

out = GOLDEN / "dpo"
out.mkdir(exist_ok=True)
settings = {"beta": BETA, "label_smoothing": SMOOTHING, **OPTIONS, "steps": STEPS}
write_json(
    out / "expected.json",
    {
        "made_with": MADE_WITH,
        "settings": settings,
        "pairs": {str(i): p for i, p in enumerate(pairs)},
        "reference_margins": reference.tolist(),
        "losses": losses,
    },
)
write_tensors(out / "final.safetensors", trainable(model))
print("losses", losses)

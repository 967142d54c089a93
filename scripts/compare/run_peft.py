"""The half of `quality.ts` that PEFT and PyTorch compute: the same start, batches, order and learning rates, in f32.

    python scripts/compare/run_peft.py RUN_DIR

RUN_DIR is what `quality.ts` wrote: run.json, bins.jsonl (packed rows), valid.jsonl, init/ (the adapter before the first step) and, where
answers are compared, prompts.jsonl and ours.jsonl. Writes peft.json: losses of all steps, the validation loss after them, of our adapter
too, and the BLEU of both.
"""

import json
import sys
import time
from pathlib import Path

import sacrebleu
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100

directory = Path(sys.argv[1])
run = json.loads((directory / "run.json").read_text())


def lines(name: str) -> list:
    path = directory / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def collate(bins: list[dict]) -> dict[str, torch.Tensor]:
    """Bins side by side: each segment sees itself alone and counts its positions from 0. Targets are shifted here."""
    length = max(len(packed["ids"]) for packed in bins)
    ids = torch.zeros(len(bins), length, dtype=torch.long)
    targets = torch.full((len(bins), length), IGNORED)
    positions = torch.zeros(len(bins), length, dtype=torch.long)
    mask = torch.full((len(bins), 1, length, length), torch.finfo(torch.float32).min)
    for b, packed in enumerate(bins):
        start = 0
        for size in packed["sizes"]:
            end = start + size
            ids[b, start:end] = torch.tensor(packed["ids"][start:end])
            targets[b, start : end - 1] = torch.tensor(packed["labels"][start + 1 : end])
            positions[b, start:end] = torch.arange(size)
            causal = torch.ones(size, size, dtype=torch.bool).tril()
            mask[b, 0, start:end, start:end].masked_fill_(causal, 0)
            start = end
        mask[b, 0, start:, 0] = 0  # padding sees something, and nobody sees padding
    return {"ids": ids, "targets": targets, "positions": positions, "mask": mask}


def loss_sum(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    logits = model(input_ids=batch["ids"], attention_mask=batch["mask"], position_ids=batch["positions"]).logits
    flat = batch["targets"].flatten()
    total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), flat, ignore_index=IGNORED, reduction="sum")
    return total, int((flat != IGNORED).sum())


@torch.no_grad()
def validate(model: torch.nn.Module) -> float:
    model.eval()
    rows, total, count = lines("valid.jsonl"), 0.0, 0
    for at in range(0, len(rows), 16):
        value, tokens = loss_sum(model, collate(rows[at : at + 16]))
        total, count = total + value.item(), count + tokens
    return total / count


@torch.no_grad()
def answers(model: torch.nn.Module) -> list[str]:
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(run["model"])
    texts = []
    for prompt in lines("prompts.jsonl"):
        ids = torch.tensor([prompt["ids"]])
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=run["max_new_tokens"],
            pad_token_id=0,
        )
        texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


def bleu(texts: list[str]) -> float:
    references = [prompt["references"] for prompt in lines("prompts.jsonl")]
    most = max(map(len, references))
    return sacrebleu.corpus_bleu(texts, [[r[i] if i < len(r) else None for r in references] for i in range(most)]).score


torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32, attn_implementation="sdpa")
model = PeftModel.from_pretrained(base, directory / "init", is_trainable=True)
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=run["weight_decay"])
bins, losses, started = lines("bins.jsonl"), [], time.time()
before = validate(model)
model.train()
for step, (chosen, rate) in enumerate(zip(run["order"], run["rates"], strict=True), start=1):
    total, tokens = loss_sum(model, collate([bins[i] for i in chosen]))
    optimizer.zero_grad()
    (total / tokens).backward()
    torch.nn.utils.clip_grad_norm_(parameters, run["max_grad_norm"])
    optimizer.param_groups[0]["lr"] = rate
    optimizer.step()
    losses.append(total.item() / tokens)
    if step % 100 == 0:
        print(f"peft: step {step}, loss {losses[-1]:.4f}, {time.time() - started:.0f} s", flush=True)

result = {"valid_before": before, "valid": validate(model), "losses": losses}
if (directory / "prompts.jsonl").exists():
    result["bleu"] = bleu(answers(model))
    result["bleu_ours"] = bleu(lines("ours.jsonl"))
del model
ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run["model"], dtype=torch.float32), directory / "ours")
result["valid_ours"] = validate(ours)
(directory / "peft.json").write_text(json.dumps(result))

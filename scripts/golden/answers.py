"""Makes test/golden/answers-stories260k.json: transformers' and PEFT's continuations of 20 prompts by stories260K, greedy and by beam search.

    python scripts/golden/answers.py --shared ../shared

`gap_min` is the smallest distance of the two largest logits on the way: where it is tiny, another order of f32 additions may
choose the other token.
"""

import argparse
from pathlib import Path

from common import GOLDEN, MADE_WITH, deterministic, write_json

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = [
    "Once upon a time", "Once", "The", "One day, a little girl named Lily", "Tom and Sam were", "There was a big", "A cat",
    "In the morning", "The sun was", "Mom said,", "He saw a", "She wanted to", "The dog ran", "They went to the park",
    "It was raining", "Ben had a red ball.", "The bird", "I like", "Lily and Ben", "At night, the moon",
]
NEW_TOKENS = 40
BEAMS = [
    {"num_beams": 4},
    {"num_beams": 3, "length_penalty": 0.5, "early_stopping": True},
    {"num_beams": 2, "length_penalty": 0.0, "early_stopping": "never"},
]

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--shared", type=Path, required=True, help="the directory that holds models/stories260K and golden/stories260K-lora")
shared = arguments.parse_args().shared
directory = shared / "models" / "stories260K"

deterministic(0)
tokenizer = AutoTokenizer.from_pretrained(directory)
base = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
# An end of the text that comes often, so that beams end at different lengths.
end = tokenizer.convert_tokens_to_ids(".")


def greedy(model) -> tuple[list[list[int]], float]:
    answers, gap = [], float("inf")
    for ids in prompts:
        result = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        answers.append(result.sequences[0, len(ids) :].tolist())
        top = torch.cat(result.logits).topk(2).values
        gap = min(gap, (top[:, 0] - top[:, 1]).min().item())
    return answers, gap


BY_PARITY = [[id for id in range(base.config.vocab_size) if id % 2 == parity or id == end] for parity in (0, 1)]


def alternating(_, row: torch.Tensor) -> list[int]:
    """Even after odd and odd after even; the end may come anywhere."""
    return BY_PARITY[1 - row[-1].item() % 2]


def beams(settings: dict, eos: int | None, ids: list[int], is_constrained: bool = False) -> dict:
    result = base.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        num_return_sequences=settings["num_beams"],
        return_dict_in_generate=True,
        output_scores=True,
        pad_token_id=0,
        **({"eos_token_id": eos} if eos is not None else {}),
        **({"prefix_allowed_tokens_fn": alternating} if is_constrained else {}),
        **settings,
    )
    rows = [row[len(ids) :].tolist() for row in result.sequences]
    return {"ids": rows, "scores": result.sequences_scores.tolist()}


answers, gap = greedy(base)
searches = [
    {"settings": settings, "eos": eos, "prompt": i, **beams(settings, eos, prompts[i])}
    for settings in BEAMS
    for eos in (None, end)
    for i in range(0, len(prompts), 4)
]
constrained = [
    {"settings": settings, "eos": end, "prompt": i, **beams(settings, end, prompts[i], is_constrained=True)}
    for settings in BEAMS
    for i in range(2, len(prompts), 4)
]
adapted, adapted_gap = greedy(PeftModel.from_pretrained(base, shared / "golden" / "stories260K-lora" / "final").eval())
write_json(
    GOLDEN / "answers-stories260k.json",
    {
        "made_with": MADE_WITH,
        "max_new_tokens": NEW_TOKENS,
        "eos": base.generation_config.eos_token_id,
        "prompts": prompts,
        "greedy": answers,
        "gap_min": gap,
        "adapted": adapted,
        "adapted_gap_min": adapted_gap,
        "beams": {str(i): search for i, search in enumerate(searches)},
        "alternating": {str(i): search for i, search in enumerate(constrained)},
    },
)
print(f"smallest gaps {gap:.6f}, {adapted_gap:.6f}; the end is {end}")

"""Makes test/golden/generate-stories260k.json: transformers' greedy continuation of a prompt by stories260K, in f32.

    python scripts/golden/generate.py --shared ../shared

`gaps` is, per new token, the logit of the chosen token minus the runner-up's: where it is tiny, another order of f32
additions may choose the other token.
"""

import argparse
from pathlib import Path

from common import GOLDEN, MADE_WITH, deterministic, write_json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "Once upon a time"
NEW_TOKENS = 200

arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
arguments.add_argument("--shared", type=Path, required=True, help="the directory that holds models/stories260K")
directory = arguments.parse_args().shared / "models" / "stories260K"

deterministic(0)
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()

prompt_ids = tokenizer(PROMPT, return_tensors="pt").input_ids
result = model.generate(
    prompt_ids,
    attention_mask=torch.ones_like(prompt_ids),
    do_sample=False,
    max_new_tokens=NEW_TOKENS,
    return_dict_in_generate=True,
    output_logits=True,
)
ids = result.sequences[0]
new_ids = ids[prompt_ids.shape[1] :]
top = torch.cat(result.logits).topk(2).values
gaps = (top[:, 0] - top[:, 1]).tolist()

with torch.no_grad():
    whole = model(ids[None]).logits[0, prompt_ids.shape[1] - 1 : -1]
assert torch.equal(whole.argmax(-1), new_ids), "the key/value cache changed the greedy choice"

eos = model.generation_config.eos_token_id
write_json(
    GOLDEN / "generate-stories260k.json",
    {
        "made_with": MADE_WITH,
        "prompt": PROMPT,
        "prompt_ids": prompt_ids[0].tolist(),
        "max_new_tokens": NEW_TOKENS,
        "eos_token_id": eos,
        "stopped_at_eos": new_ids[-1].item() == eos,
        "new_ids": new_ids.tolist(),
        "text": tokenizer.decode(ids, skip_special_tokens=True),
        "new_text": tokenizer.decode(new_ids, skip_special_tokens=True),
        "gap_min": min(gaps),
        "gap_min_at": gaps.index(min(gaps)),
        "gaps": [round(gap, 4) for gap in gaps],
    },
)
print(f"{len(new_ids)} new tokens, smallest top-2 gap {min(gaps):.6f} at new token {gaps.index(min(gaps))}")

"""Writes test/golden/chat/golden.json: chats as transformers renders and masks them.

    python scripts/golden/chat.py ../shared/tokenizers/qwen2.5

The three templates beside it are the project's own; they mark what the assistant says by {% generation %}, so that transformers gives masks.
Of a real template, whose text is not the project's, there are only the SHA-256 of each rendering and the number of ids.
"""

import hashlib
import json
import sys
from pathlib import Path

from common import GOLDEN
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

CHAT = GOLDEN / "chat"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]"]

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells what the sky does over a place & when <it> does \"so\".",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "enum": ["Kraków", "東京"]}, "hours": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}


def say(role: str, content: str, **more) -> dict:
    return {"role": role, "content": content, **more}


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


CASES = {
    "one turn": {"messages": [say("user", "What floats?"), say("assistant", "A cork does.")]},
    "several turns": {
        "messages": [
            say("user", "One?"),
            say("assistant", "Two."),
            say("user", "Three?\nAnd then?"),
            say("assistant", "Four, don't you think?"),
            say("user", "Five?"),
            say("assistant", "Six 🙂 naïve."),
        ]
    },
    "system": {
        "messages": [
            say("system", "Answer like a pirate.\nBe short."),
            say("user", "Where is the ship?"),
            say("assistant", "Arr, sunk."),
            say("user", "And the gold?"),
            say("assistant", "With it."),
        ]
    },
    "spaces around": {"messages": [say("user", "  a \n"), say("assistant", "\n  b\n\n"), say("user", "c"), say("assistant", "d ")]},
    "tools": {
        "messages": [
            say("system", "Use what you have."),
            say("user", "Does it rain in Kraków?"),
            say("assistant", "", tool_calls=[call("weather", place="Kraków", hours=3, exact=True, note=None)]),
            say("tool", '{"rain": false}'),
            say("assistant", "No."),
            say("user", "Thanks"),
            say("assistant", "Any time."),
        ],
        "tools": [WEATHER, CLOCK],
    },
    "for an answer": {
        "messages": [say("user", "One?"), say("assistant", "Two."), say("user", "Three?")],
        "addGenerationPrompt": True,
    },
    "roles out of turn": {"messages": [say("user", "One?"), say("user", "Two?"), say("assistant", "Three.")]},
    "two calls": {
        "messages": [say("user", "When?"), say("assistant", "", tool_calls=[call("clock"), call("clock")])],
        "tools": [CLOCK],
    },
}


def rendered(template: str, case: dict, variables: dict) -> dict:
    try:
        [text], _ = render_jinja_template(
            [case["messages"]],
            tools=case.get("tools"),
            chat_template=template,
            add_generation_prompt=case.get("addGenerationPrompt", False),
            **variables,
        )
    except Exception as error:
        return {"error": str(error)}
    return {"text": text}


def with_mask(tokenizer, template: str, case: dict) -> dict:
    out = rendered(template, case, tokenizer.special_tokens_map)
    if "text" not in out:
        return out
    encoded = tokenizer.apply_chat_template(
        case["messages"],
        tools=case.get("tools"),
        chat_template=template,
        add_generation_prompt=case.get("addGenerationPrompt", False),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return {**out, "ids": encoded["input_ids"], "mask": encoded["assistant_masks"]}


def hashed(tokenizer, case: dict) -> dict:
    out = rendered(tokenizer.chat_template, case, tokenizer.special_tokens_map)
    if "text" not in out:
        return {"refused": True}
    ids = tokenizer.encode(out["text"], add_special_tokens=False)
    return {"sha256": hashlib.sha256(out["text"].encode()).hexdigest(), "ids": len(ids)}


def main() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(GOLDEN.parents[1] / "demo" / "base")
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL], special_tokens=True)
    real = AutoTokenizer.from_pretrained(sys.argv[1])
    out = {
        "special": {text: tokenizer.convert_tokens_to_ids(text) for text in SPECIAL},
        "cases": CASES,
        **{
            name: {case: with_mask(tokenizer, (CHAT / f"{name}.jinja").read_text(), CASES[case]) for case in CASES}
            for name in ["chatml", "headers", "instructions"]
        },
        "real": {case: hashed(real, CASES[case]) for case in CASES},
    }
    path = CHAT / "golden.json"
    lines = [
        f"  {json.dumps(key)}: {{\n" + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n  }"
        for key, value in out.items()
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(path.stat().st_size)


if __name__ == "__main__":
    main()

"""Renders chats by the templates that the installed transformers carries, here and by lowrank, and compares the texts. Exit code 1 on any difference.

    python scripts/golden/check_chat.py

Their texts are not the project's, so they are read where they are and not kept. A case that both refuse counts as equal.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

from chat import CASES, rendered

import transformers

HERE = Path(__file__).resolve().parent
SOURCES = ["models/llama4/processing_llama4.py", "models/qwen2_audio/processing_qwen2_audio.py"]
VARIABLES = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def template_in(source: str) -> str:
    """The longest text of a module that is Jinja over messages."""
    tree = ast.parse((Path(transformers.__file__).parent / source).read_text())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return max((text for text in texts if "{%" in text and "message" in text and "```" not in text), key=len)


asked, wanted = [], []
for source in SOURCES:
    template = template_in(source)
    for name, case in CASES.items():
        asked.append({"template": template, "variables": VARIABLES, "chat": case})
        wanted.append((f"{source}, {name}", rendered(template, case, VARIABLES)))

command = ["node", "--import", "tsx", "--import", "./scripts/wgsl.mjs", str(HERE / "render-chat.ts")]
lines = "".join(json.dumps(one) + "\n" for one in asked)
answers = subprocess.run(command, input=lines, capture_output=True, text=True, check=True, cwd=HERE.parents[1]).stdout
different = 0
for (name, expected), line in zip(wanted, answers.splitlines(), strict=True):
    found = json.loads(line)
    equal = found.get("text") == expected.get("text") if "text" in expected else "error" in found
    different += not equal
    print(f"{'equal' if equal else 'DIFFERENT'}: {name}{'' if 'text' in expected else ' (refused by both)' if equal else ''}")
    if not equal:
        print(f"  transformers: {expected!r}\n  lowrank:      {found!r}")
sys.exit(1 if different else 0)

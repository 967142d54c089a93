# Writes test/golden/wordpiece/: a WordPiece tokenizer as BERT's with a vocabulary made here, and what transformers makes of texts, pairs of
# texts and cut ones (made with 5.17.0).
#   python scripts/golden/wordpiece.py
import json
import tempfile
from pathlib import Path

from common import GOLDEN, MADE_WITH, write_json
from transformers import BertTokenizerFast

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = "the a film was is not good bad very un fun boring plot actor great and but it i loved hated cafe . , ! ' ? 1 2".split()
PIECES = ["##ny", "##s", "##able", "##believ", "##ing", "##ly", "##er", "##1", "##2", "北", "京"]
TEXTS = [
    ("The film was GOOD.", None),
    ("", None),
    ("unbelievable!  Very\tfunny, café plots", None),
    ("xyzzy is it", None),
    ("北京 1212 it's", None),
    ("[MASK] was [SEP] good", None),
    ("The plot was good", "it was not boring at all!"),
    ("a", ""),
    ("Fun.", "i loved the actor and the film, but the plot was bad and boring"),
    ("i loved the actor and the film, but the plot was bad and boring", "Fun ."),
    ("the film was very very very good", "the film was not very very good"),
]
LENGTHS = [5, 8, 9, 14]


def main() -> None:
    folder = GOLDEN / "wordpiece"
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        vocabulary = Path(made) / "vocab.txt"
        vocabulary.write_text("\n".join([*SPECIAL, *WORDS, *PIECES]) + "\n", encoding="utf-8")
        tokenizer = BertTokenizerFast(vocab={w: i for i, w in enumerate([*SPECIAL, *WORDS, *PIECES])}, do_lower_case=True)
        tokenizer.save_pretrained(made)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_text((Path(made) / file).read_text(encoding="utf-8"), encoding="utf-8")
    cases = []
    for text, pair in TEXTS:
        whole = tokenizer(text, pair)
        cut = {}
        for length in LENGTHS:
            short = tokenizer(text, pair, truncation=True, max_length=length)
            cut[length] = {"ids": short["input_ids"], "types": short["token_type_ids"]}
        cases.append({"text": text, "pair": pair, "ids": whole["input_ids"], "types": whole["token_type_ids"], "cut": cut})
    write_json(folder / "expected.json", {"made_with": MADE_WITH, "cases": cases})


if __name__ == "__main__":
    main()

# Writes test/golden/tokenizer-stories260k.json: ids and decoded text from Hugging Face transformers (made with 5.17.0).
#   python scripts/golden/tokenizer.py <model directory>
import json
import sys

from transformers import AutoTokenizer

TEXTS = [
    "", " ", "  ", "\n", "\t\n", "a", " a", "a ", "Once upon a time", " Once upon a time, there was a little girl.",
    "Lily and Tom went to the park.\nThey saw a big dog.", "line one\n\nline two\r\nline three", "two  spaces   three",
    "tabs\tand\ttabs", "trailing space ", "UPPER lower MiXeD", "0123456789 3.14159", "don't can't I'm you've",
    "!?.,;:'\"()[]{}<>/\\|@#$%^&*-_=+`~", "café naïve Ångström", "e\u0301 combining accent", "Привет, мир", "日本語のテキスト",
    "한국어 عربى עברית", "emoji 🙂👍🏽 👨‍👩‍👧‍👦", "zero\u200bwidth\u00a0nbsp", "\ufeffbom", "▁ the sentencepiece space", "null\u0000byte",
    "<s> and </s> in the text", "a</s>b <unk> c", "<s>", " </s> ", "He said, \"Hello!\" and ran away. The end.",
    "name : Blue Spice | Type : coffee shop | area : city centre",
    "a very long word: supercalifragilisticexpialidocious", "repeat " * 40,
]


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    cases = []
    for text in TEXTS:
        ids = tokenizer.encode(text)
        cases.append({
            "text": text,
            "ids": ids,
            "plainIds": tokenizer.encode(text, add_special_tokens=False),
            "decoded": tokenizer.decode(ids, skip_special_tokens=True),
            "decodedWithSpecial": tokenizer.decode(ids, skip_special_tokens=False),
        })
    # Ids that no text encodes to: broken UTF-8, a lone leading space, specials in the middle.
    loose = [[3], [198], [230, 153], [411, 230, 153, 411], [1, 2, 1], [411, 1, 411], [410], [410, 410, 411]]
    decodes = [{"ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)} for ids in loose]
    out = {"vocabSize": len(tokenizer), "bosId": tokenizer.bos_token_id, "eosId": tokenizer.eos_token_id,
           "cases": cases, "decodes": decodes}
    with open("test/golden/tokenizer-stories260k.json", "w", encoding="utf-8") as file:
        json.dump(out, file, ensure_ascii=True, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()

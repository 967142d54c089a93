// What ends an answer, by what the template writes around one.
import { expect, test } from "vitest";
import { CHATML, type ChatTemplate, chatTemplate } from "../../src/io/chat-template.ts";
import { endOfAnswer, isSpecial } from "../../src/io/special-tokens.ts";
import { charactersTokenizer } from "../serve/tokenizers.ts";

const tokenizer = charactersTokenizer();
const endOf = (template: ChatTemplate): string =>
  tokenizer.decode(endOfAnswer(template, tokenizer), { skipSpecialTokens: false });
const TURNS = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content }}";

test.each([
  [CHATML, "<|im_end|>"],
  [`${TURNS} </s>{% endfor %}`, "</s>"],
  [`${TURNS}{{ '\n' }}{% endfor %}`, ""],
  [`${TURNS}. </s>{% endfor %}`, ""],
  ["{{ raise_exception('no answers') }}", ""],
])("%j ends an answer with %j", (template, end) => {
  expect(endOf(chatTemplate(template, "t"))).toBe(end);
});

test("special is what has a text only where such are shown", () => {
  expect([undefined, 65, tokenizer.eosId, tokenizer.bosId, 0x20].map((id) => isSpecial(id, tokenizer))).toEqual([
    false,
    false,
    true,
    true,
    false,
  ]);
});

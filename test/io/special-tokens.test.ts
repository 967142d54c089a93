// What ends an answer, by what the template writes around one.
import { expect, test } from "vitest";
import { CHATML, type ChatTemplate, chatTemplate } from "../../src/io/chat-template.ts";
import { endOfAnswer, isSpecial } from "../../src/io/special-tokens.ts";
import type { Tokenizer } from "../../src/io/tokenizer.ts";

const SPECIAL = ["</s>", "<s>", "<|im_start|>", "<|im_end|>"];
const FIRST = 0x10000;

/** A token per character, and one per special token. */
const tokenizer: Tokenizer = {
  encode: (text) =>
    text
      .split(/(<\/?s>|<\|im_\w+\|>)/)
      .flatMap((part) =>
        SPECIAL.includes(part) ? [FIRST + SPECIAL.indexOf(part)] : Array.from(part, (c) => c.codePointAt(0) as number),
      ),
  decode: (ids, { skipSpecialTokens = true } = {}) =>
    ids
      .map((id) => (id < FIRST ? String.fromCodePoint(id) : skipSpecialTokens ? "" : (SPECIAL[id - FIRST] as string)))
      .join(""),
  ...{ bosId: FIRST + 1, eosId: FIRST, vocabSize: FIRST + SPECIAL.length },
};
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
  expect([undefined, 65, FIRST, FIRST + 3, 0x20].map((id) => isSpecial(id, tokenizer))).toEqual([
    false,
    false,
    true,
    true,
    false,
  ]);
});

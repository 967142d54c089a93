// Text in pieces is the text as a whole, wherever the borders of tokens, characters and stops lie.
import { describe, expect, test } from "vitest";
import { diskDirectory } from "../../src/io/files.ts";
import type { SampledToken } from "../../src/serve/sampling.ts";
import { type TextOptions, type TextPiece, textOf, tokenText } from "../../src/serve/text.ts";
import { Random } from "../../src/tensor/random.ts";
import { loadTokenizer, type Tokenizer } from "../../src/tokenizer.ts";
import { freshSeed } from "../harness.ts";
import { hasShared, shared } from "../shared.ts";
import { bytesTokenizer } from "./tokenizers.ts";

const encoder = new TextEncoder();

async function* tokensOf(ids: readonly number[]): AsyncGenerator<SampledToken, void, undefined> {
  for (const id of ids) yield { id, logprob: -1, top: [] };
}

async function pieces(
  tokenizer: Tokenizer,
  ids: readonly number[],
  options: Partial<TextOptions> = {},
): Promise<TextPiece[]> {
  const all: TextPiece[] = [];
  for await (const piece of textOf(tokensOf(ids), { tokenizer, promptIds: [], room: 1000, ...options }))
    all.push(piece);
  return all;
}

const joined = (all: readonly TextPiece[]): string => all.map(({ text }) => text).join("");

describe("text of single bytes", () => {
  const tokenizer = bytesTokenizer();
  const bytes = (text: string): number[] => [...encoder.encode(text)];

  test("gives a character when its last byte is there", async () => {
    expect((await pieces(tokenizer, bytes("aé😀b"))).map(({ text }) => text)).toEqual(["a", "é", "😀", "b", ""]);
  });

  test("an answer that is whole with its last token was not cut off", async () => {
    const reasonOf = async (isDone: boolean) =>
      (await pieces(tokenizer, bytes("{}"), { room: 2, isDone: () => isDone })).at(-1)?.finishReason;
    expect(await reasonOf(true)).toBe("stop");
    expect(await reasonOf(false)).toBe("length");
  });

  test("gives each token once, with the place in the text where it begins", async () => {
    const tokens = (await pieces(tokenizer, bytes("é😀b"))).flatMap((piece) => piece.tokens);
    expect(tokens.map(({ id, offset, characters }) => [id, offset, characters])).toEqual(
      bytes("é😀b").map((id, i) => [id, [0, 0, 1, 1, 1, 1, 3][i], [0, 0, 1, 1, 1, 1, 2][i]]),
    );
  });

  test("gives U+FFFD for bytes that are no character, and goes on after them", async () => {
    expect(joined(await pieces(tokenizer, [0xff, 0xfe, 0x61, 0xc3, 0x28, ...bytes("ok")]))).toBe(
      "\ufffd\ufffda\ufffd(ok",
    );
    const broken = await pieces(tokenizer, new Array(40).fill(0xff));
    expect(joined(broken)).toBe("\ufffd".repeat(40));
    expect(broken.length, "they come while they are made").toBeGreaterThan(30);
  });

  test("gives U+FFFD for a character that the answer breaks off in", async () => {
    expect(joined(await pieces(tokenizer, [0x61, 0xf0, 0x9f]))).toBe("a\ufffd");
  });

  test("ends before a stop that begins in one token and ends in another", async () => {
    const all = await pieces(tokenizer, bytes("one END two"), { stop: ["END"] });
    expect(joined(all)).toBe("one ");
    expect(all.at(-1)?.finishReason).toBe("stop");
    expect(all.flatMap(({ tokens }) => tokens).length, "no token after the stop is asked for").toBe("one END".length);
  });

  test("holds back what may begin a stop, and no longer than it may", async () => {
    const all = await pieces(tokenizer, bytes("aENxEN"), { stop: ["END"] });
    expect(all.map(({ text }) => text)).toEqual(["a", "ENx", "EN"]);
    const late = await pieces(tokenizer, bytes("aab"), { stop: ["aaa", "ab"] });
    expect(late.map(({ text }) => text)).toEqual(["a"]);
  });

  test("finds a stop of characters of several bytes, and one that an unfinished character ends", async () => {
    expect(joined(await pieces(tokenizer, bytes("x😀é y"), { stop: ["é "] }))).toBe("x😀");
    expect(joined(await pieces(tokenizer, [0x61, 0xf0, 0x9f], { stop: ["\ufffd"] }))).toBe("a");
  });

  test.each([
    ["the answer is as long as it may be", bytes("abc"), 3, "length"],
    ["the answer ends on its own", bytes("abc"), 4, "stop"],
    ["the tokenizer's end of text comes", [...bytes("abc"), 256, ...bytes("d")], 4, "stop"],
  ] as const)("says why it ended: %s", async (_, ids, room, reason) => {
    const all = await pieces(tokenizer, ids, { room });
    expect(joined(all)).toBe("abc");
    expect(all.map(({ finishReason }) => finishReason)).toEqual([...all.slice(1).map(() => undefined), reason]);
  });

  test("keeps a space after tokens without text, where the decoder drops it at the start of a text", async () => {
    const dropping: Tokenizer = {
      ...tokenizer,
      decode: (some, options) => tokenizer.decode(some, options).replace(/^ /, ""),
    };
    const ids = [...bytes("a"), ...new Array<number>(9).fill(257), ...bytes(" b")];
    expect(joined(await pieces(dropping, ids))).toBe("a b");
    const promptIds = [...bytes("a"), ...new Array<number>(9).fill(257)];
    expect(joined(await pieces(dropping, bytes(" b"), { promptIds }))).toBe(" b");
  });

  test("gives the tokens back when it ends early", async () => {
    let isReturned = false;
    async function* endless(): AsyncGenerator<SampledToken, void, undefined> {
      try {
        for (;;) yield { id: 0x61, logprob: 0, top: [] };
      } finally {
        isReturned = true;
      }
    }
    for await (const _ of textOf(endless(), { tokenizer, promptIds: [], stop: ["aaa"], room: 1000 }));
    expect(isReturned).toBe(true);
  });

  test("looks at each token a few times only, however long the answer", async () => {
    let looked = 0;
    const counting: Tokenizer = {
      ...tokenizer,
      decode: (some, options) => {
        looked += some.length;
        return tokenizer.decode(some, options);
      },
    };
    const ids = bytes("some words, é and 😀. ".repeat(100));
    await pieces(counting, ids, { promptIds: bytes("x".repeat(5000)), stop: ["never"] });
    expect(looked / ids.length).toBeLessThan(40);
    for (const silent of [257, 0x80]) {
      looked = 0;
      const prompt = new Array<number>(5000).fill(silent);
      await pieces(counting, prompt, { promptIds: prompt });
      expect(looked / prompt.length, `${silent}`).toBeLessThan(400);
    }
  });
});

const SHARED = ["models/stories260K", "tokenizers/gpt2", "tokenizers/qwen2.5"];

describe("text by the tokenizer of the demo", () => isTheSameInPieces("demo/base"));
describe.skipIf(!hasShared).each(SHARED)("text by the tokenizer of %s (needs ../shared)", (place) =>
  isTheSameInPieces(shared(place)),
);

function isTheSameInPieces(place: string): void {
  test("in pieces is what it is as a whole", async () => {
    const tokenizer = await loadTokenizer(diskDirectory(place));
    const seed = freshSeed();
    const random = new Random(seed);
    const parts = [
      "Hello",
      " world",
      ".",
      "\n\n",
      "  two",
      " é",
      "ß",
      "日本語",
      "😀",
      "👩‍👩‍👧",
      "\t",
      " don't",
      "1234",
      "\u00a0",
    ];
    for (let run = 0; run < 40; run++) {
      const draw = (n: number): string => Array.from({ length: n }, () => parts[random.below(parts.length)]).join("");
      const promptIds = tokenizer.encode(draw(random.below(4)));
      const ids = tokenizer.encode(draw(1 + random.below(20)), { addSpecialTokens: false });
      const whole = tokenizer.decode([...promptIds, ...ids]).slice(tokenizer.decode(promptIds).length);
      expect(joined(await pieces(tokenizer, ids, { promptIds })), `seed ${seed}, run ${run}`).toBe(whole);
    }
  });

  test("has the texts of tokens with their spaces", async () => {
    const tokenizer = await loadTokenizer(diskDirectory(place));
    const ids = tokenizer.encode("Hello world, once upon a time", { addSpecialTokens: false });
    expect(
      ids
        .map((id) => tokenText(tokenizer, id))
        .join("")
        .trimStart(),
    ).toBe("Hello world, once upon a time");
  });
}

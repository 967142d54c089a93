// Answers of tokens that must be JSON: whatever the model would like to say.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { memoryDirectory } from "../../src/io/bytes.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { loadTokenizer, type PairTokenizer, type TokenBytes } from "../../src/io/tokenizer.ts";
import { loadModel } from "../../src/models/load.ts";
import { BatchEngine } from "../../src/serve/batch-engine.ts";
import { constraintOf, jsonConstraint } from "../../src/serve/constraint.ts";
import { generate } from "../../src/serve/generate.ts";
import { Sampler, type SamplingOptions, type TokenConstraint } from "../../src/serve/sampling.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { expectClose, freshSeed, testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";
import { nextOf } from "./next-of.ts";

/** As Llama's: ▁ for a space, bytes for what has no token, a decoder that drops a space at the start. */
function sentencePieces(): Promise<PairTokenizer> {
  const bytes = Array.from({ length: 256 }, (_, i) => `<0x${i.toString(16).toUpperCase().padStart(2, "0")}>`);
  const pieces = [
    "▁",
    "{",
    "}",
    '"',
    ":",
    ",",
    "▁{",
    '{"',
    '":',
    "1",
    "12",
    "true",
    "▁true",
    "é",
    "e",
    "a",
    "▁a",
    "[",
    "]",
    "null",
  ];
  const vocab = Object.fromEntries(["<unk>", "<s>", "</s>", ...bytes, ...pieces].map((token, id) => [token, id]));
  const special = ["<unk>", "<s>", "</s>"].map((content, id) => ({ id, content, special: true }));
  const decoders = [
    { type: "Replace", pattern: { String: "▁" }, content: " " },
    ...[{ type: "ByteFallback" }, { type: "Fuse" }, { type: "Strip", content: " ", start: 1, stop: 0 }],
  ];
  const definition = {
    ...{ version: "1.0", added_tokens: special, normalizer: null, pre_tokenizer: null, post_processor: null },
    decoder: { type: "Sequence", decoders },
    model: { type: "BPE", vocab, merges: [], byte_fallback: true, unk_token: "<unk>" },
  };
  return loadTokenizer(
    memoryDirectory("pieces", {
      "tokenizer.json": JSON.stringify(definition),
      "tokenizer_config.json": JSON.stringify({ eos_token: "</s>", bos_token: "<s>" }),
    }),
  );
}

const tokenizers = {
  "byte-level": () => loadTokenizer(diskDirectory("demo/base")),
  sentencepiece: sentencePieces,
};

const person = {
  type: "object",
  properties: {
    name: { type: "string", maxLength: 6 },
    age: { type: "integer", minimum: 0, maximum: 120 },
    pets: { type: "array", items: { enum: ["cat", "dög 😀"] }, minItems: 1, maxItems: 3 },
    note: { anyOf: [{ type: "null" }, { type: "number" }] },
  },
  required: ["name", "age", "pets"],
  additionalProperties: false,
};

function isPerson(text: string): boolean {
  const { name, age, pets, note = null, ...others } = JSON.parse(text) as Record<string, unknown>;
  const isNamed = typeof name === "string" && [...name].length <= 6;
  const isAged = Number.isInteger(age) && Number(age) >= 0 && Number(age) <= 120;
  const isPet = (pet: unknown): boolean => pet === "cat" || pet === "dög 😀";
  const hasPets = Array.isArray(pets) && pets.length >= 1 && pets.length <= 3 && pets.every(isPet);
  const isNoted = note === null || typeof note === "number";
  return isNamed && isAged && hasPets && isNoted && Object.keys(others).length === 0;
}

/** An answer of so many tokens at most to logits that are drawn at random. */
function answer(
  tokenizer: PairTokenizer,
  constraint: TokenConstraint,
  random: Random,
  options: SamplingOptions = {},
): number[] {
  const sampler = new Sampler([], { seed: random.uint32(), ...options, constraint }, [tokenizer.eosId ?? -1]);
  const ids: number[] = [];
  while (!constraint.isDone && ids.length < 1000) {
    const { id } = nextOf(
      sampler,
      Float32Array.from({ length: tokenizer.vocabSize + 3 }, () => random.normal(0, 2)),
    );
    if (id === tokenizer.eosId) break;
    ids.push(id);
  }
  return ids;
}

describe.each(Object.entries(tokenizers))("%s", (_, load) => {
  let tokenizer: PairTokenizer;
  beforeAll(async () => {
    tokenizer = await load();
  });

  test("the bytes of tokens, one after the other, are their text", () => {
    const random = new Random(freshSeed());
    for (let n = 0; n < 300; n++) {
      const ids = Array.from({ length: 1 + random.below(12) }, () => 3 + random.below(tokenizer.vocabSize - 3));
      const bytes = Uint8Array.from(ids.flatMap((id) => [...(tokenizer.tokenBytes(id) ?? [])]));
      let text: string;
      try {
        text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
      } catch {
        continue;
      }
      expect([text, text.replace(/^ /, "")], `${ids}`).toContain(tokenizer.decode(ids));
    }
    const text = ' {"dög": "😀"}';
    const bytes = tokenizer
      .encode(text, { addSpecialTokens: false })
      .flatMap((id) => [...(tokenizer.tokenBytes(id) ?? [])]);
    expect(new TextDecoder().decode(Uint8Array.from(bytes))).toBe(text);
    expect([tokenizer.tokenBytes(tokenizer.eosId ?? -1), tokenizer.tokenBytes(1e6)]).toEqual([undefined, undefined]);
  });

  test.each([
    ["drawn", { temperature: 2 }],
    ["drawn of a few", { temperature: 2, topK: 5 }],
    ["drawn of a share", { temperature: 1, topP: 0.3 }],
    ["the likeliest", {}],
  ] as const)("30 random answers are JSON that fits: %s", (_name, options) => {
    const seed = freshSeed();
    const random = new Random(seed);
    for (let n = 0; n < 30; n++) {
      const ids = answer(tokenizer, jsonConstraint(person, tokenizer), random, options);
      const text = tokenizer.decode(ids);
      expect(isPerson(text), `${text} (seed ${seed})`).toBe(true);
    }
  });

  test("characters in pieces are followed byte by byte", () => {
    const constraint = jsonConstraint({ const: "é😀" }, tokenizer);
    const bytes = [...new TextEncoder().encode('"é😀"')];
    const idOf = (byte: number): number =>
      Array.from({ length: tokenizer.vocabSize }, (_v, id) => id).find((id) => {
        const own = tokenizer.tokenBytes(id);
        return own?.length === 1 && own[0] === byte;
      }) ?? -1;
    for (const [at, byte] of bytes.entries()) {
      expect(constraint.mayEnd).toBe(false);
      const allowed = Array.from({ length: 256 }, (_b, other) => other).filter((other) =>
        constraint.allows(idOf(other)),
      );
      // At the start a space may be, too.
      expect(
        allowed.filter((other) => !(at === 0 && other === 0x20)),
        `byte ${at}`,
      ).toEqual([byte]);
      constraint.accept(idOf(byte));
    }
    expect([constraint.mayEnd, constraint.isDone]).toEqual([true, true]);
    const wild = jsonConstraint({ type: "string" }, tokenizer);
    wild.accept(idOf(0x22));
    const begins = Array.from({ length: 256 }, (_b, byte) => byte).filter((byte) => wild.allows(idOf(byte)));
    expect(begins).toEqual(
      Array.from({ length: 256 }, (_b, byte) => byte).filter((b) => b >= 0x20 && (b < 0x80 || (b >= 0xc2 && b < 0xf5))),
    );
    wild.accept(idOf(0xed));
    expect([0x7f, 0x80, 0x9f, 0xa0, 0xbf].map((byte) => wild.allows(idOf(byte)))).toEqual([
      false,
      true,
      true,
      false,
      false,
    ]);
  });
});

describe("a vocabulary that is looked through", () => {
  /** Tokens that are these texts; none of them ends a text. */
  const ofTexts = (texts: readonly string[]): TokenBytes => {
    const all = texts.map((text) => new TextEncoder().encode(text));
    return { eosId: undefined, tokenBytes: (id) => all[id] };
  };
  const allowed = (constraint: TokenConstraint, count: number): number[] =>
    Array.from({ length: count }, (_, id) => id).filter((id) => constraint.allows(id));

  test("of 25,000 characters and words that a pattern has many ways to read is no more work than of a few", () => {
    const random = new Random(freshSeed());
    const word = (length: number): string =>
      String.fromCodePoint(...Array.from({ length }, () => 0x4e00 + random.below(0x9fa5 - 0x4e00)));
    const texts = ['"', ...Array.from({ length: 25_000 }, (_, i) => word(1 + (i % 4))), "a", "龥"];
    const constraint = jsonConstraint({ type: "string", pattern: "^(?:[一-龥]?){2000}龥$" }, ofTexts(texts));
    constraint.accept(0);
    for (let n = 0; n < 3; n++) {
      expect(allowed(constraint, texts.length).length).toBe(25_001);
      constraint.accept(1 + random.below(25_000));
    }
  });

  test("by a pattern that takes another turn with each token ends with an error, and other answers go on", () => {
    const texts = [
      '"',
      ...Array.from({ length: 2 ** 14 }, (_, i) =>
        i.toString(2).padStart(14, "0").replaceAll("0", "b").replaceAll("1", "a"),
      ),
    ];
    const constraint = jsonConstraint({ type: "string", pattern: "a.{300}$" }, ofTexts(texts));
    constraint.accept(0);
    const other = constraint.fork();
    expect(() => allowed(constraint, texts.length)).toThrow(
      new ShapeError(
        "constraint: a token must be told from all others by at most 500000 ways to read them, got more. Make alternatives differ earlier, or fewer",
      ),
    );
    // What one token takes is not counted for the next.
    for (let n = 0; n < 14; n++) {
      expect(allowed(other, 20).length).toBe(19);
      other.accept(1000 + n);
    }
  });
});

describe("the sampler", () => {
  /** Allows some ids; may end after three tokens. */
  const among = (...ids: number[]): TokenConstraint & { readonly taken: number[] } => ({
    taken: [],
    allows: (id) => ids.includes(id),
    accept(id) {
      this.taken.push(id);
    },
    get mayEnd() {
      return this.taken.length >= 3;
    },
    isDone: false,
    fork: () => among(...ids),
  });
  const logits = Float32Array.from({ length: 100 }, (_, i) => Math.sin(7 * i) * 2);

  test("draws what is allowed as often as among what is allowed alone", () => {
    const allowed = [3, 50, 51, 90];
    const weights = allowed.map((id) => Math.exp(logits[id] ?? 0));
    const total = weights.reduce((a, b) => a + b, 0);
    const counts = new Map<number, number>();
    const [draws, seed] = [4000, freshSeed()];
    for (let n = 0; n < draws; n++) {
      const { id } = nextOf(new Sampler([], { temperature: 1, seed: seed + n, constraint: among(...allowed) }), logits);
      counts.set(id, (counts.get(id) ?? 0) + 1);
    }
    expect([...counts.keys()].every((id) => allowed.includes(id))).toBe(true);
    for (const [i, id] of allowed.entries()) {
      const p = (weights[i] ?? 0) / total;
      const off = Math.abs((counts.get(id) ?? 0) / draws - p);
      expect(off, `token ${id} (seed ${seed})`).toBeLessThanOrEqual(6 * Math.sqrt((p * (1 - p)) / draws));
    }
  });

  test("of one draw nothing changes where it is allowed, and log-probabilities are the model's own", () => {
    for (let seed = 0; seed < 50; seed++) {
      const free = nextOf(new Sampler([], { temperature: 1, seed }), logits, 2);
      const all = [...logits.keys()];
      expect(nextOf(new Sampler([], { temperature: 1, seed, constraint: among(...all) }), logits, 2)).toEqual(free);
    }
    const total = Math.log(logits.reduce((sum, x) => sum + Math.exp(x), 0));
    const { id, logprob } = nextOf(new Sampler([], { constraint: among(4, 5) }), logits);
    expect(id).toBe((logits[4] ?? 0) > (logits[5] ?? 0) ? 4 : 5);
    expectClose([logprob], [(logits[id] ?? 0) - total], 1e-14);
  });

  test("takes the best of what is allowed where the options leave none of it", () => {
    const values = Float32Array.of(9, 8, 7, 1, 2);
    for (const options of [
      {},
      { temperature: 1, topK: 1 },
      { temperature: 1e-6 },
      { temperature: 1, topP: 0.1 },
      { temperature: 1, minP: 0.9 },
    ])
      expect(nextOf(new Sampler([], { ...options, constraint: among(3, 4) }), values).id).toBe(4);
  });

  test("ends only where the answer may", () => {
    const constraint = among(1);
    const sampler = new Sampler([], { constraint }, [0]);
    expect(Array.from({ length: 4 }, () => nextOf(sampler, Float32Array.of(5, 1)).id)).toEqual([1, 1, 1, 0]);
    expect(constraint.taken).toEqual([1, 1, 1]);
  });

  test.each([{}, { temperature: 1 }, { temperature: 1, topK: 2 }])(
    "says so where nothing is allowed: %j",
    (options) => {
      expect(() => nextOf(new Sampler([], { ...options, constraint: among() }), logits)).toThrow(
        new ShapeError(
          "generate: the constraint must allow a token of the vocabulary, got none that it allows here. Take a model whose tokens can write any text",
        ),
      );
    },
  );
});

describe("a model of random weights", () => {
  let home = "";
  let model: Awaited<ReturnType<typeof loadModel>>;
  let tokenizer: PairTokenizer;
  beforeAll(async () => {
    home = await mkdtemp(join(tmpdir(), "lowrank-constraint-"));
    await writeTinyModel(home, { tokenizer: true, config: { max_position_embeddings: 512 } });
    model = await loadModel(await testGpu(), diskDirectory(home));
    tokenizer = await loadTokenizer(diskDirectory(home));
  });
  afterAll(async () => {
    model.destroy();
    await rm(home, { recursive: true });
  });

  test("answers JSON that fits, many at once, drawn and greedy, each as alone; one that cannot go on ends alone", async () => {
    const promptIds = tokenizer.encode("Once");
    const request = (seed: number): SamplingOptions & { promptIds: number[]; maxTokens: number } => ({
      ...{ promptIds, maxTokens: 400, temperature: seed === 0 ? 0 : 2, seed },
      constraint: jsonConstraint(person, tokenizer),
    });
    const engine = new BatchEngine(model, { cacheTokens: 8192 });
    const idsOf = async (options: ReturnType<typeof request>): Promise<number[]> => {
      const ids: number[] = [];
      for await (const { id } of engine.generate(options)) ids.push(id);
      return ids;
    };
    const stuck: TokenConstraint = {
      ...{ allows: () => false, accept: () => {}, mayEnd: false, isDone: false },
      fork: () => stuck,
    };
    const lost = idsOf({ ...request(1), constraint: stuck }).catch((error: unknown) => error);
    const answers = await Promise.all(Array.from({ length: 30 }, (_, seed) => idsOf(request(seed))));
    expect(await lost).toBeInstanceOf(ShapeError);
    for (const ids of answers) expect(isPerson(tokenizer.decode(ids)), tokenizer.decode(ids)).toBe(true);
    for (const seed of [0, 7]) {
      const alone: number[] = [];
      for await (const id of generate(model, request(seed))) alone.push(id);
      expect(alone).toEqual(answers[seed]);
    }
    await engine.close();
  }, 120_000);

  test("response_format is what OpenAI's API has", () => {
    expect([constraintOf(undefined, tokenizer), constraintOf({ type: "text" }, tokenizer)]).toEqual([
      undefined,
      undefined,
    ]);
    const idsOf = (text: string): number[] => tokenizer.encode(text, { addSpecialTokens: false });
    const isWhole = (format: unknown, text: string): boolean => {
      const constraint = constraintOf(format, tokenizer);
      for (const id of idsOf(text)) {
        if (!constraint?.allows(id)) return false;
        constraint.accept(id);
      }
      return constraint?.mayEnd === true;
    };
    const strict = { type: "json_schema", json_schema: { name: "n", strict: true, schema: { type: "integer" } } };
    expect([isWhole({ type: "json_object" }, '{"a": [1]}'), isWhole({ type: "json_object" }, "[1]")]).toEqual([
      true,
      false,
    ]);
    expect([isWhole(strict, "-12"), isWhole(strict, "1.5")]).toEqual([true, false]);
    for (const [format, message] of [
      [{ type: "xml" }, 'response_format: type must be "text", "json_object" or "json_schema", got "xml"'],
      ["json", 'response_format: type must be "text", "json_object" or "json_schema", got none'],
      [
        { type: "json_schema", json_schema: { name: "n" } },
        "response_format: json_schema must have a schema, got none",
      ],
      [
        { type: "json_schema", json_schema: { schema: { type: "x" } } },
        'json schema: at #: type must be of object, array, string, number, integer, boolean, null, got "x"',
      ],
    ] as const)
      expect(() => constraintOf(format, tokenizer)).toThrow(new ShapeError(message));
  });
});

// Answers of stories260K against transformers' and PEFT's own: greedy and by beam search. scripts/golden/answers.py
import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { diskDirectory } from "../../src/io/files.ts";
import { loadModel } from "../../src/models/load.ts";
import { BatchEngine } from "../../src/serve/batch-engine.ts";
import { beamSearch } from "../../src/serve/beam-search.ts";
import { generate } from "../../src/serve/generate.ts";
import type { TokenConstraint } from "../../src/serve/sampling.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { testGpu } from "../harness.ts";
import { hasShared, shared } from "../shared.ts";

interface Search {
  readonly settings: {
    readonly num_beams: number;
    readonly length_penalty?: number;
    readonly early_stopping?: boolean | "never";
  };
  readonly eos: number | null;
  readonly prompt: number;
  readonly ids: readonly (readonly number[])[];
  readonly scores: readonly number[];
}

const golden = JSON.parse(readFileSync("test/golden/answers-stories260k.json", "utf8")) as {
  readonly max_new_tokens: number;
  readonly eos: number;
  readonly prompts: readonly (readonly number[])[];
  readonly greedy: readonly (readonly number[])[];
  readonly beams: Readonly<Record<string, Search>>;
  readonly alternating: Readonly<Record<string, Search>>;
};

/** Without the end of the text and what fills the row behind it. */
const cut = (ids: readonly number[], eos: number): readonly number[] =>
  ids.includes(eos) ? ids.slice(0, ids.indexOf(eos)) : ids;

test.skipIf(!hasShared)(
  "greedy answers to 20 prompts equal transformers', alone and in one batch (needs ../shared)",
  async () => {
    const model = await loadModel(await testGpu(), diskDirectory(shared("models/stories260K")));
    const engine = new BatchEngine(model);
    const maxTokens = golden.max_new_tokens;
    const answers = golden.prompts.map(async (promptIds) => {
      const ids: number[] = [];
      for await (const { id } of engine.generate({ promptIds, maxTokens })) ids.push(id);
      return ids;
    });
    const expected = golden.greedy.map((ids) => cut(ids, golden.eos));
    expect(await Promise.all(answers)).toEqual(expected);
    for (const [i, promptIds] of golden.prompts.entries()) {
      const ids: number[] = [];
      for await (const id of generate(model, { promptIds, maxTokens })) ids.push(id);
      expect(ids).toEqual(expected[i]);
    }
    await engine.close();
    model.destroy();
  },
);

/** Even after odd and odd after even; the end may come anywhere. */
const alternating = (last: number): TokenConstraint => {
  let parity = last % 2;
  return {
    ...{ mayEnd: true, isDone: false },
    allows: (id) => id % 2 !== parity,
    accept: (id) => {
      parity = id % 2;
    },
    fork: () => alternating(parity),
  };
};

/** Any ids, of which the last has to be even. */
const endingEven = (last: number): TokenConstraint => {
  let mayEnd = last % 2 === 0;
  return {
    ...{ allows: () => true, isDone: false },
    get mayEnd() {
      return mayEnd;
    },
    accept: (id) => {
      mayEnd = id % 2 === 0;
    },
    fork: () => endingEven(mayEnd ? 0 : 1),
  };
};

test.skipIf(!hasShared)("beam search gives transformers' answers and scores (needs ../shared)", async () => {
  const model = await loadModel(await testGpu(), diskDirectory(shared("models/stories260K")));
  const before = model.gpu.counters().bytesLive;
  const constrained = new Set(Object.values(golden.alternating));
  for (const search of [...Object.values(golden.beams), ...constrained]) {
    const { settings, eos, prompt, ids, scores } = search;
    const promptIds = golden.prompts[prompt] ?? [];
    const answers = await beamSearch(model, {
      promptIds,
      constraint: constrained.has(search) ? alternating(promptIds.at(-1) ?? 0) : undefined,
      maxTokens: golden.max_new_tokens,
      beams: settings.num_beams,
      ...(settings.length_penalty !== undefined && { lengthPenalty: settings.length_penalty }),
      ...(settings.early_stopping !== undefined && { earlyStopping: settings.early_stopping }),
      ...(eos !== null && { eosIds: [eos] }),
    });
    const what = JSON.stringify({ settings, eos, prompt });
    expect(
      answers.map((answer) => answer.ids),
      what,
    ).toEqual(ids.map((row) => cut(row, eos ?? golden.eos)));
    answers.forEach(({ score }, i) => {
      expect(Math.abs(score - (scores[i] ?? Number.NaN)), what).toBeLessThanOrEqual(1e-4);
    });
  }
  expect(model.gpu.counters().bytesLive, "the cache is given back").toBe(before);
  model.destroy();
});

test("settings of a beam search that are out of range are refused; no tokens is an empty answer", async () => {
  const model = await loadModel(await testGpu(), diskDirectory("test/golden/llama-default"));
  const refused = (options: object, message: string): Promise<void> =>
    expect(beamSearch(model, { promptIds: [1], maxTokens: 1, ...options })).rejects.toThrow(new ShapeError(message));
  await refused({ beams: 0 }, "beamSearch: beams must be a whole number of at least 1, got 0");
  await refused({ lengthPenalty: Number.NaN }, "beamSearch: lengthPenalty must be a finite number, got NaN");
  await refused({ promptIds: [] }, "generate: the prompt must have at least one token, got none");
  await expect(
    beamSearch(model, { promptIds: [1], maxTokens: 1, signal: AbortSignal.abort(new Error("enough")) }),
  ).rejects.toThrow("enough");
  expect(await beamSearch(model, { promptIds: [1], maxTokens: 0 })).toEqual([{ ids: [], score: 0 }]);
  const stuck: TokenConstraint = {
    ...{ allows: (id) => id < 5, accept: () => void Object.assign(stuck, { allows: () => false }), mayEnd: false },
    ...{ isDone: false, fork: () => stuck },
  };
  await refused(
    { maxTokens: 4, constraint: stuck },
    "generate: the constraint must allow a token of the vocabulary, got none that it allows here. Take a model whose tokens can write any text",
  );
  const search = { promptIds: [1], maxTokens: 3, beams: 6, eosIds: [] };
  const plain = await beamSearch(model, search);
  const whole = plain.filter(({ ids }) => (ids.at(-1) ?? 0) % 2 === 0);
  expect([0, plain.length]).not.toContain(whole.length);
  expect(await beamSearch(model, { ...search, constraint: endingEven(0) }), "none that is cut off").toEqual(whole);
  const never = { ...endingEven(0), mayEnd: false, fork: () => never };
  expect(await beamSearch(model, { ...search, constraint: never }), "all are").toEqual(plain);
  model.destroy();
});

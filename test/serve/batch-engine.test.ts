// Generation for many: what each gets is what it would get alone, whoever else is there.
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { diskDirectory } from "../../src/io/files.ts";
import { loadModel } from "../../src/models/load.ts";
import { BatchEngine, type EngineOptions, engineCacheBytes } from "../../src/serve/batch-engine.ts";
import type { GenerationRequest } from "../../src/serve/engine-types.ts";
import { QueueFull } from "../../src/serve/errors.ts";
import { generate, generateTokens } from "../../src/serve/generate.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";

type Model = Awaited<ReturnType<typeof loadModel>>;
let model: Model;
beforeAll(async () => {
  model = await loadModel(await testGpu(), diskDirectory("test/golden/llama-default"));
});
afterAll(() => model.destroy());

async function withEngine<T>(
  options: EngineOptions,
  run: (engine: BatchEngine) => Promise<T>,
  on: Model = model,
): Promise<T> {
  const before = model.gpu.counters();
  const engine = new BatchEngine(on, options);
  try {
    return await run(engine);
  } finally {
    await engine.close();
    expect(engine.stats()).toMatchObject({ running: 0, waiting: 0, kvPagesUsed: 0 });
    expect(model.gpu.counters().buffersLive, "all is given back").toBe(before.buffersLive);
    expect(model.gpu.counters().bytesLive).toBe(before.bytesLive);
  }
}

async function idsOf(engine: BatchEngine, request: GenerationRequest): Promise<number[]> {
  const ids: number[] = [];
  for await (const { id } of engine.generate(request)) ids.push(id);
  return ids;
}

async function alone(request: GenerationRequest): Promise<number[]> {
  const ids: number[] = [];
  for await (const id of generate(model, request)) ids.push(id);
  return ids;
}

/** Asks all at once, expects of each what it has alone, and gives the steps after which they started. */
async function answeredTogether(engine: BatchEngine, requests: readonly GenerationRequest[]): Promise<number[]> {
  const expected: number[][] = [];
  for (const request of requests) expected.push(await alone(request));
  const starts: number[] = [];
  const onStart = (): void => void starts.push(engine.stats().steps);
  expect(await Promise.all(requests.map((request) => idsOf(engine, { ...request, onStart })))).toEqual(expected);
  return starts;
}

const random = new Random(5);
const promptOf = (length: number): number[] => Array.from({ length }, () => random.below(model.config.vocabSize));

/** The answer goes on to its last token. */
const noEnd = (): Map<number, number> => new Map(model.config.eosIds.map((id) => [id, -1e9]));

describe("many at once", () => {
  test("each greedy answer is the one it has alone, with pages and chunks of any size", async () => {
    const requests = [1, 2, 7, 16, 17, 31, 40, 5, 3, 12].map((length) => ({
      promptIds: promptOf(length),
      maxTokens: 1 + random.below(20),
    }));
    const expected: number[][] = [];
    for (const request of requests) expected.push(await alone(request));
    for (const options of [
      {},
      { pageTokens: 1, maxRows: 3, maxStepTokens: 5 },
      { pageTokens: 4, maxRows: 10, maxStepTokens: 11, cacheTokens: 120 },
    ])
      await withEngine(options, async (engine) => {
        expect(await Promise.all(requests.map((request) => idsOf(engine, request)))).toEqual(expected);
        // Again, with what was kept of the prompts.
        expect(await Promise.all(requests.map((request) => idsOf(engine, request)))).toEqual(expected);
      });
  });

  test("drawn answers and log-probabilities are those of the request alone", async () => {
    const request = { promptIds: promptOf(6), maxTokens: 12, temperature: 0.9, topK: 9, seed: 7, logprobs: 3 };
    const expected: unknown[] = [];
    for await (const token of generateTokens(model, request))
      expected.push(
        token.id,
        token.top.map(({ id }) => id),
      );
    await withEngine({}, async (engine) => {
      const others = Array.from({ length: 5 }, () => idsOf(engine, { promptIds: promptOf(9), maxTokens: 15 }));
      const found: unknown[] = [];
      for await (const token of engine.generate(request))
        found.push(
          token.id,
          token.top.map(({ id }) => id),
        );
      await Promise.all(others);
      expect(found).toEqual(expected);
    });
  });

  test("in f16 a cache has half the bytes and the first tokens are the same", async () => {
    const request = { promptIds: promptOf(20), maxTokens: 4 };
    const expected = await alone(request);
    const bytes: number[] = [];
    for (const cacheFormat of ["f32", "f16"] as const)
      await withEngine({ cacheFormat }, async (engine) => {
        bytes.push(model.gpu.counters().bytesLive);
        expect(await idsOf(engine, request)).toEqual(expected);
      });
    const { layers, kvHeads, headDim, contextLength } = model.config;
    expect((bytes[0] ?? 0) - (bytes[1] ?? 0)).toBe(2 * layers * kvHeads * headDim * 2 * 4 * contextLength);
  });

  test("an answer ends at ids of its own request too, and they are not given", async () => {
    const request = { promptIds: promptOf(6), maxTokens: 20, logitBias: noEnd() };
    const expected = await alone(request);
    const end = expected.findIndex((id, i) => i > 2 && !expected.slice(0, i).includes(id));
    expect(end).toBeGreaterThan(2);
    await withEngine({}, async (engine) => {
      const [own, other] = await Promise.all([
        idsOf(engine, { ...request, endIds: [expected[end] as number] }),
        idsOf(engine, request),
      ]);
      expect(own).toEqual(expected.slice(0, end));
      expect(other).toEqual(expected);
    });
  });

  test("requests join while others are answered, and leave", async () => {
    await withEngine({ maxRows: 4 }, async (engine) => {
      const first = engine.generate({ promptIds: promptOf(4), maxTokens: 30, logitBias: noEnd() });
      await first.next();
      const second = engine.generate({ promptIds: promptOf(4), maxTokens: 2, logitBias: noEnd() });
      let between = 0;
      const done = (async () => {
        for await (const _ of second) between++;
      })();
      let rest = 1;
      for await (const _ of first) {
        rest++;
        if (between === 2) expect(engine.stats().running).toBeLessThanOrEqual(1);
      }
      await done;
      expect([between, rest]).toEqual([2, 30]);
      expect(engine.stats().steps).toBeLessThan(34);
    });
  });
});

describe("memory", () => {
  test("a prompt that begins as one before is not computed again", async () => {
    await withEngine({ pageTokens: 4 }, async (engine) => {
      const system = promptOf(33);
      const ask = (end: number): Promise<number[]> => idsOf(engine, { promptIds: [...system, end], maxTokens: 3 });
      const first = await ask(5);
      expect(engine.stats()).toMatchObject({ promptTokens: 34, cachedPromptTokens: 0 });
      await ask(6);
      expect(engine.stats()).toMatchObject({ promptTokens: 68, cachedPromptTokens: 32 });
      expect(await ask(5)).toEqual(first);
    });
  });

  test("of prompts that come together what they share is computed once, and none waits for what it does not share", async () => {
    await withEngine({ pageTokens: 4, maxStepTokens: 8, maxRows: 8 }, async (engine) => {
      const system = promptOf(17);
      const requests = [20, 1, 2, 3].map((length) => ({ promptIds: [...system, ...promptOf(length)], maxTokens: 3 }));
      const starts = await answeredTogether(engine, requests);
      expect(starts, "the others start after the step that ends the shared pages").toEqual([0, 2, 2, 2]);
      expect(engine.stats().cachedPromptTokens).toBe(3 * 16);
    });
  });

  test("those who wait for a prompt go on from where its own request left", async () => {
    await withEngine({ pageTokens: 4, maxStepTokens: 8, maxRows: 8 }, async (engine) => {
      const request = { promptIds: promptOf(30), maxTokens: 5 };
      const leave = new AbortController();
      const first = idsOf(engine, { ...request, signal: leave.signal });
      const others = [0, 1].map(() => idsOf(engine, request));
      while (engine.stats().steps < 1) await new Promise((done) => setTimeout(done));
      expect(engine.stats()).toMatchObject({ running: 1, waiting: 2 });
      leave.abort();
      expect(await first).toEqual([]);
      const expected = await alone(request);
      expect(await Promise.all(others)).toEqual([expected, expected]);
      expect(engine.stats().cachedPromptTokens, "8 of the one who left, then 28 of the next").toBe(8 + 28);
    });
  });

  test("a request waits until pages are free, and what can never fit is refused", async () => {
    await withEngine({ pageTokens: 4, cacheTokens: 24, contextLength: 40 }, async (engine) => {
      const all = [0, 1, 2].map(() => idsOf(engine, { promptIds: promptOf(10), maxTokens: 8, logitBias: noEnd() }));
      expect(engine.stats().waiting).toBe(3);
      await new Promise((done) => setTimeout(done));
      expect(engine.stats()).toMatchObject({ running: 1, waiting: 2, kvPagesUsed: 5 });
      expect((await Promise.all(all)).map(({ length }) => length)).toEqual([8, 8, 8]);
      expect(() => engine.generate({ promptIds: promptOf(20), maxTokens: 10 })).toThrow(
        new ShapeError(
          "generate: prompt and answer must fit into the cache of 24 tokens, got 30. Ask for fewer, or give the engine more cacheTokens",
        ),
      );
    });
  });

  test("requests that may become long are answered together; where room ends the youngest make way, and lose nothing", async () => {
    await withEngine({ pageTokens: 4, cacheTokens: 128, maxRows: 8 }, async (engine) => {
      const requests = Array.from({ length: 8 }, (_, seed) => ({
        ...{ promptIds: promptOf(5), maxTokens: 59, logitBias: noEnd(), seed, temperature: seed % 2 },
      }));
      const starts = await answeredTogether(engine, requests);
      expect(
        starts.filter((step) => step === 0),
        "of 32 pages 6 for each, of 16 that it may need",
      ).toHaveLength(5);
      expect(starts).toHaveLength(8);
      const { preemptions, promptTokens } = engine.stats();
      expect(preemptions).toBeGreaterThan(3);
      expect(promptTokens, "each prompt counts once").toBe(40);
    });
  });

  test("one that made way may leave", async () => {
    await withEngine({ pageTokens: 4, cacheTokens: 64, maxRows: 2 }, async (engine) => {
      const leave = new AbortController();
      const request = { promptIds: promptOf(5), maxTokens: 59, logitBias: noEnd() };
      const first = idsOf(engine, request);
      const second = idsOf(engine, { ...request, promptIds: promptOf(6), signal: leave.signal });
      while (engine.stats().preemptions === 0) await new Promise((done) => setTimeout(done));
      expect(engine.stats()).toMatchObject({ running: 1, waiting: 1 });
      leave.abort();
      expect(engine.stats()).toMatchObject({ running: 1, waiting: 0 });
      expect((await second).length).toBeGreaterThan(0);
      expect(await first).toEqual(await alone(request));
    });
  });

  test("a context that is not given is no longer than the cache", async () => {
    await withEngine({ cacheTokens: 48 }, async (engine) => expect(engine.contextLength).toBe(48));
    await withEngine({ cacheTokens: 480 }, async (engine) => expect(engine.contextLength).toBe(64));
    for (const [contextLength, cacheTokens] of [
      [1000, 4000],
      [10_000, 16_384],
      [40_000, 40_000],
    ] as const) {
      const long = { config: { ...model.config, contextLength } };
      expect(engineCacheBytes(long)).toBe(engineCacheBytes(long, { cacheTokens }));
    }
  });

  test("old prefixes make way, and answers stay right", async () => {
    await withEngine({ pageTokens: 2, cacheTokens: 48 }, async (engine) => {
      for (let i = 0; i < 12; i++) {
        const request = { promptIds: promptOf(17), maxTokens: 5 };
        expect(await idsOf(engine, request)).toEqual(await alone(request));
      }
    });
  });

  test("a large request that small ones pass gets its turn", async () => {
    await withEngine({ pageTokens: 4, cacheTokens: 40, maxRows: 4 }, async (engine) => {
      const order: string[] = [];
      const ask = async (name: string, tokens: number): Promise<void> => {
        await idsOf(engine, { promptIds: promptOf(2), maxTokens: tokens, logitBias: noEnd() });
        order.push(name);
      };
      // Three that end at different steps: at any time one of them holds pages that the large one lacks.
      const small = async (first: number): Promise<void> => {
        for (let i = 0; i < 50; i++) await ask("small", i === 0 ? first : 5);
      };
      const all = [small(1), small(3), small(5)];
      await new Promise((done) => setTimeout(done, 1));
      await Promise.all([...all, ask("large", 37)]);
      expect(order.length).toBe(151);
      expect(order.indexOf("large")).toBeLessThan(140);
    });
  });

  test("a failing step ends all who are there with its error, and those who come later", async () => {
    const failing = Object.create(model) as Model;
    let passes = 0;
    failing.pagedLogits = (...given) => {
      if (++passes > 1) throw new Error("the device is lost");
      return model.pagedLogits(...given);
    };
    const before = model.gpu.counters().bytesLive;
    const engine = new BatchEngine(failing, { maxRows: 1 });
    const both = [0, 1].map(() => idsOf(engine, { promptIds: promptOf(3), maxTokens: 3 }));
    expect(engine.failure).toBeUndefined();
    for (const one of both) await expect(one).rejects.toThrow("the device is lost");
    expect(engine.failure).toEqual(new Error("the device is lost"));
    expect(() => engine.generate({ promptIds: [1], maxTokens: 1 })).toThrow("the device is lost");
    expect(engine.stats()).toMatchObject({ running: 0, waiting: 0, kvPagesUsed: 0 });
    await engine.close();
    expect(model.gpu.counters().bytesLive).toBe(before);
  });

  test("who leaves early frees everything at once, waiting or running", async () => {
    await withEngine({ maxRows: 1, maxStepTokens: 8 }, async (engine) => {
      const stop = new AbortController();
      const running = engine.generate({
        promptIds: promptOf(5),
        maxTokens: 40,
        logitBias: noEnd(),
        signal: stop.signal,
      });
      const waiting = engine.generate({ promptIds: promptOf(5), maxTokens: 40, logitBias: noEnd() });
      await running.next();
      expect(engine.stats()).toMatchObject({ running: 1, waiting: 1 });
      await waiting.return();
      expect(engine.stats()).toMatchObject({ running: 1, waiting: 0 });
      stop.abort();
      expect(engine.stats()).toMatchObject({ running: 0, waiting: 0, kvPagesUsed: 0 });
      let rest = 0;
      for await (const _ of running) rest++;
      expect(rest, "what was sampled before it left").toBeLessThanOrEqual(1);
    });
  });
});

describe("with more words than the likeliest that are listed", () => {
  let home = "";
  let wide: Model;
  beforeAll(async () => {
    home = await mkdtemp(join(tmpdir(), "lowrank-choices-"));
    await writeTinyModel(home, { config: { vocab_size: 300 } });
    wide = await loadModel(await testGpu(), diskDirectory(home));
  });
  afterAll(async () => {
    wide.destroy();
    await rm(home, { recursive: true });
  });

  test("the device's choices give the answers of the host's; a step reads once, and once more for all whose rows are needed", async () => {
    const all = [
      {},
      { temperature: 0.8 },
      { temperature: 1, topK: 7 },
      { temperature: 2, topP: 0.999 },
      { temperature: 2, minP: 1e-9 },
      { temperature: 1, presencePenalty: 0.5 },
      { temperature: 1, frequencyPenalty: -0.5 },
    ].map((options, seed) => ({
      ...{ promptIds: [5, 100, 250, 7, 31], maxTokens: 10, seed, logprobs: 2 },
      ...options,
    }));
    const answersOf = (choices: "device" | "host", requests: readonly GenerationRequest[]) =>
      withEngine(
        { choices },
        async (engine) => {
          const before = wide.gpu.counters().readbacks;
          const answers = await Promise.all(requests.map((request) => idsOf(engine, request)));
          return { answers, reads: wide.gpu.counters().readbacks - before, steps: engine.stats().steps };
        },
        wide,
      );
    const found = await answersOf("device", all);
    expect(found.answers).toEqual((await answersOf("host", all)).answers);
    expect(found.reads).toBeGreaterThan(found.steps);
    expect(found.reads).toBeLessThanOrEqual(2 * found.steps);
    for (const requests of [all.slice(0, 1), all.slice(2, 3), all.slice(5)]) {
      const { reads, steps } = await answersOf("device", requests);
      expect(reads, "what is known up front comes with the choices").toBe(steps);
    }
  });

  test("one that is dropped while its row is read ends, and those beside it go on", async () => {
    const request = { promptIds: [5, 100, 250, 7, 31], maxTokens: 6, temperature: 2, topP: 0.9999, seed: 3 };
    const rowBytes = 4 * wide.config.vocabSize;
    await withEngine(
      { choices: "device" },
      async (engine) => {
        const expected = await idsOf(engine, request);
        const controller = new AbortController();
        const own = wide.gpu.read.bind(wide.gpu);
        let rows = 0;
        const spy = vi.spyOn(wide.gpu, "read").mockImplementation((sources) => {
          if (sources[0]?.sizeBytes !== rowBytes) return own(sources);
          rows += sources.length;
          const reading = own(sources);
          if (rows > 2) controller.abort();
          return reading;
        });
        const dropped = idsOf(engine, { ...request, signal: controller.signal });
        expect(await idsOf(engine, request)).toEqual(expected);
        expect((await dropped).length).toBeLessThan(expected.length);
        spy.mockRestore();
      },
      wide,
    );
  });
});

test("requests that cannot be are refused with the rule and the value", async () => {
  await withEngine({ maxRows: 1, maxWaiting: 1, contextLength: 32 }, async (engine) => {
    const refused = (request: Partial<GenerationRequest>, message: string): void =>
      expect(() => engine.generate({ promptIds: [1], maxTokens: 1, ...request })).toThrow(new ShapeError(message));
    refused({ promptIds: [] }, "generate: the prompt must have at least one token, got none");
    refused({ promptIds: promptOf(32) }, "generate: the prompt must be shorter than the context of 32 tokens, got 32");
    refused({ promptIds: [-1] }, `generate: ids must be in [0, ${model.config.vocabSize}), got -1`);
    refused({ maxTokens: -1 }, "generate: maxTokens must be a whole number of at least 0, got -1");
    refused({ adapter: "x" }, 'generate: the adapter must be one of none, got "x"');
    refused({ temperature: -1 }, "generate: temperature must be a number of at least 0, got -1");
    const both = [1, 2].map((id) => idsOf(engine, { promptIds: [id], maxTokens: 1 }));
    expect(() => engine.generate({ promptIds: [1], maxTokens: 1 })).toThrow(
      new QueueFull("generate: at most 1 requests may wait, got one more. Try again later"),
    );
    await Promise.all(both);
    expect(await idsOf(engine, { promptIds: [1], maxTokens: 0 })).toEqual([]);
  });
  expect(() => new BatchEngine(model, { maxRows: 9, maxStepTokens: 8 })).toThrow(
    new ShapeError("BatchEngine: maxStepTokens must be at least maxRows = 9, got 8: each row takes a token of a step"),
  );
  expect(() => new BatchEngine(model, { pageTokens: 3 })).toThrow(
    new ShapeError("cache: pageTokens must be a power of two, got 3"),
  );
  const closed = new BatchEngine(model);
  await closed.close();
  expect(() => closed.generate({ promptIds: [1], maxTokens: 1 })).toThrow(
    new ShapeError("generate: the engine must be open, got one that was closed"),
  );
});

test.each(["gemma2", "gemma3", "gpt2", "granite", "mistral", "olmo2", "phi3", "qwen2-window", "qwen3", "smollm3"])(
  "a %s in pages gives what it gives alone",
  async (name) => {
    const other = await loadModel(await testGpu(), diskDirectory(`test/golden/models/${name}`));
    const engine = new BatchEngine(other, { pageTokens: 4, maxStepTokens: 40 });
    const requests = [3, 20, 33].map((length) => ({
      promptIds: Array.from({ length }, () => random.below(other.config.vocabSize)),
      maxTokens: 8,
    }));
    const found = await Promise.all(requests.map((request) => idsOf(engine, request)));
    for (const [i, request] of requests.entries()) {
      const ids: number[] = [];
      for await (const id of generate(other, request)) ids.push(id);
      expect(found[i]).toEqual(ids);
    }
    await engine.close();
    other.destroy();
  },
);

test("angles that change as a sequence grows are refused, and taken where the context is short", async () => {
  const other = await loadModel(await testGpu(), diskDirectory("test/golden/models/llama-dynamic"));
  const ask = async (contextLength: number): Promise<number[]> => {
    const engine = new BatchEngine(other, { contextLength });
    try {
      return await idsOf(engine, { promptIds: [1, 2, 3], maxTokens: 4 });
    } finally {
      await engine.close();
    }
  };
  const before = other.gpu.counters().bytesLive;
  expect(() => new BatchEngine(other)).toThrow(
    new ShapeError(
      'hidden: angles of "dynamic" RoPE change as a sequence grows past 16 tokens, which pages do not follow, got a context of 32. Limit it to 16',
    ),
  );
  expect(other.gpu.counters().bytesLive, "nothing is left of it").toBe(before);
  const ids: number[] = [];
  for await (const id of generate(other, { promptIds: [1, 2, 3], maxTokens: 4 })) ids.push(id);
  expect(await ask(16)).toEqual(ids);
  other.destroy();
});

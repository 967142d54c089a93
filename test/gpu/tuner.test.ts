import { mkdtempSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test, vi } from "vitest";
import { GpuError } from "../../src/gpu/errors.ts";
import { openGpu } from "../../src/gpu/gpu.ts";
import { defaultTuneStore, type TuneStore } from "../../src/gpu/tuner.ts";
import { scale } from "../../src/kernels/axpy.ts";
import { matmul } from "../../src/kernels/matmul.ts";
import { plans } from "../../src/kernels/matmul-plans.ts";
import { empty, read, tensor } from "../../src/tensor/tensor.ts";

/** A store in memory, and what it holds. */
function memory(text?: string): TuneStore & { text: string | undefined } {
  const store = {
    text,
    load: () => store.text,
    save: (saved: string) => {
      store.text = saved;
    },
  };
  return store;
}

/** "slow" does the work of "fast" many times over. */
async function openWith(store: TuneStore, tune: "auto" | "off" = "auto") {
  const gpu = await openGpu({ tune, tuneStore: store });
  let trials = 0;
  const choose = (): string | undefined =>
    gpu.tuner.choose("sum", () => ({
      candidates: [{ name: "slow" }, { name: "fast" }],
      trial: () => {
        const x = empty(gpu, [100_000], "x");
        trials++;
        return {
          run: ({ name }) => {
            for (let i = 0; i < (name === "slow" ? 40 : 1); i++) gpu.release(scale(x, 2));
          },
          done: () => gpu.release(x),
        };
      },
    }))?.name;
  return { gpu, choose, trials: () => trials };
}

test("the fastest candidate is chosen once tuned, and found again by the next process", async () => {
  const store = memory();
  const first = await openWith(store);
  expect(first.choose()).toBeUndefined();
  const live = first.gpu.counters().buffersLive;
  const [tuning, ...more] = await first.gpu.tuner.tune(() => first.choose());
  expect(more).toEqual([]);
  expect(tuning).toMatchObject({ key: "sum", chosen: "fast" });
  expect(Object.keys(tuning?.timesMs ?? {})).toEqual(["slow", "fast"]);
  expect(first.choose()).toBe("fast");
  expect(await first.gpu.tuner.tune(() => first.choose())).toEqual([]);
  expect(first.trials()).toBe(1);
  expect(first.gpu.counters().buffersLive).toBe(live);
  first.gpu.destroy();

  const second = await openWith(store);
  expect(second.choose()).toBe("fast");
  expect(second.trials()).toBe(0);
  second.gpu.destroy();
});

test("what was decided is remembered until something is tuned", async () => {
  const { gpu, choose } = await openWith(memory());
  let asked = 0;
  const decide = (): string =>
    gpu.tuner.remember("decision", () => {
      asked++;
      return choose() ?? "default";
    });
  expect([decide(), decide(), asked]).toEqual(["default", "default", 1]);
  await gpu.tuner.tune(decide);
  expect([decide(), decide(), asked]).toEqual(["fast", "fast", 3]);
  gpu.destroy();
});

test("with tune off nothing is timed, chosen or stored", async () => {
  const store = memory();
  const before = await openWith(store);
  await before.gpu.tuner.tune(() => before.choose());
  const saved = store.text;
  const { gpu, choose, trials } = await openWith(store, "off");
  expect(choose()).toBeUndefined();
  expect(await gpu.tuner.tune(() => choose())).toEqual([]);
  expect(trials()).toBe(0);
  expect(store.text).toBe(saved);
});

test.each(["{ not json", "null", '{"other adapter": {"sum": "fast"}}'])(
  "a store that says %s is as good as empty",
  async (text) => {
    const store = memory(text);
    const { gpu, choose } = await openWith(store);
    expect(choose()).toBeUndefined();
    await gpu.tuner.tune(() => choose());
    expect(choose()).toBe("fast");
    if (text.includes("other")) expect(JSON.parse(store.text ?? "")).toHaveProperty(["other adapter", "sum"], "fast");
  },
);

test("a product takes the plan that was stored for its class, and its result stays right", async () => {
  const store = memory();
  const gpu = await openGpu({ tune: "auto", tuneStore: store });
  const product = { layout: "nn", M: 2, N: 2, K: 2, R: 0, batch: 1, format: "f32" } as const;
  expect(plans(gpu, product).length).toBeGreaterThan(2);
  const [x, w] = [tensor(gpu, [1, 2, 3, 4], [2, 2]), tensor(gpu, [5, 6, 7, 8], [2, 2])];
  const [tuning] = await gpu.tuner.tune(() => matmul(x, w));
  expect(tuning?.key).toBe("matmul nn f32 2×2×2");
  expect(plans(gpu, product).map(({ name }) => name)).toContain(tuning?.chosen);
  expect([...(await read(matmul(x, w)))]).toEqual([19, 22, 43, 50]);
});

test("in Node choices are kept in a file, and one that cannot be written is named", () => {
  const directory = mkdtempSync(join(tmpdir(), "lowrank-tune-"));
  try {
    vi.stubEnv("LOWRANK_CACHE", join(directory, "cache"));
    const store = defaultTuneStore();
    expect(store?.load()).toBeUndefined();
    store?.save("{}");
    expect(readdirSync(join(directory, "cache"))).toEqual(["tune.json"]);
    expect(store?.load()).toBe("{}");

    writeFileSync(join(directory, "file"), "");
    vi.stubEnv("LOWRANK_CACHE", join(directory, "file"));
    const file = join(directory, "file", "tune.json");
    expect(() => defaultTuneStore()?.save("{}")).toThrow(
      new GpuError(
        `tune: what was tuned must be kept in ${file}, got EEXIST: file already exists, mkdir '${join(directory, "file")}'. Set LOWRANK_CACHE to a directory`,
      ),
    );
  } finally {
    vi.unstubAllEnvs();
    rmSync(directory, { recursive: true });
  }
});

test("any other word for tune is refused", async () => {
  await expect(openGpu({ tune: "on" as never })).rejects.toEqual(
    new GpuError('openGpu: tune (or LOWRANK_TUNE) must be auto or off, got "on"'),
  );
});

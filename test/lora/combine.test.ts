/** Adapters out of adapters, against PEFT's: scripts/golden/adapters.py made two and what becomes of them. */
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { decodeFloats } from "../../src/io/dtype.ts";
import { diskDirectory, fileSource } from "../../src/io/files.ts";
import { openSafetensors } from "../../src/io/safetensors.ts";
import { readAdapter } from "../../src/lora/adapter-file.ts";
import { type Combination, type CombineOptions, combineAdapters } from "../../src/lora/combine.ts";
import { settingsOf } from "../../src/lora/config.ts";
import type { PlainAdapter } from "../../src/lora/plain-adapter.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { matrix, multiply } from "../../src/tensor/linalg.ts";
import { lowrank } from "../cli/run.ts";
import { expectClose } from "../harness.ts";

const GOLDEN = "test/golden/adapters/combined";
const WEIGHTS = [0.7, -0.4];
const read = (name: string): Promise<PlainAdapter> => readAdapter(diskDirectory(`test/golden/adapters/${name}`));
const both = async () => {
  const [a, b] = [await read("combined/a"), await read("combined/b")];
  return [a, b].map((adapter, i) => ({ adapter, weight: WEIGHTS[i] ?? 0 }));
};

/** s·B·A of a module. */
function update(adapter: PlainAdapter, name: string): Float64Array {
  const { A, B } = adapter.modules.get(name) ?? expect.fail(name);
  const { scale } = settingsOf(adapter.config, name);
  const of = ({ rows, columns, values }: { rows: number; columns: number; values: Float32Array }) =>
    matrix(rows, columns, values);
  return multiply(of(B), of(A)).data.map((v) => scale * v);
}

const METHODS: readonly (CombineOptions & { readonly r: number })[] = [
  { method: "cat", r: 8 },
  { method: "svd", rank: 3, r: 3 },
  { method: "linear", r: 4 },
  { method: "ties", density: 0.5, r: 4 },
  { method: "magnitude_prune", density: 0.3, r: 4 },
];

test.each(METHODS)("$method gives the update that PEFT's gives", async ({ r, ...options }) => {
  const combined = combineAdapters(await both(), options);
  const file = await openSafetensors(await fileSource(`${GOLDEN}/expected.safetensors`), "expected");
  const keys = [...file.tensors.keys()].filter((key) => key.startsWith(`${options.method}.`));
  expect(keys).toHaveLength(2);
  expect(combined.config).toMatchObject({ r, alpha: r, targetModules: ["down_proj", "q_proj"] });
  for (const key of keys) {
    const want = decodeFloats("F32", await file.read(key));
    expectClose(update(combined, key.slice(options.method.length + 1)), want, 2e-6, key);
  }
});

test("cat is the weighted sum exactly, also of adapters of other ranks and other modules", async () => {
  const adapters = [
    { adapter: await read("patterns/adapter"), weight: 2 },
    { adapter: await read("rslora/adapter"), weight: -0.5 },
    { adapter: await read("combined/a"), weight: 1 },
  ];
  const combined = combineAdapters(adapters, { method: "cat" });
  for (const [name, { A }] of combined.modules) {
    const parts = adapters.filter(({ adapter }) => adapter.modules.has(name));
    const want = new Float64Array(update(combined, name).length);
    for (const { adapter, weight } of parts)
      for (const [i, v] of update(adapter, name).entries()) want[i] = (want[i] ?? 0) + weight * v;
    expectClose(update(combined, name), want, 2e-6, name);
    expect(settingsOf(combined.config, name)).toMatchObject({ r: A.rows, scale: 1 });
  }
});

test("svd of the sum of the ranks is the sum itself, and of fewer the nearest", async () => {
  const adapters = await both();
  const [exact, whole] = [
    combineAdapters(adapters, { method: "cat" }),
    combineAdapters(adapters, { method: "svd", rank: 8 }),
  ];
  const errors = [1, 3, 5, 7].map((rank) => {
    const cut = combineAdapters(adapters, { method: "svd", rank });
    const name = "model.layers.1.mlp.down_proj";
    const want = update(exact, name);
    return Math.hypot(...update(cut, name).map((v, i) => v - (want[i] ?? 0)));
  });
  for (const name of exact.modules.keys()) expectClose(update(whole, name), update(exact, name), 2e-6, name);
  expect(errors).toEqual([...errors].sort((a, b) => b - a));
  expect(errors[3]).toBeLessThan(0.5 * (errors[0] ?? 0));
});

test.each(["dare_linear", "dare_ties"] as const)("%s keeps about so many elements, by the seed", async (method) => {
  const adapters = await both();
  const of = (density: number, seed = 0): Float32Array =>
    combineAdapters(adapters, { method, density, seed }).modules.get("model.layers.0.self_attn.q_proj")?.A.values ??
    expect.fail("A");
  const whole = combineAdapters(adapters, {
    method: method === "dare_ties" ? "ties" : "linear",
    ...(method === "dare_ties" && { density: 1 }),
  });
  expect(of(1)).toEqual(whole.modules.get("model.layers.0.self_attn.q_proj")?.A.values);
  expect(of(0.5, 1)).toEqual(of(0.5, 1));
  expect(of(0.5, 1)).not.toEqual(of(0.5, 2));
  const zeros = of(0.5).filter((v) => v === 0).length / of(0.5).length;
  expect(zeros).toBeGreaterThan(0.1); // a quarter of a sum of two
  expect(zeros).toBeLessThan(0.45);
});

describe("what does not fit is refused", () => {
  const refused = async (options: CombineOptions, message: string, weights = WEIGHTS): Promise<void> => {
    const adapters = (await both()).map(({ adapter }, i) => ({ adapter, weight: weights[i] ?? 0 }));
    expect(() => combineAdapters(adapters, options)).toThrow(new ShapeError(message));
  };
  const cases: [CombineOptions, string, number[]?][] = [
    [{ method: "ties" }, "combine: ties needs a density above 0 and at most 1, got none. 0.5 is usual"],
    [{ method: "ties", density: 1.5 }, "combine: ties needs a density above 0 and at most 1, got 1.5. 0.5 is usual"],
    [{ method: "cat", density: 0.5 }, "combine: cat takes no density, got 0.5. Leave it out"],
    [{ method: "linear", rank: 4 }, "combine: linear takes no rank, got 4. Use svd, or leave it out"],
    [
      { method: "svd", rank: 0.5 },
      "combine: the rank must be a whole number above 0, got 0.5. Leave it out for the largest of the adapters'",
    ],
    [{ method: "cat" }, "combine: weights must be numbers other than 0, got 0. Leave such an adapter out", [1, 0]],
  ];
  test.each(cases)("%j", (options, message, weights) => refused(options, message, weights));

  test("adapters of other ranks, with more than A and B, or of other models", async () => {
    const [one] = await both();
    const adapter = one?.adapter ?? expect.fail("an adapter");
    const with_ = (other: PlainAdapter, method: Combination) => () =>
      combineAdapters(
        [
          { adapter, weight: 1 },
          { adapter: other, weight: 1 },
        ],
        { method },
      );
    expect(() => combineAdapters([{ adapter, weight: 1 }], { method: "cat" })).toThrow(
      new ShapeError("combine: there must be at least two adapters, got 1. Give more"),
    );
    expect(with_(await read("patterns/adapter"), "linear")).toThrow(
      new ShapeError(
        "combine: linear needs adapters of one rank, got 4,3 for model.layers.0.mlp.down_proj. Use cat or svd",
      ),
    );
    expect(with_(await read("dora/adapter"), "cat")).toThrow(
      new ShapeError("combine: adapters must be A and B alone, got DoRA. Merge it into the model instead"),
    );
    expect(with_(await read("dora-patterns/adapter"), "cat")).toThrow(ShapeError);
    expect(with_(await read("layers/adapter"), "cat")).toThrow(
      new ShapeError(
        "combine: model.layers.1.mlp.down_proj must have one size in all adapters, got several. Are they of one model?",
      ),
    );
  });
});

describe("lowrank combine", () => {
  let home = "";
  beforeAll(async () => {
    home = await mkdtemp(join(tmpdir(), "lowrank-combine-"));
  });
  afterAll(() => rm(home, { recursive: true, force: true }));
  const places = ["--adapter", `${GOLDEN}/a`, "--adapter", `${GOLDEN}/b`];

  test("writes an adapter that reads as what was combined", async () => {
    const out = join(home, "cat");
    const ended = await lowrank(["combine", ...places, "--weights", "0.7,-0.4", "--out", out]);
    expect(ended).toMatchObject({ code: 0, stdout: `the adapter is in ${out}: rank 8 on 4 modules\n` });
    const written = await readAdapter(diskDirectory(out));
    const want = combineAdapters(await both(), { method: "cat" });
    for (const name of want.modules.keys()) expectClose(update(written, name), update(want, name), 1e-6, name);
    expect(JSON.parse(await readFile(join(out, "adapter_config.json"), "utf8"))).toMatchObject({
      ...{ r: 8, lora_alpha: 8, base_model_name_or_path: "qwen2" },
    });
  });

  test("refuses weights that are not one for each, and that are no numbers", async () => {
    const out = join(home, "wrong");
    expect(await lowrank(["combine", ...places, "--weights", "1", "--out", out])).toMatchObject({
      ...{ code: 1, stderr: "error: combine: --weights must be one for each of 2 adapters, got 1" },
    });
    expect(await lowrank(["combine", ...places, "--weights", "1,x", "--out", out])).toMatchObject({
      ...{ code: 1, stderr: "error: combine: --weights must be numbers separated by commas, got 1,x" },
    });
  });
});

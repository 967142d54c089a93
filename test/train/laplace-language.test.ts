import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test } from "vitest";
import { reshape } from "../../src/autograd/basic-ops.ts";
import { backward } from "../../src/autograd/engine.ts";
import type { LoraAdapter } from "../../src/lora/adapter.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModelFrom } from "../../src/node.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { read, readAll, tensor } from "../../src/tensor/tensor.ts";
import { drawOffset } from "../../src/train/laplace.ts";
import { softmax } from "../../src/train/laplace-classify.ts";
import { languageCurvature, predictTokens } from "../../src/train/laplace-language.ts";
import { expectClose, testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";

const V = 8;
/** Of the four tokens the last two are targets. */
const ROW = { inputIds: [1, 5, 2, 7], labels: [-100, -100, 2, 7] };
let home = "";
let model: CausalModel;
let adapter: LoraAdapter;

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-laplace-"));
  await writeTinyModel(home, { config: { vocab_size: V, num_hidden_layers: 1 } });
  model = await loadModelFrom(await testGpu(), home);
  adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj", "v_proj", "down_proj"] }, 1);
  const random = new Random(4);
  for (const { B } of adapter.pairs.values())
    model.gpu.write(
      B,
      Float32Array.from({ length: B.size }, () => random.normal(0, 0.3)),
    );
});
afterAll(async () => {
  adapter.detach();
  model.destroy();
  await rm(home, { recursive: true, force: true });
});

const valuesOf = async (): Promise<number[]> => (await readAll(adapter.parameters)).flatMap((part) => [...part]);

/** Logits at the two targets, and the gradient of each with respect to all parameters: [16], [16][P]. */
async function jacobian() {
  const { gpu } = model;
  const forward = () => reshape(model.logits(tensor(gpu, Int32Array.from(ROW.inputIds), [1, 4])), [4, V]);
  const logits = gpu.scope(forward);
  const all = await read(logits);
  gpu.release(logits);
  const J: number[][] = [];
  for (let at = V; at < 3 * V; at++) {
    const grads = gpu.scope(() => {
      const dy = Float32Array.from({ length: 4 * V }, (_, i) => Number(i === at));
      const found = backward(forward(), tensor(gpu, dy, [4, V]));
      return adapter.parameters.map((p) => found.get(p) ?? expect.fail("a gradient"));
    });
    J.push((await readAll(grads)).flatMap((part) => [...part]));
  }
  return { logits: [...all.subarray(V, 3 * V)], J };
}

const dot = (a: readonly number[], b: readonly number[]): number => a.reduce((sum, x, i) => sum + x * (b[i] ?? 0), 0);

test("the curvature of drawn targets has the trace of the Fisher matrix, on average", async () => {
  const { logits, J } = await jacobian();
  const curvature = await languageCurvature(model, adapter.parameters, [ROW], { rank: 64, seed: 1 }); // 128 draws
  const trace = [0, V].reduce((sum, from) => {
    const p = softmax(logits.slice(from, from + V));
    const rows = J.slice(from, from + V);
    const mean = (rows[0] ?? []).map((_, i) => p.reduce((m, x, c) => m + x * (rows[c]?.[i] ?? 0), 0));
    return sum + p.reduce((s, x, c) => s + x * dot(rows[c] ?? [], rows[c] ?? []), 0) - dot(mean, mean);
  }, 0);
  // No more directions than two targets of V classes leave.
  expect(curvature.values.length).toBeLessThanOrEqual(2 * (V - 1));
  const found = curvature.values.reduce((a, b) => a + b, 0);
  expect(Math.abs(found / trace - 1)).toBeLessThan(0.3);
  curvature.destroy();
});

test("a token's probabilities are those of the linear model, and the parameters stay what they are", async () => {
  const { logits, J } = await jacobian();
  const before = await valuesOf();
  const curvature = await languageCurvature(model, adapter.parameters, [ROW], { rank: 8 });
  const tau = 5;
  const random = new Random(9);
  const draws: number[][] = [];
  for (let s = 0; s < 2; s++)
    draws.push((await readAll(await drawOffset(curvature, tau, random))).flatMap((part) => [...part]));
  const expected = [0, 1].map((target) => {
    const all = draws.map((delta) =>
      softmax(J.slice(target * V, (target + 1) * V).map((row, c) => (logits[target * V + c] ?? 0) + dot(row, delta))),
    );
    return Array.from({ length: V }, (_, c) => all.reduce((sum, p) => sum + (p[c] ?? 0) / all.length, 0));
  });
  const labels = [2, 7];
  const { plain, laplace } = await predictTokens(model, curvature, tau, [ROW], { samples: 2, seed: 9 });
  expectClose(
    laplace.map(({ likelihood }) => likelihood),
    expected.map((p, i) => p[labels[i] ?? 0] ?? Number.NaN),
    5e-3,
  );
  expectClose(
    laplace.map(({ confidence }) => confidence),
    expected.map((p) => Math.max(...p)),
    5e-3,
  );
  expectClose(
    plain.map(({ likelihood }) => likelihood),
    [0, 1].map((i) => softmax(logits.slice(i * V, (i + 1) * V))[labels[i] ?? 0] ?? Number.NaN),
    1e-5,
  );
  expect(await valuesOf()).toEqual(before);
  curvature.destroy();
});

test("packed rows are refused: a token there sees its own segment alone", async () => {
  const packed = { ...ROW, starts: [0, 2] };
  await expect(languageCurvature(model, adapter.parameters, [packed])).rejects.toThrow(
    new ShapeError("laplace: rows must be apart, got packed ones. Give them as they were before"),
  );
});

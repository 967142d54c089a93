/** LoftQ: starts on a quantised base. */
import { beforeAll, expect, test } from "vitest";
import { diskDirectory } from "../../src/io/files.ts";
import { unpackMatrix } from "../../src/kernels/unpack.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { initLoftq } from "../../src/lora/init-loftq.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel, openLinears } from "../../src/models/load.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { matrix, multiply } from "../../src/tensor/linalg.ts";
import { isPacked } from "../../src/tensor/packed.ts";
import { read } from "../../src/tensor/tensor.ts";
import { testGpu } from "../harness.ts";

const BASE = diskDirectory("test/golden/models/qwen2");
const CONFIG = { r: 4, alpha: 12, targetModules: ["q_proj", "down_proj"] };
let original: (module: string) => Promise<Float32Array>;

beforeAll(async () => {
  original = await openLinears(BASE);
});

/** ‖W − (dq(Q) + s·B·A)‖ over all adapted layers, Frobenius; with `pairs` false without s·B·A. */
async function errorOf(adapter: ReturnType<typeof attachLora>, pairs: boolean): Promise<number> {
  let sum = 0;
  for (const [name, { layer, A, B, scale }] of adapter.pairs) {
    if (!isPacked(layer.weight)) return expect.fail("a packed weight");
    const { gpu } = layer.weight;
    const wide = unpackMatrix(layer.weight);
    const [W, Q, a, b] = [await original(name), await read(wide), await read(A), await read(B)];
    gpu.release(wide);
    const [[r = 0, K = 0], [N = 0]] = [A.shape, B.shape];
    const update = multiply(matrix(N, r, b), matrix(r, K, a)).data;
    W.forEach((w, i) => {
      sum += (w - (Q[i] ?? 0) - (pairs ? scale * (update[i] ?? 0) : 0)) ** 2;
    });
  }
  return Math.sqrt(sum);
}

test.each(["nf4", "int8"] as const)(
  "LoftQ on %s: the layers begin nearer to W, and nearer still by iterations",
  async (weights) => {
    const errors: number[] = [];
    for (const iterations of [1, 4]) {
      const model = await loadModel(await testGpu(), BASE, { weights });
      const adapter = attachLora(model, CONFIG);
      const plain = await errorOf(adapter, false);
      const before = [...adapter.pairs.values()].map(({ layer }) => layer.weight);
      await initLoftq(adapter, original, { iterations });
      const kept = [...adapter.pairs.values()].every(({ layer }, i) => layer.weight === before[i]);
      expect(kept, "the base stays only where there is one iteration").toBe(iterations === 1);
      errors.push(plain, await errorOf(adapter, true));
      adapter.detach();
      model.destroy();
    }
    const [plain = 0, once = 0, , often = 0] = errors;
    expect(once).toBeLessThan(0.9 * plain);
    expect(often).toBeLessThan(once);
  },
);

test("what LoftQ begins with does not depend on alpha", async () => {
  const model = await loadModel(await testGpu(), BASE, { weights: "nf4" });
  const errors: number[] = [];
  for (const alpha of [4, 32]) {
    const adapter = attachLora(model, { ...CONFIG, alpha });
    await initLoftq(adapter, original);
    errors.push(await errorOf(adapter, true));
    adapter.detach();
  }
  expect(Math.abs((errors[0] ?? 0) / (errors[1] ?? 1) - 1)).toBeLessThan(1e-4);
  model.destroy();
});

test("starts that LoftQ cannot have are refused before anything is changed", async () => {
  const model = await loadModel(await testGpu(), BASE);
  const packed: CausalModel = await loadModel(await testGpu(), BASE, { weights: "nf4" });
  const wide = attachLora(model, CONFIG);
  await expect(initLoftq(wide, original)).rejects.toThrow(
    new ShapeError(
      "loftq: the base must be int8 or nf4, got f32 for model.layers.0.self_attn.q_proj. Load it quantised",
    ),
  );
  await expect(initLoftq(wide, original, { iterations: 0 })).rejects.toThrow(
    new ShapeError("loftq: iterations must be a whole number of at least 1, got 0"),
  );
  const used = attachLora(packed, CONFIG);
  used.setScale(0.5);
  const before = [...packed.linears.values()].map(({ weight }) => weight);
  await expect(initLoftq(used, original, { iterations: 4 })).rejects.toThrow(
    new ShapeError("start: an adapter starts once, at its own scale, got one that did. Attach a fresh one"),
  );
  expect([...packed.linears.values()].map(({ weight }) => weight)).toEqual(before);
  used.detach();
  const large = attachLora(packed, { ...CONFIG, r: 33 });
  await expect(initLoftq(large, original)).rejects.toThrow(
    new ShapeError("loftq: r must be at most 32, the rank of model.layers.0.self_attn.q_proj, got 33"),
  );
  await expect(original("model.norm")).rejects.toThrow(
    new ShapeError("openLinears: a module must be a linear layer of the model, got model.norm"),
  );
  for (const adapter of [wide, large]) adapter.detach();
  for (const of of [model, packed]) of.destroy();
});

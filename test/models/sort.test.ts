// A real pre-trained model: it sorts six digits of {0,1,2}, and with an adapter (scripts/golden/sort.ts) in the other order.
import { expect, test } from "vitest";
import { diskDirectory } from "../../src/io/files.ts";
import { loadPeft } from "../../src/lora/peft.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel } from "../../src/models/load.ts";
import { read, tensor } from "../../src/tensor/tensor.ts";
import { testGpu } from "../harness.ts";
import { hasShared, shared } from "../shared.ts";

const INPUTS = Array.from({ length: 3 ** 6 }, (_, n) => [0, 1, 2, 3, 4, 5].map((i) => Math.floor(n / 3 ** i) % 3));

/** How many of all inputs the model puts in ascending (1) or descending (−1) order, each digit the likeliest after those before. */
async function sorted(model: CausalModel, order: 1 | -1): Promise<number> {
  const { gpu } = model;
  const rows = INPUTS.map((digits) => [...digits, ...digits.toSorted((a, b) => order * (a - b))]);
  const ids = Int32Array.from(rows.flatMap((row) => row.slice(0, 11)));
  const logits = gpu.scope(() => model.logits(tensor(gpu, ids, [rows.length, 11])));
  const values = await read(logits);
  gpu.release(logits);
  const likeliest = (b: number, t: number): number => {
    const of = [...values.slice(3 * (11 * b + t), 3 * (11 * b + t + 1))];
    return of.indexOf(Math.max(...of));
  };
  return rows.filter((row, b) => [6, 7, 8, 9, 10, 11].every((t) => likeliest(b, t - 1) === row[t])).length;
}

test.skipIf(!hasShared)(
  "gpt-nano-sort sorts every input, with an adapter in the other order, merged or not",
  async () => {
    const model = await loadModel(await testGpu(), diskDirectory(shared("models/gpt-nano-sort")));
    expect(await sorted(model, 1)).toBe(729);
    const adapter = await loadPeft(model, diskDirectory("test/golden/adapters/nano-sort-descending"));
    expect(await sorted(model, -1)).toBe(729);
    adapter.merge();
    expect(await sorted(model, -1)).toBe(729);
    adapter.unmerge();
    adapter.disable();
    expect(await sorted(model, 1)).toBe(729);
    adapter.detach();
    model.destroy();
  },
);

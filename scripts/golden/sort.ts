/**
 * Trains an adapter that makes gpt-nano-sort sort in the other order, test/golden/adapters/nano-sort-descending:
 *
 *     node --import tsx --import ./scripts/wgsl.mjs scripts/golden/sort.ts ../shared/models/gpt-nano-sort
 */
import { attachLora, openGpu, Random, read, TrainingStep, tensor } from "../../src/index.ts";
import { loadModelFrom, savePeftTo } from "../../src/node.ts";

const STEPS = 300;
const ROWS = 96;
const [path = "../shared/models/gpt-nano-sort"] = process.argv.slice(2);
const gpu = await openGpu();
const model = await loadModelFrom(gpu, path);
const adapter = attachLora(model, { r: 8, alpha: 16, targetModules: "all-linear" });
const step = new TrainingStep({ model, parameters: adapter.parameters, maxGradNorm: 1 });
const random = new Random(1);

/** Six digits and the first five of them in descending order; the targets are those six, behind the last digit. */
function batch() {
  const rows = Array.from({ length: ROWS }, () => {
    const digits = Array.from({ length: 6 }, () => random.below(3));
    return [...digits, ...digits.toSorted((a, b) => b - a)];
  });
  const labels = Int32Array.from(rows.flatMap((row) => row.slice(1).map((digit, i) => (i < 5 ? -100 : digit))));
  const targets = Int32Array.from(labels.keys()).filter((at) => labels[at] !== -100);
  const ids = Int32Array.from(rows.flatMap((row) => row.slice(0, 11)));
  return { ids, labels, B: ROWS, T: 11, targets, tokens: targets.length };
}

for (let s = 1; s <= STEPS; s++) {
  step.run([batch()], 0.01 * Math.min(1, s / 10) * (1 - (s - 1) / STEPS));
  if (s % 50 === 0) console.log(`step ${s}: loss ${(await step.read()).at(-1)?.loss.toFixed(4)}`);
}
await savePeftTo(adapter, "test/golden/adapters/nano-sort-descending", "gpt-nano-sort");
const probe = gpu.scope(() => model.logits(tensor(gpu, Int32Array.of(0, 2, 1, 0, 2, 1), [1, 6])));
console.log(
  `after 021021 comes ${["0", "1", "2"][(await read(probe)).slice(-3).reduce((best, v, i, all) => (v > (all[best] ?? 0) ? i : best), 0)]}`,
);
gpu.destroy();

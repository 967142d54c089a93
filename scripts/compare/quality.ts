/**
 * Our training against PEFT's and PyTorch's: the same start, packed batches, order and learning rates; validation losses, and the BLEU of
 * greedy answers.
 *
 *     node --import tsx --import ./scripts/wgsl.mjs scripts/compare/quality.ts e2e --python v/bin/python [--steps 1000] [--json FILE]
 *
 * Needs ../shared and a Python with torch, transformers, peft and sacrebleu: see run_peft.py, which computes the other half.
 */
import { spawnSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname } from "node:path";
import { parseArgs } from "node:util";
import { readRecords } from "../../src/data.ts";
import {
  attachLora,
  batchIndices,
  evaluate,
  generate,
  openGpu,
  type Row,
  RowMaker,
  rowsOf,
  scheduleFactor,
  train,
} from "../../src/index.ts";
import { diskDirectory, fileSource, loadModelFrom, savePeftTo } from "../../src/node.ts";
import { loadTokenizer } from "../../src/tokenizer.ts";
import { packRows } from "../../src/train/packing.ts";

const TASKS = {
  e2e: { train: "e2e/train.txt", valid: "e2e/valid.txt", test: "e2e/test.txt", separator: "||" },
  wikisql: { train: "wikisql/train.jsonl", valid: "wikisql/valid.jsonl", test: undefined, separator: undefined },
} as const;
const MODEL = "../shared/models/stories260K";
const MAX_LENGTH = 256;
const LORA = { r: 8, alpha: 16, targetModules: "all-linear" } as const;
const RECIPE = {
  batch_size: 8,
  learning_rate: 2e-3,
  schedule: "linear",
  warmup_steps: 30,
  weight_decay: 0,
  max_grad_norm: 1,
} as const;
const VALID_ROWS = 400;
const ANSWERS = 200;
const NEW_TOKENS = 160;

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    python: { type: "string", default: "python3" },
    steps: { type: "string", default: "1000" },
    json: { type: "string" },
  },
});
const name = positionals[0] === "wikisql" ? "wikisql" : "e2e";
const task = TASKS[name];
const steps = Number(values.steps);
const out = `out/compare/${name}`;
mkdirSync(out, { recursive: true });

const gpu = await openGpu();
const tokenizer = await loadTokenizer(diskDirectory(MODEL));
const model = await loadModelFrom(gpu, MODEL);
const { contextLength, vocabSize } = model.config;

const rows = await readAll(task.train);
const bins = packRows(rows, MAX_LENGTH);
const valid = (await readAll(task.valid)).slice(0, VALID_ROWS);
const indices = batchIndices({ rows: bins.length, batchSize: RECIPE.batch_size, seed: 1 });
const order = Array.from({ length: steps }, () => indices.next().value);
const rates = order.map(
  (_, k) => RECIPE.learning_rate * scheduleFactor(RECIPE.schedule, k, steps, RECIPE.warmup_steps),
);
const adapter = attachLora(model, LORA, 1);
await savePeftTo(adapter, `${out}/init`, MODEL);
write(
  "bins.jsonl",
  bins.map(({ inputIds, labels, starts = [0] }) => ({
    ids: inputIds,
    labels,
    sizes: sizesOf(starts, inputIds.length),
  })),
);
write(
  "valid.jsonl",
  valid.map(({ inputIds, labels }) => ({ ids: inputIds, labels, sizes: [inputIds.length] })),
);
writeFileSync(`${out}/run.json`, JSON.stringify({ model: MODEL, ...RECIPE, order, rates, max_new_tokens: NEW_TOKENS }));
console.log(`${name}: ${rows.length} rows in ${bins.length} packed ones of ${MAX_LENGTH} tokens, ${steps} steps`);

const before = await evaluate(model, valid, 16);
const losses: number[] = [];
const started = performance.now();
for await (const { step, loss } of train({
  ...{ model, adapter, parameters: adapter.parameters, rows: bins, steps },
  ...{ batchSize: RECIPE.batch_size, learningRate: RECIPE.learning_rate, schedule: RECIPE.schedule },
  ...{ warmupSteps: RECIPE.warmup_steps, maxGradNorm: RECIPE.max_grad_norm, shuffleSeed: 1 },
})) {
  losses.push(loss);
  if (step % 100 === 0)
    console.log(`ours: step ${step}, loss ${loss.toFixed(4)}, ${((performance.now() - started) / 1000).toFixed(0)} s`);
}
await savePeftTo(adapter, `${out}/ours`, MODEL);
const after = await evaluate(model, valid, 16);
if (task.test) await answer(task.test);
gpu.destroy();

const { status } = spawnSync(values.python, ["scripts/compare/run_peft.py", out], { stdio: "inherit" });
if (status !== 0) throw new Error(`run_peft.py: must end with status 0, got ${status}`);
const peft = JSON.parse(readFileSync(`${out}/peft.json`, "utf8")) as Record<
  "valid" | "valid_ours" | "valid_before",
  number
> & {
  losses: number[];
  bleu?: number;
  bleu_ours?: number;
};
const result = {
  command: `node --import tsx --import ./scripts/wgsl.mjs scripts/compare/quality.ts ${name} --steps ${steps}`,
  recipe: { ...RECIPE, ...LORA, steps, max_length: MAX_LENGTH, rows: rows.length, packed: bins.length },
  validation: {
    rows: valid.length,
    before: before.loss,
    ours: after.loss,
    peft: peft.valid,
    ratio: after.loss / peft.valid,
  },
  ours_by_torch: peft.valid_ours,
  largest_loss_difference: losses.reduce(
    (most, loss, i) => Math.max(most, Math.abs(loss - (peft.losses[i] ?? Number.NaN))),
    0,
  ),
  ...(peft.bleu !== undefined && { bleu: { answers: ANSWERS, ours: peft.bleu_ours, peft: peft.bleu } }),
};
console.log(JSON.stringify(result, null, 2));
if (values.json) mkdirSync(dirname(values.json), { recursive: true });
if (values.json) writeFileSync(values.json, `${JSON.stringify(result, null, 2)}\n`);

async function readAll(file: string): Promise<Row[]> {
  const maker = new RowMaker(tokenizer, { maxLength: MAX_LENGTH, contextLength, vocabSize });
  const source = await fileSource(`../shared/data/${file}`);
  const all: Row[] = [];
  for await (const row of rowsOf(readRecords(source, file, { separator: task.separator }), maker)) all.push(row);
  return all;
}

/** Our greedy answers to the first prompts of the test set, with all references that it has for each. */
async function answer(file: string): Promise<void> {
  const references = new Map<string, string[]>();
  for (const line of readFileSync(`../shared/data/${file}`, "utf8").split("\n")) {
    const [prompt = "", completion] = line.split("||");
    if (completion !== undefined) references.set(prompt, [...(references.get(prompt) ?? []), completion.trim()]);
  }
  const chosen = [...references]
    .slice(0, ANSWERS)
    .map(([prompt, all]) => ({ ids: tokenizer.encode(prompt), references: all }));
  const texts: string[] = [];
  for (const { ids } of chosen) {
    const made: number[] = [];
    for await (const id of generate(model, { promptIds: ids, maxTokens: NEW_TOKENS })) made.push(id);
    texts.push(tokenizer.decode(made).trim());
  }
  write("prompts.jsonl", chosen);
  write("ours.jsonl", texts);
}

function sizesOf(starts: readonly number[], length: number): number[] {
  return starts.map((start, i) => (starts[i + 1] ?? length) - start);
}

function write(file: string, lines: readonly unknown[]): void {
  writeFileSync(`${out}/${file}`, lines.map((line) => `${JSON.stringify(line)}\n`).join(""));
}

/**
 * LoRA against full fine-tuning: the least validation loss that either reaches on each of the project's own three domains, over three
 * seeds of data, adapter and order. Both take the same rows in the same order, and stop when three evaluations in a row were no better.
 *
 *     node --import tsx --import ./scripts/wgsl.mjs scripts/compare/full.ts [--tune] [--domain NAME …] [--json bench/results/quality/full.json]
 *
 * Of domains that are not named the file keeps what it has. `--tune` runs each way at each of its rates on every domain with another seed, and
 * says what came of it, in place of all that.
 */
import { existsSync, readFileSync, writeFileSync } from "node:fs";
import { parseArgs } from "node:util";
import {
  attachLora,
  type CausalModel,
  evaluate,
  type Gpu,
  openGpu,
  type Row,
  readRows,
  type Tensor,
  train,
} from "../../src/index.ts";
import { diskDirectory, loadModelFrom } from "../../src/node.ts";
import { loadTokenizer } from "../../src/tokenizer.ts";
import { letters, notices, pirateTales } from "../demo/language.ts";

const BASE = "demo/base";
const DOMAINS = { pirate: pirateTales, letter: letters, notice: notices };
const SEEDS = [1, 2, 3];
/** Pirate tales go on to be learned where the loss of the others has long stood still. */
const STEPS = { pirate: 1000, letter: 300, notice: 500 };
const EVALUATE_EVERY = 100;
const PATIENCE = 3;
const BATCH = 4;
const TRAIN_ROWS = 300;
const VALID_ROWS = 80;
const BETA2 = 0.95;
/** The base is so small that its embedding, which is its head too, is a seventh of it: adapted like the rest, at 9 % of the parameters in all. */
const LORA = {
  ...{ r: 5, alpha: 3 },
  targetModules: [
    ...["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ...["embed_tokens", "lm_head"],
  ],
};
const RATES = { full: [1e-3, 2e-3, 4e-3], lora: [7e-3, 1e-2, 1.5e-2] } as const;
const CHOSEN = { full: 2e-3, lora: 1.5e-2 };
type Way = keyof typeof RATES;
type Domain = keyof typeof DOMAINS;

const { values } = parseArgs({
  options: { tune: { type: "boolean" }, domain: { type: "string", multiple: true }, json: { type: "string" } },
});
const chosen = (Object.keys(DOMAINS) as Domain[]).filter((name) => values.domain?.includes(name) ?? true);
const tokenizer = await loadTokenizer(diskDirectory(BASE));
const gpu = await openGpu();
if (values.tune) {
  for (const domain of chosen)
    for (const way of Object.keys(RATES) as Way[])
      for (const rate of RATES[way]) console.log(domain, way, rate, (await run(gpu, domain, way, 0, rate)).losses);
} else await compare();
gpu.destroy();

async function compare(): Promise<void> {
  const { json } = values;
  const domains: Record<string, unknown> =
    json && existsSync(json) ? JSON.parse(readFileSync(json, "utf8")).domains : {};
  const share = { trainable: 0, parameters: 1 };
  for (const domain of chosen) {
    const least: Record<Way, number[]> = { full: [], lora: [] };
    for (const seed of SEEDS) {
      for (const way of Object.keys(least) as Way[]) {
        const { losses, trainable, parameters } = await run(gpu, domain, way, seed, CHOSEN[way]);
        if (way === "lora") Object.assign(share, { trainable, parameters });
        least[way].push(Math.min(...losses));
        console.log(domain, seed, way, losses.map((x) => x.toFixed(4)).join(" "));
      }
    }
    const of = (way: Way) => ({ losses: least[way], mean: mean(least[way]), spread: spread(least[way]) });
    domains[domain] = { full: of("full"), lora: of("lora"), ratio: mean(least.lora) / mean(least.full) };
    console.log(domain, JSON.stringify(domains[domain]));
    const report = {
      command: "node --import tsx --import ./scripts/wgsl.mjs scripts/compare/full.ts",
      adapter: gpu.info.description,
      recipe: { STEPS, EVALUATE_EVERY, PATIENCE, BATCH, TRAIN_ROWS, VALID_ROWS, BETA2, LORA, CHOSEN, SEEDS },
      trainable_share: share.trainable / share.parameters,
      domains,
    };
    if (json) writeFileSync(json, `${JSON.stringify(report, null, 2)}\n`);
  }
}

/** The validation losses of one run. */
async function run(device: Gpu, domain: Domain, way: Way, seed: number, learningRate: number) {
  const model = await loadModelFrom(device, BASE);
  const parameters = [...model.weights.values()].reduce((sum, t) => sum + t.size, 0);
  const parts = way === "lora" ? attachLora(model, LORA, seed).parameters : wholeModel(model);
  const tell = DOMAINS[domain];
  const valid = rowsOf(model, tell(9000 + seed, VALID_ROWS, "valid"));
  const training = train({
    model,
    parameters: parts,
    rows: rowsOf(model, tell(100 * seed + 7, TRAIN_ROWS)),
    steps: STEPS[domain],
    batchSize: BATCH,
    learningRate,
    beta2: BETA2,
    schedule: "cosine",
    warmupSteps: 5,
    maxGradNorm: 1,
    shuffleSeed: seed,
    pauseEvery: EVALUATE_EVERY,
  });
  const losses: number[] = [];
  for await (const { step } of training) {
    if (step % EVALUATE_EVERY !== 0) continue;
    losses.push((await evaluate(model, valid, 8)).loss);
    if (losses.length - 1 - losses.indexOf(Math.min(...losses)) >= PATIENCE) break;
  }
  const trainable = parts.reduce((sum, t) => sum + t.size, 0);
  model.destroy();
  return { losses, trainable, parameters };
}

function wholeModel(model: CausalModel): Tensor[] {
  const weights = [...model.weights.values()];
  for (const weight of weights) weight.requiresGrad = true;
  return weights;
}

function rowsOf(model: CausalModel, rows: ReturnType<typeof pirateTales>): Row[] {
  const { contextLength, vocabSize } = model.config;
  const text = rows.map((row) => JSON.stringify(row)).join("\n");
  return readRows(text, "rows", tokenizer, { maxLength: contextLength, contextLength, vocabSize }).rows;
}

function mean(all: readonly number[]): number {
  return all.reduce((a, b) => a + b, 0) / all.length;
}

function spread(all: readonly number[]): number {
  return Math.max(...all) - Math.min(...all);
}

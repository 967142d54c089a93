/**
 * npm run demo: the whole path on the embedded base model, from loading it to merged adapters. Needs nothing from outside.
 *
 * Everything it prints is measured in this run.
 */
import { readFile } from "node:fs/promises";
import {
  attachLora,
  collate,
  evaluate,
  generate,
  type LoraAdapter,
  openGpu,
  type Row,
  readAll,
  readRows,
  type Tensor,
  TrainingStep,
  tensor,
  train,
} from "../src/index.ts";
import { diskDirectory, loadModelFrom, loadPeftFrom, savePeftTo } from "../src/node.ts";
import { loadTokenizer } from "../src/tokenizer.ts";

const BASE = "demo/base";
const OUT = "out/demo";
const PROMPT = "Once there was a little fox named Mia.";
const LORA = { r: 8, alpha: 16, targetModules: "all-linear" } as const;
const HELD_OUT_ROWS = 16;
const MERGE_TOLERANCE = 1e-3;

const started = performance.now();
const gpu = await openGpu();
const tokenizer = await loadTokenizer(diskDirectory(BASE));
const model = await loadModelFrom(gpu, BASE);
const parameters = [...model.weights.values()].reduce((n, t) => n + t.size, 0);
title(`A base model of ${count(parameters)} parameters, on ${gpu.info.description || gpu.info.vendor}`);
if (gpu.isSoftware) console.log("No GPU was found: this runs on a software adapter (SwiftShader), right but slow.");
await say("base", undefined);

const pirate = await tune("pirate", 36);
await say("base", pirate);
await say("pirate", undefined);

await compare();

pirate.disable();
const letter = await tune("letter", 20);

title("One base model, two adapters, one prompt");
letter.disable();
await say("base", undefined);
pirate.enable();
await say("pirate", undefined);
pirate.disable();
letter.enable();
await say("letter", undefined);

letter.disable();
await mergeCheck("pirate", pirate);
await mergeCheck("letter", letter);
console.log(`\nDone in ${seconds(performance.now() - started)}.`);
gpu.destroy();

/** Tunes a fresh adapter on demo/data/<name>-train.jsonl with a live loss; says the held-out loss before and after. */
async function tune(name: string, steps: number): Promise<LoraAdapter> {
  const rows = await rowsOf(`${name}-train`);
  const heldOut = (await rowsOf(`${name}-valid`)).slice(0, HELD_OUT_ROWS);
  const adapter = attachLora(model, LORA, 1);
  const trainable = adapter.parameters.reduce((n, t) => n + t.size, 0);
  title(
    `LoRA on "${name}": ${count(trainable)} trainable parameters, ${((100 * trainable) / parameters).toFixed(1)} % of the model`,
  );
  const before = await evaluate(model, heldOut, 8);
  const from = performance.now();
  for await (const { step, loss, tokens_per_second } of train({
    model,
    parameters: adapter.parameters,
    rows,
    steps,
    batchSize: 6,
    learningRate: 1e-2,
    schedule: "cosine",
    warmupSteps: 2,
    maxGradNorm: 1,
    shuffleSeed: 1,
  }))
    live(`step ${step}/${steps}  loss ${loss.toFixed(3)}  ${tokens_per_second.toFixed(0)} tokens/s`, step, steps);
  const after = await evaluate(model, heldOut, 8);
  console.log(
    `held-out loss ${before.loss.toFixed(3)} → ${after.loss.toFixed(3)}  (perplexity ${before.perplexity.toFixed(1)} → ${after.perplexity.toFixed(2)}), ${seconds(performance.now() - from)}`,
  );
  return adapter;
}

/** Full fine-tuning against LoRA on the same batch, measured here and now. */
async function compare(): Promise<void> {
  title("Full fine-tuning against LoRA, same model, same batch, measured in this run");
  const batch = collate((await rowsOf("pirate-train")).slice(0, 6), 0);
  pirate.disable();
  const weights = [...model.weights.values()];
  const setTrainable = (on: boolean): void => {
    for (const t of weights) t.requiresGrad = on;
  };
  const adapter = attachLora(model, LORA, 1);
  const variants = { full: weights, LoRA: adapter.parameters };
  const costs = new Map<string, Awaited<ReturnType<typeof measureStep>>>();
  for (const [name, trained] of Object.entries(variants)) {
    setTrainable(name === "full");
    if (name === "full") adapter.disable();
    else adapter.enable();
    costs.set(name, await measureStep(trained, batch));
    setTrainable(false);
  }
  adapter.detach();
  pirate.enable();
  const [full, lora] = [costs.get("full"), costs.get("LoRA")];
  if (!full || !lora) return;
  const line = (what: string, a: string, b: string, ratio: number): void =>
    console.log(
      `${what.padEnd(24)}${a.padStart(14)}${b.padStart(14)}${`${ratio.toFixed(ratio < 0.1 ? 3 : 2)}×`.padStart(10)}`,
    );
  console.log(`${"".padEnd(24)}${"full".padStart(14)}${"LoRA".padStart(14)}${"ratio".padStart(10)}`);
  line("trainable parameters", count(full.trainable), count(lora.trainable), lora.trainable / full.trainable);
  line("gradient bytes", bytes(full.gradientBytes), bytes(lora.gradientBytes), lora.gradientBytes / full.gradientBytes);
  line(
    "optimizer bytes",
    bytes(full.optimizerBytes),
    bytes(lora.optimizerBytes),
    lora.optimizerBytes / full.optimizerBytes,
  );
  line("peak bytes of a step", bytes(full.peakBytes), bytes(lora.peakBytes), lora.peakBytes / full.peakBytes);
  line("dispatches per step", String(full.dispatches), String(lora.dispatches), lora.dispatches / full.dispatches);
  line(
    "time per step (median)",
    `${full.timeMs.toFixed(0)} ms`,
    `${lora.timeMs.toFixed(0)} ms`,
    lora.timeMs / full.timeMs,
  );
}

/** What one step of training `trained` takes: the median time of three after a warm-up, the counts of the last. */
async function measureStep(trained: readonly Tensor[], batch: ReturnType<typeof collate>) {
  const step = new TrainingStep({ model, parameters: trained });
  const times: number[] = [];
  for (let i = 0; i < 4; i++) {
    gpu.resetCounters();
    const from = performance.now();
    step.run([batch], 0); // rate 0: the weights stay as they are
    await step.read();
    if (i > 0) times.push(performance.now() - from);
  }
  const { bytesPeak, dispatches } = gpu.counters();
  const cost = {
    trainable: trained.reduce((n, t) => n + t.size, 0),
    gradientBytes: step.optimizer.gradientBytes,
    optimizerBytes: step.optimizer.sizeBytes,
    peakBytes: bytesPeak,
    dispatches: [...dispatches.values()].reduce((a, b) => a + b, 0),
    timeMs: times.sort((a, b) => a - b)[1] ?? Number.NaN,
  };
  step.destroy();
  return cost;
}

/** Saves the adapter as PEFT, loads it back, and compares merged logits with adapter logits. */
async function mergeCheck(name: string, adapter: LoraAdapter): Promise<void> {
  const directory = `${OUT}/${name}`;
  await savePeftTo(adapter, directory, BASE);
  adapter.detach();
  const loaded = await loadPeftFrom(model, directory);
  const ids = tokenizer.encode(PROMPT);
  const logits = async (): Promise<Float32Array> => {
    const y = gpu.scope(() => model.logits(tensor(gpu, Int32Array.from(ids), [1, ids.length])));
    const [values = new Float32Array()] = await readAll([y]);
    gpu.release(y);
    return values;
  };
  const adapted = await logits();
  loaded.merge();
  const merged = await logits();
  loaded.unmerge();
  loaded.disable();
  const difference = merged.reduce((most, x, i) => Math.max(most, Math.abs(x - (adapted[i] ?? Number.NaN))), 0);
  if (!(difference <= MERGE_TOLERANCE))
    throw new Error(`demo: merged and adapter logits must agree within ${MERGE_TOLERANCE}, got ${difference}`);
  console.log(
    `${directory}: saved as PEFT, reloaded; merged against adapter logits differ by at most ${difference.toExponential(1)}`,
  );
}

/** What the model makes of the prompt. With `hidden`, as it is without that adapter. */
async function say(label: string, hidden: LoraAdapter | undefined): Promise<void> {
  hidden?.disable();
  const promptIds = tokenizer.encode(PROMPT);
  const ids: number[] = [];
  for await (const id of generate(model, { promptIds, maxTokens: 90 })) ids.push(id);
  hidden?.enable();
  console.log(`\n[${label}] ${tokenizer.decode([...promptIds, ...ids]).replaceAll("\n", "\n  ")}`);
}

async function rowsOf(name: string): Promise<Row[]> {
  const path = `demo/data/${name}.jsonl`;
  const { contextLength, vocabSize } = model.config;
  return readRows(await readFile(path, "utf8"), path, tokenizer, { maxLength: contextLength, contextLength, vocabSize })
    .rows;
}

/** One line that is written over on a terminal; now and then a line of its own elsewhere. */
function live(text: string, step: number, steps: number): void {
  const isLast = step === steps;
  if (process.stdout.isTTY) process.stdout.write(`\r${text}    ${isLast ? "\n" : ""}`);
  else if (isLast || step % 10 === 0) console.log(text);
}

function title(text: string): void {
  console.log(`\n== ${text}`);
}
function seconds(ms: number): string {
  return `${(ms / 1000).toFixed(1)} s`;
}
function count(n: number): string {
  return n.toLocaleString("en-US");
}
function bytes(n: number): string {
  return n < 1e6 ? `${(n / 1e3).toFixed(1)} kB` : `${(n / 1e6).toFixed(2)} MB`;
}

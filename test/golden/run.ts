/**
 * The golden run: `stories260K` with a LoRA adapter, trained as PEFT and PyTorch did (`shared/golden/stories260K-lora`).
 * Portable: Node, Deno and Chromium run this same file and must come to the same numbers.
 */
import {
  type Directory,
  evaluate,
  type Gpu,
  type LoraAdapter,
  loadModel,
  loadPeft,
  memoryDirectory,
  memorySource,
  openSafetensors,
  readAll,
  readRows,
  tensor,
  train,
} from "../../src/index.ts";
import { decodeFloats } from "../../src/io/dtype.ts";

/** Reads a file below the shared directory. */
export type ReadShared = (path: string) => Promise<Uint8Array>;

/** The largest deviations from PyTorch, and what is allowed of each. */
export interface GoldenResult {
  readonly ok: boolean;
  readonly checks: readonly { readonly what: string; readonly worst: number; readonly allowed: number }[];
}

interface Expected {
  readonly losses: readonly number[];
  readonly grad_norms: readonly number[];
  readonly eval_loss_init_adapter: number;
  readonly eval_loss_final_adapter: number;
  readonly eval_tokens: number;
  readonly trainable_parameters: number;
}

const GOLDEN = "golden/stories260K-lora";

/** Trains 20 steps and compares every loss, gradient norm, final tensor, evaluation and logit with PyTorch's. */
export async function goldenRun(gpu: Gpu, read: ReadShared): Promise<GoldenResult> {
  const text = async (path: string): Promise<string> => new TextDecoder().decode(await read(path));
  const folder = async (path: string, files: readonly string[]): Promise<Directory> => {
    const contents = await Promise.all(files.map(async (file) => [file, await read(`${path}/${file}`)] as const));
    return memoryDirectory(path, Object.fromEntries(contents));
  };
  const adapterFiles = ["adapter_config.json", "adapter_model.safetensors"];
  const expected = JSON.parse(await text(`${GOLDEN}/expected.json`)) as Expected;
  const model = await loadModel(gpu, await folder("models/stories260K", ["config.json", "model.safetensors"]));
  const { contextLength, vocabSize } = model.config;
  const { rows } = readRows(await text(`${GOLDEN}/train.jsonl`), "train.jsonl", undefined, {
    maxLength: contextLength,
    contextLength,
    vocabSize,
  });
  const adapter = await loadPeft(model, await folder(`${GOLDEN}/init`, adapterFiles));
  const initial = await evaluate(model, rows, 4);

  const losses: number[] = [];
  const norms: number[] = [];
  const settings = { steps: 20, batchSize: 4, learningRate: 0.002, weightDecay: 0.01, schedule: "constant" } as const;
  for await (const metrics of train({ model, parameters: adapter.parameters, rows, ...settings })) {
    losses.push(metrics.loss);
    norms.push(metrics.grad_norm);
  }
  const final = await evaluate(model, rows, 4);
  const ids = Int32Array.from(rows[0]?.inputIds ?? []);
  const output = gpu.scope(() => model.logits(tensor(gpu, ids, [1, ids.length])));
  const [logits = new Float32Array()] = await readAll([output]);

  const largest = (errors: readonly number[]): number => Math.max(0, ...errors); // NaN stays NaN
  const difference = (a: ArrayLike<number>, b: ArrayLike<number>): number[] => {
    if (a.length !== b.length) return [Number.NaN];
    return Array.from(a, (value, i) => Math.abs(value - (b[i] ?? Number.NaN)));
  };
  const stored = await tensorsOf(read, `${GOLDEN}/logits.safetensors`);
  const evaluations = [initial.loss - expected.eval_loss_init_adapter, final.loss - expected.eval_loss_final_adapter];
  const checks = [
    { what: "loss", worst: largest(difference(losses, expected.losses)), allowed: 5e-5 },
    {
      what: "gradient norm, relative",
      worst: largest(difference(norms, expected.grad_norms).map((d, i) => d / (expected.grad_norms[i] ?? 0))),
      allowed: 2e-4,
    },
    {
      what: "tensor of the final adapter, relative",
      worst: largest(await adapterErrors(adapter, await tensorsOf(read, `${GOLDEN}/final/adapter_model.safetensors`))),
      allowed: 5e-4,
    },
    { what: "evaluation loss", worst: largest(evaluations.map(Math.abs)), allowed: 5e-5 },
    { what: "logits of row 0", worst: largest(difference(logits, stored.get("logits") ?? [])), allowed: 1e-3 },
    { what: "evaluated tokens", worst: Math.abs(final.tokens - expected.eval_tokens), allowed: 0 },
    {
      what: "trainable parameters",
      worst: Math.abs(adapter.parameters.reduce((n, t) => n + t.size, 0) - expected.trainable_parameters),
      allowed: 0,
    },
  ];
  gpu.release(output);
  adapter.detach();
  model.destroy();
  return { ok: checks.every(({ worst, allowed }) => worst <= allowed), checks };
}

async function tensorsOf(read: ReadShared, path: string): Promise<Map<string, Float32Array>> {
  const file = await openSafetensors(memorySource(await read(path)), path);
  const entries = [...file.tensors.keys()].map(
    async (name) => [name, decodeFloats("F32", await file.read(name))] as const,
  );
  return new Map(await Promise.all(entries));
}

/** ‖ours − theirs‖ / ‖theirs‖ of each tensor (Frobenius). */
async function adapterErrors(adapter: LoraAdapter, theirs: ReadonlyMap<string, Float32Array>): Promise<number[]> {
  const named = [...adapter.pairs].flatMap(([name, { A, B }]) => [
    { key: `base_model.model.${name}.lora_A.weight`, t: A },
    { key: `base_model.model.${name}.lora_B.weight`, t: B },
  ]);
  const values = await readAll(named.map(({ t }) => t));
  return named.map(({ key }, i) => {
    const [ours = new Float32Array(), want = new Float32Array([Number.NaN])] = [values[i], theirs.get(key)];
    const square = (sum: number, x: number): number => sum + x * x;
    return Math.sqrt(ours.map((x, j) => x - (want[j] ?? Number.NaN)).reduce(square, 0) / want.reduce(square, 0));
  });
}

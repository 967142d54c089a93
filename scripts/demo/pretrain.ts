/**
 * Pre-trains the demo's base model with this engine and writes its weights to demo/base/:
 *
 *     npm run pretrain -- [steps]                 Node; hours of patience on a software adapter, minutes on a GPU
 *     npm run pretrain:deno -- [steps]            the same in Deno
 *
 * Deterministic but for the last bits of different devices: seeded weights, text (scripts/demo/language.ts) and order.
 */
import {
  encodeSafetensors,
  evaluate,
  generate,
  makeModel,
  memoryDirectory,
  openGpu,
  Random,
  type Row,
  readConfig,
  type Tensor,
  tensor,
  train,
  weightShapes,
} from "../../src/index.ts";
import { tensorToWrite } from "../../src/nn/checkpoint.ts";
import { writeFileAtomic } from "../../src/node.ts";
import { loadTokenizer } from "../../src/tokenizer.ts";
import { baseStories } from "./language.ts";

const BASE = "demo/base";
const BATCH_SIZE = 12;
const HELD_OUT = 60;
const CONFIG = {
  architectures: ["LlamaForCausalLM"],
  model_type: "llama",
  vocab_size: 512,
  hidden_size: 96,
  intermediate_size: 256,
  num_hidden_layers: 3,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  head_dim: 24,
  hidden_act: "silu",
  max_position_embeddings: 256,
  rms_norm_eps: 1e-5,
  rope_theta: 10000,
  attention_bias: false,
  mlp_bias: false,
  tie_word_embeddings: true,
  bos_token_id: 0,
  eos_token_id: 1,
  torch_dtype: "float16",
};

const steps = Number(globalThis.scriptArgs?.[0] ?? process.argv[2] ?? 600);
const gpu = await openGpu();
console.log(`pre-training for ${steps} steps on ${gpu.info.description}`);

const readTokenizerFile = async (file: string): Promise<readonly [string, Uint8Array]> => {
  const { readFile } = await import("node:fs/promises");
  return [file, await readFile(`${BASE}/${file}`)];
};
const tokenizer = await loadTokenizer(
  memoryDirectory(
    BASE,
    Object.fromEntries(await Promise.all(["tokenizer.json", "tokenizer_config.json"].map(readTokenizerFile))),
  ),
);
const rowsOf = (stories: readonly string[]): Row[] =>
  stories.map((story) => {
    const inputIds = [...tokenizer.encode(story), CONFIG.eos_token_id];
    return { inputIds, labels: inputIds };
  });
const rows = rowsOf(baseStories(1, steps * BATCH_SIZE));
const heldOut = rowsOf(baseStories(2, HELD_OUT, "valid"));

const config = await readConfig(memoryDirectory(BASE, { "config.json": JSON.stringify(CONFIG) }));
const model = makeModel(gpu, config, initialWeights());
const started = performance.now();
for await (const { step, loss, tokens_per_second } of train({
  model,
  parameters: [...model.weights.values()],
  rows,
  steps,
  batchSize: BATCH_SIZE,
  learningRate: 4e-3,
  schedule: "cosine",
  warmupSteps: 30,
  weightDecay: 0.05,
  maxGradNorm: 1,
  shuffleSeed: 1,
})) {
  if (step % 20 === 0 || step === 1) {
    const minutes = ((performance.now() - started) / 60000).toFixed(1);
    console.log(`step ${step}  loss ${loss.toFixed(3)}  ${tokens_per_second.toFixed(0)} tokens/s  ${minutes} min`);
  }
  if (step % 100 === 0 || step === steps) {
    await save();
    console.log(
      `held-out loss ${(await evaluate(model, heldOut, BATCH_SIZE)).loss.toFixed(4)}: ${await sample("Once there was a little fox named Mia.")}`,
    );
  }
}
gpu.destroy();
globalThis.finish?.(JSON.stringify({ ok: true }));

/** Normal weights of std 0.02, the projections into the residual stream scaled down by √(2·layers) (GPT-2's rule), norms 1. */
function initialWeights(): Map<string, Tensor> {
  const random = new Random(7);
  const weights = new Map<string, Tensor>();
  for (const [name, shape] of weightShapes(config)) {
    const size = shape.reduce((a, b) => a * b, 1);
    const std = /o_proj|down_proj/.test(name) ? 0.02 / Math.sqrt(2 * config.layers) : 0.02;
    const isNorm = name.includes("norm");
    const t = tensor(
      gpu,
      Float32Array.from({ length: size }, () => (isNorm ? 1 : random.normal(0, std))),
      shape,
    );
    t.requiresGrad = true;
    weights.set(name, t);
  }
  return weights;
}

async function save(): Promise<void> {
  const tensors = [...model.weights].map(([name, t]) => tensorToWrite(name, t, "F16"));
  await writeFileAtomic(`${BASE}/model.safetensors`, encodeSafetensors(tensors, { format: "pt" }));
  await writeFileAtomic(`${BASE}/config.json`, `${JSON.stringify(CONFIG, null, 2)}\n`);
  await writeFileAtomic(
    `${BASE}/generation_config.json`,
    `${JSON.stringify({ bos_token_id: 0, eos_token_id: 1 }, null, 2)}\n`,
  );
}

async function sample(prompt: string): Promise<string> {
  const ids = tokenizer.encode(prompt);
  for await (const id of generate(model, { promptIds: tokenizer.encode(prompt), maxTokens: 100 })) ids.push(id);
  return tokenizer.decode(ids);
}

/**
 * LoRA adapters as llama.cpp loads them: one GGUF file, tensors by the names of its models, s = `adapter.lora.alpha` / rank. Where its
 * models turn pairs of neighbours in RoPE, rows of q and k are stored in that order, and so are those of their B.
 */
import type { ByteSource } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { encodeGguf, type GgufEntry, openGguf } from "../io/gguf.ts";
import { listSome } from "../nn/checkpoint.ts";
import type { EncodedAdapter } from "./adapter-file.ts";
import { settingsOf } from "./config.ts";
import * as plain from "./plain-adapter.ts";

/** `model_type` → `general.architecture`. */
const ARCHITECTURES: Readonly<Record<string, string>> = {
  ...{ llama: "llama", mistral: "llama", granite: "granite", smollm3: "smollm3", qwen2: "qwen2", qwen3: "qwen3" },
  ...{ gemma2: "gemma2", gemma3_text: "gemma3", olmo2: "olmo2", phi3: "phi3", gpt2: "gpt2" },
};
/** Those whose rows of q and k are in the order of neighbours. */
const PERMUTED = ["llama", "granite", "smollm3"];

/** Module of a layer → tensor of a block. */
const DECODER: Readonly<Record<string, string>> = {
  ...{ "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v" },
  ...{ "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate" },
  ...{ "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down" },
};
const PHI3: Readonly<Record<string, string>> = {
  ...{ "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output" },
  ...{ "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down" },
};
const GPT2: Readonly<Record<string, string>> = {
  ...{ "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down" },
};
const namesOf = (architecture: unknown): Readonly<Record<string, string>> =>
  architecture === "gpt2" ? GPT2 : architecture === "phi3" ? PHI3 : DECODER;
const layersOf = (architecture: unknown): string => (architecture === "gpt2" ? "transformer.h" : "model.layers");

/** Reads an adapter. Throws FormatError for other GGUF files, and where heads have to be known and `base` is not given. */
export async function readGgufAdapter(
  source: ByteSource,
  file: string,
  base?: plain.BaseModel,
): Promise<plain.PlainAdapter> {
  const { metadata, tensors } = await openGguf(source, file);
  const must = (key: string, rule: string, holds: (value: unknown) => boolean): string => {
    const value = metadata.get(key)?.value;
    if (holds(value)) return String(value);
    throw new FormatError(`${file}: "${key}" must be ${rule}, got ${value ?? "none"}`);
  };
  const known: readonly unknown[] = [...new Set(Object.values(ARCHITECTURES))];
  must("general.type", "adapter", (type) => type === "adapter");
  must("adapter.type", "lora", (type) => type === "lora");
  const architecture = must("general.architecture", `one of ${known.join(", ")}`, (name) => known.includes(name));
  const alpha = Number(must("adapter.lora.alpha", "a number above 0", (x) => typeof x === "number" && x > 0));

  const kinds = Object.entries(namesOf(architecture));
  const stored = await plain.readModules(file, tensors, (tensor) => {
    const [, block, stem, letter] = /^blk\.(\d+)\.(.+)\.weight\.lora_([ab])$/.exec(tensor) ?? [];
    const [kind] = kinds.find(([, name]) => name === stem) ?? [];
    const module = `${layersOf(architecture)}.${block}.${kind}`;
    return kind ? { module, part: letter === "a" ? "A" : "B" } : undefined;
  });
  const modules = new Map(
    [...stored.modules].map(([name, module]) => [name, reordered(file, name, module, architecture, paired, base)]),
  );
  const [r = 1] = [...modules.values()].map(({ A }) => A.rows);
  const others = [...modules].filter(([, { A }]) => A.rows !== r);
  const rankPattern = Object.fromEntries(others.map(([name, { A }]) => [name.replaceAll(".", "\\."), A.rows]));
  const baseModel = String(metadata.get("general.base_model.0.name")?.value ?? "");
  const config = { r, alpha, rankPattern, ...plain.targetsOf(modules) };
  return { format: "gguf", config, baseModel, ...stored, modules };
}

/**
 * The file, under the name "". One alpha counts for all modules, others are multiplied into B. Throws FormatError for DoRA, for biases, and
 * for models and modules that llama.cpp has not.
 */
export function encodeGgufAdapter(adapter: plain.PlainAdapter, base: plain.BaseModel): EncodedAdapter {
  const { config, baseModel, modules: given } = adapter;
  const architecture = ARCHITECTURES[base.modelType];
  if (!architecture)
    throw new FormatError(
      `gguf: "model_type" must be one of ${Object.keys(ARCHITECTURES).join(", ")}, got ${base.modelType}. Convert to PEFT, and from there with llama.cpp's script`,
    );
  plain.refuse("gguf", adapter, ["magnitude", "loraBias", "bias"]);
  const alphaOf = (name: string): number => settingsOf(config, name).scale * settingsOf(config, name).r;
  const { modules, number, folded } = plain.withOneNumber(given, alphaOf);
  const alpha = Math.fround(number);
  const tensors = [...modules].flatMap(([name, module]) => {
    const { layer, kind } = plain.layerOf(name);
    const stem = namesOf(architecture)[kind];
    if (!stem || name !== `${layersOf(architecture)}.${layer}.${kind}`)
      throw new FormatError(`gguf: modules must be some that ${architecture} has, got ${name}. Is --model its model?`);
    const { A, B } = reordered("gguf", name, module, architecture, halves, base);
    const tensor = `blk.${layer}.${stem}.weight`;
    return [plain.matrixToWrite(`${tensor}.lora_a`, A), plain.matrixToWrite(`${tensor}.lora_b`, B)];
  });
  const metadata: [string, GgufEntry][] = [
    ["general.architecture", { type: "string", value: architecture }],
    ["general.type", { type: "string", value: "adapter" }],
    ["general.base_model.count", { type: "u32", value: 1 }],
    ["general.base_model.0.name", { type: "string", value: baseModel }],
    ["adapter.type", { type: "string", value: "lora" }],
    ["adapter.lora.alpha", { type: "f32", value: alpha }],
  ];
  const isOther = alpha !== Math.fround(config.alpha);
  return {
    files: { "": encodeGguf(new Map(metadata), tensors) },
    notes: [
      ...(isOther ? [`gguf scales by alpha / rank: alpha is ${alpha} there, from ${config.alpha}`] : []),
      ...(folded.length > 0 ? [`gguf has one alpha, ${alpha}: that of ${listSome(folded, 3)} went into B`] : []),
    ],
  };
}

/** The module with the rows of B in another order, if it is a q or k of a model that has them in the order of neighbours. */
function reordered(
  file: string,
  name: string,
  module: plain.PlainModule,
  architecture: string,
  order: (B: plain.Matrix, heads: number) => plain.Matrix,
  base?: plain.BaseModel,
): plain.PlainModule {
  const [, which] = /\.self_attn\.([qk])_proj$/.exec(name) ?? [];
  if (!which || !PERMUTED.includes(architecture)) return module;
  if (!base)
    throw new FormatError(
      `${file}: the number of heads must be known, as they give the order of the rows of ${name}, got no model. Give --model; its config.json is enough`,
    );
  const heads = which === "q" ? base.heads : base.kvHeads;
  if (module.B.rows % (2 * heads) !== 0)
    throw new FormatError(
      `${file}: B of ${name} must have rows for ${heads} heads of an even size, got ${module.B.rows}. Is --model its model?`,
    );
  return { ...module, B: order(module.B, heads) };
}

/** From halves (x_j, x_{j+d/2}), as Hugging Face's RoPE turns, to pairs (x_2j, x_{2j+1}), as llama.cpp's does, within each head. */
const halves = (B: plain.Matrix, heads: number): plain.Matrix =>
  rowsOf(B, heads, (i, d) => (i % 2) * (d / 2) + Math.floor(i / 2));
/** Back. */
const paired = (B: plain.Matrix, heads: number): plain.Matrix =>
  rowsOf(B, heads, (i, d) => (i % (d / 2)) * 2 + Math.floor((2 * i) / d));

/** `from` tells which row of a head of d rows comes i-th. */
function rowsOf(
  { rows, columns, values }: plain.Matrix,
  heads: number,
  from: (i: number, d: number) => number,
): plain.Matrix {
  const d = rows / heads;
  return plain.matrix(rows, columns, (i, j) => values[(i - (i % d) + from(i % d, d)) * columns + j] ?? 0);
}

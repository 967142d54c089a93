/** A small Llama of random weights, written as a Hugging Face directory. */
import { cp, mkdir, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { memoryDirectory } from "../src/io/bytes.ts";
import { encodeFloats, type FloatDtype } from "../src/io/dtype.ts";
import { encodeSafetensors, type TensorToWrite } from "../src/io/safetensors.ts";
import { readConfig } from "../src/models/config.ts";
import { weightShapes } from "../src/models/load.ts";
import { Random } from "../src/tensor/random.ts";

export interface TinyModelOptions {
  /** Keys of config.json to replace; vocab_size 64, hidden_size 32, 2 layers and a context of 64 unless given. */
  readonly config?: Readonly<Record<string, unknown>>;
  readonly dtype?: FloatDtype;
  readonly seed?: number;
  /** With the tokenizer of demo/base: makes vocab_size 512. */
  readonly tokenizer?: boolean;
  /** Changes the tensors before they are written. */
  readonly edit?: (tensors: TensorToWrite[]) => TensorToWrite[];
}

/** Writes config.json, model.safetensors and, if asked for, the tokenizer's files. The same seed gives the same bytes. */
export async function writeTinyModel(path: string, options: TinyModelOptions = {}): Promise<void> {
  const { dtype = "F32", seed = 1, tokenizer = false, edit = (all) => all } = options;
  const config = JSON.stringify({
    architectures: ["LlamaForCausalLM"],
    model_type: "llama",
    vocab_size: tokenizer ? 512 : 64,
    hidden_size: 32,
    intermediate_size: 48,
    num_hidden_layers: 2,
    num_attention_heads: 4,
    num_key_value_heads: 2,
    max_position_embeddings: 64,
    rms_norm_eps: 1e-5,
    ...options.config,
  });
  // The shapes come from the sizes alone; a model_type that does not exist still gets its tensors.
  const sizes = { ...(JSON.parse(config) as object), model_type: "llama" };
  const shapes = weightShapes(await readConfig(memoryDirectory("tiny", { "config.json": JSON.stringify(sizes) })));
  const random = new Random(seed);
  const tensors = [...shapes].map(([name, shape]) => {
    const size = shape.reduce((a, b) => a * b, 1);
    const [mean, std] = /norm\.weight$/.test(name) ? [1, 0.1] : [0, 0.2];
    return floatTensor(
      name,
      shape,
      Float32Array.from({ length: size }, () => random.normal(mean, std)),
      dtype,
    );
  });
  await mkdir(path, { recursive: true });
  await writeFile(join(path, "config.json"), config);
  await writeFile(join(path, "model.safetensors"), encodeSafetensors(edit(tensors), { format: "pt" }));
  if (tokenizer)
    for (const file of ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
      await cp(new URL(`../demo/base/${file}`, import.meta.url), join(path, file));
}

/** A tensor for `encodeSafetensors`. */
export function floatTensor(
  name: string,
  shape: readonly number[],
  values: Float32Array,
  dtype: FloatDtype = "F32",
): TensorToWrite {
  const bytes = encodeFloats(dtype, values);
  return { name, dtype, shape, sizeBytes: bytes.byteLength, data: async () => bytes };
}

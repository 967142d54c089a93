/** `config.json` of a Hugging Face model, checked key by key. */
import type { Directory } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { type JsonObject, readJson } from "../io/json.ts";
import { type BertConfig, bertConfig, ENCODER_TYPES } from "./bert.ts";
import { DECODER_TYPES, type DecoderConfig, decoderConfig } from "./decoder-config.ts";
import { type Gpt2Config, gpt2Config } from "./gpt2.ts";

export type ModelConfig = DecoderConfig | Gpt2Config;

/** Reads `config.json` and `generation_config.json`. Throws FormatError for a model this engine has not, naming those it has. */
export async function readConfig(directory: Directory): Promise<ModelConfig> {
  const { json, name } = await openConfig(directory);
  const generation = (await readJson(directory, "generation_config.json")) ?? {};
  if (DECODER_TYPES.includes(String(json.model_type))) return decoderConfig(json, generation, name);
  if (json.model_type === "gpt2") return gpt2Config(json, generation, name);
  if (ENCODER_TYPES.includes(String(json.model_type)))
    throw new FormatError(
      `${name}: the model must predict tokens, got model_type ${json.model_type}, an encoder with a classifier. Load it with loadClassifier`,
    );
  throw new FormatError(
    `${name}: "model_type" must be one of ${[...DECODER_TYPES, "gpt2"].join(", ")}, got ${JSON.stringify(json.model_type)}`,
  );
}

/** Reads the `config.json` of an encoder with a classifier. Throws FormatError for a model that is none, naming those this engine has. */
export async function readClassifierConfig(directory: Directory): Promise<BertConfig> {
  const { json, name } = await openConfig(directory);
  if (ENCODER_TYPES.includes(String(json.model_type))) return bertConfig(json, name);
  throw new FormatError(
    `${name}: the "model_type" of a classifier must be one of ${ENCODER_TYPES.join(", ")}, got ${JSON.stringify(json.model_type)}`,
  );
}

/** Whether a model is an encoder with a classifier, or to get one. Throws FormatError where there is no `config.json`. */
export async function isClassifier(directory: Directory): Promise<boolean> {
  const { json } = await openConfig(directory);
  return ENCODER_TYPES.includes(String(json.model_type));
}

async function openConfig(directory: Directory): Promise<{ readonly json: JsonObject; readonly name: string }> {
  const name = `${directory.name}/config.json`;
  const json = await readJson(directory, "config.json");
  if (!json) throw new FormatError(`${name}: a model directory must have it, got no such file. Check the path`);
  return { json, name };
}

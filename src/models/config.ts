/** `config.json` of a Hugging Face model, checked key by key. */
import type { Directory } from "../io/bytes.ts";
import { FormatError } from "../io/errors.ts";
import { readJson } from "../io/json.ts";
import { DECODER_TYPES, type DecoderConfig, decoderConfig } from "./decoder-config.ts";
import { type Gpt2Config, gpt2Config } from "./gpt2.ts";

export type ModelConfig = DecoderConfig | Gpt2Config;

/** Reads `config.json` and `generation_config.json`. Throws FormatError for a model this engine has not, naming those it has. */
export async function readConfig(directory: Directory): Promise<ModelConfig> {
  const name = `${directory.name}/config.json`;
  const json = await readJson(directory, "config.json");
  if (!json) throw new FormatError(`${name}: a model directory must have it, got no such file. Check the path`);
  const generation = (await readJson(directory, "generation_config.json")) ?? {};
  if (DECODER_TYPES.includes(String(json.model_type))) return decoderConfig(json, generation, name);
  if (json.model_type === "gpt2") return gpt2Config(json, generation, name);
  throw new FormatError(
    `${name}: "model_type" must be one of ${[...DECODER_TYPES, "gpt2"].join(", ")}, got ${JSON.stringify(json.model_type)}`,
  );
}

import { Command } from "commander";
import { parseJsonObject } from "../io/json.ts";
import type { Tokenizer } from "../io/tokenizer.ts";
import type { CausalModel } from "../models/causal.ts";
import { diskDirectory } from "../node.ts";
import { type BeamSearchOptions, beamSearch } from "../serve/beam-search.ts";
import { jsonConstraint } from "../serve/constraint.ts";
import { generateTokens } from "../serve/generate.ts";
import type { SampledToken } from "../serve/sampling.ts";
import { textOf } from "../serve/text.ts";
import { ShapeError } from "../tensor/errors.ts";
import { loadTokenizer } from "../tokenizer.ts";
import {
  adapterOption,
  jsonOption,
  modelOption,
  quantizeOption,
  revisionOption,
  weightFormat,
  whole,
} from "./options.ts";
import { located } from "./places.ts";
import { type SamplingArguments, samplingOptions, temperatureOf } from "./sampling.ts";
import { openModel, readTextFile, result, say, withGpu } from "./session.ts";

interface GenerateArguments extends SamplingArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly adapter?: string;
  readonly prompt: string;
  readonly jsonSchema?: string;
  readonly beams?: number;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank generate --model models/base --prompt "Once upon a time"
  $ lowrank generate --model models/base --adapter adapters/pirate --prompt "Once" --temperature 0.8 --seed 7
  $ lowrank generate --model models/base --prompt "A person as JSON:" --json-schema person.json
  $ lowrank generate --model models/base --prompt "Once" --beams 4`;

export function generateCommand(): Command {
  const command = new Command("generate")
    .description(
      "continue a prompt, which is taken as it is; the text appears as it comes. Models of messages: see lowrank chat",
    )
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .addOption(adapterOption())
    .requiredOption("--prompt <text>", "text to continue");
  for (const option of samplingOptions("generate", 128)) command.addOption(option);
  return command
    .option("--json-schema <file>", "give nothing but JSON that fits the JSON Schema in this file")
    .addOption(whole("generate", "--beams <n>", "search for the likeliest text, with so many open ones at a time", 1))
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run(options: GenerateArguments): Promise<void> {
  const { model: path, adapter, prompt, json, stop, jsonSchema, beams, ...settings } = await located(options);
  const idle = beams === undefined ? undefined : NOT_WITH_BEAMS.find((name) => options[name] !== undefined);
  if (idle) throw new ShapeError(`generate: --beams must be without --${dashed(idle)}, got both`);
  const tokenizer = await loadTokenizer(diskDirectory(path));
  const promptIds = tokenizer.encode(prompt);
  const schema = jsonSchema === undefined ? undefined : parseJsonObject(await readTextFile(jsonSchema), jsonSchema);
  const constraint = schema && jsonConstraint(schema, tokenizer);
  await withGpu(async (gpu) => {
    const model = await openModel(gpu, path, weightFormat(options.quantize), adapter);
    if (beams !== undefined) {
      const answers = await search(model, tokenizer, {
        ...{ promptIds, maxTokens: settings.maxTokens, beams, constraint },
      });
      const [{ text, ids } = { text: "", ids: [] }] = answers;
      result(json ? JSON.stringify({ prompt, text, prompt_ids: promptIds, ids, answers }) : text);
      if (schema) sayIfCut(text, ids);
      return;
    }
    const ids: number[] = [];
    const sampling = { ...settings, temperature: temperatureOf(settings), promptIds, constraint };
    async function* tokens(): AsyncGenerator<SampledToken, void, undefined> {
      for await (const token of generateTokens(model, sampling)) {
        if (token.id !== tokenizer.eosId) ids.push(token.id);
        yield token;
      }
    }
    let text = "";
    for await (const piece of textOf(tokens(), { tokenizer, promptIds, stop, room: settings.maxTokens })) {
      if (!json) process.stdout.write(piece.text);
      text += piece.text;
    }
    result(json ? JSON.stringify({ prompt, text, prompt_ids: promptIds, ids }) : "");
    if (schema) sayIfCut(text, ids);
  });
}

/** What says how tokens are drawn, or where a text ends: a search has no use for it. */
const NOT_WITH_BEAMS = ["temperature", "topK", "topP", "minP", "repetitionPenalty", "seed", "stop"] as const;

const dashed = (name: string): string => name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);

interface FoundText {
  readonly text: string;
  readonly ids: readonly number[];
  readonly score: number;
}

async function search(
  model: CausalModel,
  tokenizer: Tokenizer,
  options: Pick<BeamSearchOptions, "promptIds" | "maxTokens" | "beams" | "constraint">,
): Promise<FoundText[]> {
  const ends = tokenizer.eosId === undefined ? [] : [tokenizer.eosId];
  const eosIds = [...new Set([...model.config.eosIds, ...ends])];
  const answers = await beamSearch(model, { ...options, eosIds });
  return Promise.all(
    answers.map(async ({ ids, score }) => ({ text: await textOfIds(tokenizer, options.promptIds, ids), ids, score })),
  );
}

async function textOfIds(tokenizer: Tokenizer, promptIds: readonly number[], ids: readonly number[]): Promise<string> {
  async function* tokens(): AsyncGenerator<SampledToken> {
    for (const id of ids) yield { id, logprob: 0, top: [] };
  }
  let text = "";
  for await (const piece of textOf(tokens(), { tokenizer, promptIds, room: ids.length })) text += piece.text;
  return text;
}

function sayIfCut(text: string, ids: readonly number[]): void {
  if (!isJson(text))
    say(`warning: the JSON is cut off after ${ids.length} tokens. Raise --max-tokens, or leave out --stop`);
}

function isJson(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

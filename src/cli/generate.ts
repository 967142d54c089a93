import { Command, type Option } from "commander";
import { parseJsonObject } from "../io/json.ts";
import type { Tokenizer } from "../io/tokenizer.ts";
import type { CausalModel } from "../models/causal.ts";
import { diskDirectory } from "../node.ts";
import { beamSearch } from "../serve/beam-search.ts";
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
  numeric,
  quantizeOption,
  revisionOption,
  weightFormat,
  whole,
} from "./options.ts";
import { located } from "./places.ts";
import { openModel, readTextFile, result, say, withGpu } from "./session.ts";

interface GenerateArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly adapter?: string;
  readonly prompt: string;
  readonly maxTokens: number;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  readonly repetitionPenalty?: number;
  readonly stop?: readonly string[];
  readonly jsonSchema?: string;
  readonly beams?: number;
  readonly seed?: number;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank generate --model models/base --prompt "Once upon a time"
  $ lowrank generate --model models/base --adapter adapters/pirate --prompt "Once" --temperature 0.8 --seed 7
  $ lowrank generate --model models/base --prompt "A person as JSON:" --json-schema person.json
  $ lowrank generate --model models/base --prompt "Once" --beams 4`;

export function generateCommand(): Command {
  return new Command("generate")
    .description("continue a prompt; the text appears as it comes, without the prompt")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .addOption(adapterOption())
    .requiredOption("--prompt <text>", "text to continue")
    .addOption(whole("generate", "--max-tokens <n>", "stop after so many tokens", 0, 128))
    .addOption(
      numeric(
        "generate",
        "--temperature <t>",
        "0: always the likeliest token; above: drawn at random (default: 0, or 1 with an option that limits the draw)",
        {
          rule: "a number of at least 0",
          holds: (x) => x >= 0 && Number.isFinite(x),
        },
      ),
    )
    .addOption(whole("generate", "--top-k <n>", "draw among so many of the likeliest tokens", 1))
    .addOption(
      share("--top-p <p>", "draw among the likeliest tokens that together have this share", (x) => x > 0 && x <= 1),
    )
    .addOption(
      share(
        "--min-p <p>",
        "draw tokens of at least this share of the likeliest one's probability",
        (x) => x >= 0 && x <= 1,
      ),
    )
    .addOption(
      numeric("generate", "--repetition-penalty <x>", "make tokens that were there less likely (above 1)", {
        rule: "a number above 0",
        holds: (x) => x > 0 && Number.isFinite(x),
      }),
    )
    .option("--stop <text...>", "end before any of these texts")
    .option("--json-schema <file>", "give nothing but JSON that fits the JSON Schema in this file")
    .addOption(whole("generate", "--beams <n>", "search for the likeliest text, with so many open ones at a time", 1))
    .addOption(whole("generate", "--seed <n>", "seed of the random draws (default: 0)", 0))
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

const share = (flags: string, description: string, holds: (x: number) => boolean): Option =>
  numeric("generate", flags, description, {
    rule: holds(0) ? "a number from 0 to 1" : "a number above 0 and at most 1",
    holds,
  });

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
      const answers = await search(model, tokenizer, { promptIds, maxTokens: settings.maxTokens, beams });
      const [{ text, ids } = { text: "", ids: [] }] = answers;
      result(json ? JSON.stringify({ prompt, text, prompt_ids: promptIds, ids, answers }) : text);
      return;
    }
    const ids: number[] = [];
    const isDrawn = [settings.topK, settings.topP, settings.minP].some((limit) => limit !== undefined);
    const sampling = { temperature: isDrawn ? 1 : 0, ...settings, promptIds, constraint };
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
    if (schema && !isJson(text))
      say(`warning: the JSON is cut off after ${ids.length} tokens. Raise --max-tokens, or leave out --stop`);
  });
}

/** What says how tokens are drawn, or where a text ends: a search has no use for it. */
const NOT_WITH_BEAMS = [
  "temperature",
  "topK",
  "topP",
  "minP",
  "repetitionPenalty",
  "seed",
  "stop",
  "jsonSchema",
] as const;

const dashed = (name: string): string => name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);

interface FoundText {
  readonly text: string;
  readonly ids: readonly number[];
  readonly score: number;
}

async function search(
  model: CausalModel,
  tokenizer: Tokenizer,
  options: { readonly promptIds: readonly number[]; readonly maxTokens: number; readonly beams: number },
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

function isJson(text: string): boolean {
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}

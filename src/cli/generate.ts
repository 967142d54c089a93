import { Command, type Option } from "commander";
import { diskDirectory } from "../node.ts";
import { generateTokens } from "../serve/generate.ts";
import type { SampledToken } from "../serve/sampling.ts";
import { textOf } from "../serve/text.ts";
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
import { openModel, result, withGpu } from "./session.ts";

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
  readonly seed: number;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank generate --model models/base --prompt "Once upon a time"
  $ lowrank generate --model models/base --adapter adapters/pirate --prompt "Once" --temperature 0.8 --seed 7`;

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
    .addOption(whole("generate", "--seed <n>", "seed of the random draws", 0, 0))
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
  const { model: path, adapter, prompt, json, stop, ...settings } = await located(options);
  const tokenizer = await loadTokenizer(diskDirectory(path));
  const promptIds = tokenizer.encode(prompt);
  await withGpu(async (gpu) => {
    const model = await openModel(gpu, path, weightFormat(options.quantize), adapter);
    const ids: number[] = [];
    const isDrawn = [settings.topK, settings.topP, settings.minP].some((limit) => limit !== undefined);
    async function* tokens(): AsyncGenerator<SampledToken, void, undefined> {
      for await (const token of generateTokens(model, { temperature: isDrawn ? 1 : 0, ...settings, promptIds })) {
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
  });
}

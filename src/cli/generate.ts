import { Command } from "commander";
import type { Tokenizer } from "../io/tokenizer.ts";
import { diskDirectory } from "../node.ts";
import { generate } from "../serve/generate.ts";
import { loadTokenizer } from "../tokenizer.ts";
import {
  adapterOption,
  amount,
  jsonOption,
  modelOption,
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
  readonly temperature: number;
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
    .addOption(amount("generate", "--temperature <t>", "0: always the likeliest token; above: drawn at random", 0))
    .addOption(whole("generate", "--seed <n>", "seed of the random draws", 0, 0))
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run(options: GenerateArguments): Promise<void> {
  const { model: path, adapter, prompt, json, maxTokens, temperature, seed } = await located(options);
  const tokenizer = await loadTokenizer(diskDirectory(path));
  const promptIds = tokenizer.encode(prompt);
  await withGpu(async (gpu) => {
    const model = await openModel(gpu, path, weightFormat(options.quantize), adapter);
    const ids: number[] = [];
    let shown = 0;
    const show = (soFar: string): void => {
      if (!json && soFar.length > shown) process.stdout.write(soFar.slice(shown));
      shown = Math.max(shown, soFar.length);
    };
    for await (const id of generate(model, { promptIds, maxTokens, temperature, seed })) {
      if (id === tokenizer.eosId) break;
      ids.push(id);
      show(continuation(tokenizer, promptIds, ids).replace(/\ufffd+$/, "")); // may be a character still in pieces
    }
    const text = continuation(tokenizer, promptIds, ids);
    show(text);
    result(json ? JSON.stringify({ prompt, text, prompt_ids: promptIds, ids }) : "");
  });
}

/** The text that `ids` add to the prompt: decoded with it, for a decoder may drop a space at the start of a text. */
function continuation(tokenizer: Tokenizer, promptIds: readonly number[], ids: readonly number[]): string {
  const [before, all] = [tokenizer.decode(promptIds), tokenizer.decode([...promptIds, ...ids])];
  return all.startsWith(before) ? all.slice(before.length) : tokenizer.decode(ids);
}

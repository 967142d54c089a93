import { createInterface } from "node:readline";
import { Command } from "commander";
import type { ChatTemplate } from "../io/chat-template.ts";
import { FormatError } from "../io/errors.ts";
import type { Tokenizer } from "../io/tokenizer.ts";
import { diskDirectory } from "../node.ts";
import type { BatchEngine } from "../serve/batch-engine.ts";
import { textOf } from "../serve/text.ts";
import { ShapeError } from "../tensor/errors.ts";
import { loadTokenizer } from "../tokenizer.ts";
import { adaptersOf, openEngine } from "./engine.ts";
import { modelOption, numeric, quantizeOption, revisionOption, whole } from "./options.ts";
import { located } from "./places.ts";
import { openTemplate, say, withGpu } from "./session.ts";

interface ChatArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly adapter?: readonly string[];
  readonly chatTemplate?: string;
  readonly system?: string;
  readonly maxTokens: number;
  readonly temperature: number;
  readonly seed?: number;
}

const EXAMPLES = `
Examples:
  $ lowrank chat --model models/base --adapter pirate=adapters/pirate --adapter letter=adapters/letter
  > /adapter pirate
  > Tell me of the sea.`;

const HELP = `/adapter NAME  answer by this adapter     /adapter     which there are, and which answers
/base          answer by the base alone     /clear       forget what was said
/system TEXT   how to answer, from now on   /help, /quit`;

const BASE = "base";

const freshSeed = (): number => crypto.getRandomValues(new Uint32Array(1))[0] ?? 0;

export function chatCommand(): Command {
  return new Command("chat")
    .description("talk with the model and its adapters, line by line; /help tells what else a line may be")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .option("--adapter <name=place...>", "an adapter and its name: a PEFT directory, or org/name[@revision] on the Hub")
    .option("--chat-template <file>", "Jinja file that writes messages as text, or chatml (default: the model's own)")
    .option("--system <text>", "how to answer")
    .addOption(whole("chat", "--max-tokens <n>", "longest answer", 1, 256))
    .addOption(
      numeric("chat", "--temperature <t>", "0: always the likeliest token; above: drawn at random", {
        rule: "a number of at least 0",
        holds: (x) => x >= 0 && Number.isFinite(x),
        preset: 0.7,
      }),
    )
    .addOption(whole("chat", "--seed <n>", "seed of the random draws (default: another one for each answer)", 0))
    .addHelpText("after", EXAMPLES)
    .action(run);
}

async function run(options: ChatArguments): Promise<void> {
  const { model: path } = await located({
    model: options.model,
    ...(options.revision !== undefined && { revision: options.revision }),
  });
  const adapters = await adaptersOf("chat", options.adapter ?? [], BASE);
  const tokenizer = await loadTokenizer(diskDirectory(path));
  const render = await openTemplate(path, options.chatTemplate);
  if (!render)
    throw new ShapeError(
      `chat: the model must have a chat template, got none in ${path}. Give --chat-template FILE or chatml, or use lowrank generate`,
    );
  await withGpu(async (gpu) => {
    const limits = { maxRows: 1, maxStepTokens: 256, maxQueue: 1, maxLoras: 8, cacheFormat: "f32" } as const;
    const engine = await openEngine(gpu, path, adapters, { ...options, ...limits });
    const talk = new Talk(engine, { ...options, tokenizer, render });
    const lines = createInterface({ input: process.stdin, terminal: false });
    let answering: AbortController | undefined;
    const interrupt = (): void => {
      if (answering) answering.abort();
      else lines.close();
    };
    process.on("SIGINT", interrupt);
    const prompt = (): void => {
      if (process.stdin.isTTY) process.stdout.write(`${talk.adapter ?? BASE}> `);
    };
    try {
      prompt();
      for await (const given of lines) {
        const line = given.trim();
        if (line === "/quit") break;
        const note = talk.command(line);
        if (note !== undefined) say(note);
        else if (line !== "") {
          answering = new AbortController();
          await talk.answer(line, answering.signal);
          answering = undefined;
        }
        prompt();
      }
    } finally {
      process.off("SIGINT", interrupt);
      await engine.close();
    }
  });
}

type Message = Readonly<Record<"role" | "content", string>>;

interface TalkOptions extends Pick<ChatArguments, "system" | "maxTokens" | "temperature" | "seed"> {
  readonly tokenizer: Tokenizer;
  readonly render: ChatTemplate;
}

/** What was said, and who answers. */
class Talk {
  readonly #engine: BatchEngine;
  readonly #options: TalkOptions;
  #system: string | undefined;
  #messages: readonly Message[] = [];
  adapter: string | undefined;

  constructor(engine: BatchEngine, options: TalkOptions) {
    this.#engine = engine;
    this.#options = options;
    this.#system = options.system;
  }

  /** Says the answer to a line as it comes. One that is cut off stays as it is; a line that cannot be answered is forgotten. */
  async answer(line: string, signal: AbortSignal): Promise<void> {
    const { tokenizer, render, maxTokens, temperature, seed = freshSeed() } = this.#options;
    const asked = [...this.#messages, { role: "user", content: line }];
    const system = this.#system ? [{ role: "system", content: this.#system }] : [];
    try {
      const prompt = render.render({ messages: [...system, ...asked], addGenerationPrompt: true });
      const promptIds = tokenizer.encode(prompt, { addSpecialTokens: false });
      const room = Math.min(maxTokens, this.#engine.contextLength - promptIds.length);
      const request = { adapter: this.adapter, promptIds, maxTokens, temperature, seed, signal };
      let text = "";
      for await (const piece of textOf(this.#engine.generate(request), { tokenizer, promptIds, room })) {
        process.stdout.write(piece.text);
        text += piece.text;
      }
      process.stdout.write("\n");
      this.#messages = [...asked, { role: "assistant", content: text }];
    } catch (error) {
      if (!(error instanceof ShapeError || error instanceof FormatError)) throw error;
      say(`${error.message}. /clear forgets what was said`);
    }
  }

  /** Does what a line that begins with a slash says, and tells what was done; undefined for another line. */
  command(line: string): string | undefined {
    const [, name, rest = ""] = /^\/(\S*)\s*(.*)$/s.exec(line) ?? [];
    if (name === undefined) return undefined;
    switch (name) {
      case "adapter":
        return this.#choose(rest);
      case "base":
        this.adapter = undefined;
        return "the base answers";
      case "clear":
        this.#messages = [];
        return "forgotten";
      case "system":
        this.#system = rest || undefined;
        return rest ? "noted" : "no system message any more";
      case "help":
        return HELP;
      default:
        return `there is no /${name}. ${HELP}`;
    }
  }

  #choose(name: string): string {
    const { adapters } = this.#engine;
    const all = adapters.join(", ") || "none";
    if (name === "") return `adapters: ${all}; ${this.adapter ?? "the base"} answers`;
    if (!adapters.includes(name)) return `the adapter must be one of ${all}, got "${name}"`;
    this.adapter = name;
    return `${name} answers`;
  }
}

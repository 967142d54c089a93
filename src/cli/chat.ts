import { createInterface } from "node:readline/promises";
import { Command } from "commander";
import { FormatError } from "../io/errors.ts";
import { diskDirectory } from "../io/files.ts";
import { readConfig } from "../models/config.ts";
import { Chat } from "../serve/chat.ts";
import { ShapeError } from "../tensor/errors.ts";
import { loadTokenizer } from "../tokenizer.ts";
import { adaptersOf, type CacheArguments, cacheOptions, namedAdaptersOption, openEngine } from "./engine.ts";
import { modelOption, quantizeOption, revisionOption, templateOption } from "./options.ts";
import { located } from "./places.ts";
import { configOption } from "./run-config.ts";
import { type SamplingArguments, samplingOptions, temperatureOf } from "./sampling.ts";
import { openTemplate, result, say, withGpu } from "./session.ts";

interface ChatArguments extends SamplingArguments, CacheArguments {
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly adapter?: readonly string[];
  readonly chatTemplate?: string;
  readonly system?: string;
}

const COMMANDS = `/adapter NAME  answer by this adapter
/adapter       list the adapters
/base          answer by the base alone
/system TEXT   say this before the conversation; without TEXT say nothing
/clear         forget the conversation
/help          list the commands
/quit          end, as Ctrl-D does; Ctrl-C stops an answer, and ends where there is none`;

const EXAMPLES = `
Lines are said to the model, but for these commands:
${COMMANDS.replace(/^/gm, "  ")}

Examples:
  $ lowrank chat --model org/name-instruct --adapter pirate=adapters/pirate
  $ printf 'Who are you?\\n/adapter pirate\\nAnd now?\\n' | lowrank chat --model models/base --adapter pirate=adapters/pirate --chat-template chatml`;

export function chatCommand(): Command {
  const command = new Command("chat")
    .description("talk to a model and its adapters in the terminal; lines may come from a pipe")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .addOption(templateOption())
    .addOption(namedAdaptersOption())
    .option("--system <text>", "said before the conversation");
  for (const option of [...samplingOptions("chat", 512), ...cacheOptions("chat")]) command.addOption(option);
  return command.addOption(configOption()).addHelpText("after", EXAMPLES).action(run);
}

async function run(options: ChatArguments): Promise<void> {
  const { model: path } = await located({
    model: options.model,
    ...(options.revision !== undefined && { revision: options.revision }),
  });
  const tokenizer = await loadTokenizer(diskDirectory(path));
  const renderChat = await openTemplate(path, options.chatTemplate);
  if (!renderChat)
    throw new ShapeError(
      `chat: the model must have a chat template, got none in ${options.model}. Give --chat-template, or use lowrank generate`,
    );
  const places = await adaptersOf("chat", options.adapter ?? []);
  await withGpu(async (gpu) => {
    const {
      quantize,
      cacheFormat,
      context: contextLength = (await readConfig(diskDirectory(path))).contextLength,
    } = options;
    // The base and an adapter keep what they know of one conversation.
    const settings = { contextLength, cacheTokens: 2 * contextLength, cacheFormat, maxRows: 1 };
    const engine = await openEngine(gpu, path, places, { ...settings, quantize });
    await converse(new Conversation(new Chat(engine, { tokenizer, renderChat }), options));
    await engine.close();
  });
}

/** Answers the lines of stdin until they end, or until somebody ends it. */
async function converse(conversation: Conversation): Promise<void> {
  const terminal = Boolean(process.stdin.isTTY && process.stderr.isTTY);
  const lines = createInterface({ input: process.stdin, output: process.stderr, terminal });
  let isOver = false;
  const interrupt = (): void => {
    if (conversation.stop()) return;
    isOver = true;
    lines.close();
  };
  const prompt = (): void => {
    lines.setPrompt(`${conversation.adapter ?? ""}> `);
    if (terminal && !isOver) lines.prompt();
  };
  lines.on("SIGINT", interrupt);
  process.on("SIGINT", interrupt);
  if (terminal) say("/help lists the commands");
  try {
    prompt();
    for await (const line of lines) {
      try {
        if (!isOver) isOver = await conversation.take(line.trim());
      } catch (error) {
        if (!(error instanceof ShapeError || error instanceof FormatError)) throw error;
        say(`error: ${error.message}`);
        if (!terminal) process.exitCode = 1;
      }
      if (isOver) break;
      prompt();
    }
  } finally {
    process.off("SIGINT", interrupt);
    lines.close();
  }
}

type Message = { readonly role: "user" | "assistant"; readonly content: string };

/** What was said, and by whom the next answer is. */
class Conversation {
  readonly #chat: Chat;
  readonly #sampling: SamplingArguments;
  #messages: readonly Message[] = [];
  #system: string;
  #adapter: string | undefined;
  #answers = 0;
  #stop: AbortController | undefined;

  constructor(chat: Chat, { system = "", ...sampling }: ChatArguments) {
    this.#chat = chat;
    this.#system = system;
    this.#sampling = sampling;
  }

  get adapter(): string | undefined {
    return this.#adapter;
  }

  /** Stops the answer, if there is one that was not stopped before. */
  stop(): boolean {
    if (!this.#stop || this.#stop.signal.aborted) return false;
    this.#stop.abort();
    return true;
  }

  /** Answers a line or does what it commands; true where that is to end. Throws ShapeError or FormatError for what cannot be. */
  async take(line: string): Promise<boolean> {
    if (line === "") return false;
    const [, command, rest = ""] = /^\/(\S*)\s*(.*)$/s.exec(line) ?? [];
    if (command === undefined) {
      await this.#answer(line);
      return false;
    }
    switch (command) {
      case "adapter":
        if (rest === "") say(this.#adapterList());
        else this.#adapter = this.#known(rest);
        break;
      case "base":
        this.#adapter = undefined;
        break;
      case "clear":
        this.#messages = [];
        break;
      case "system":
        this.#system = rest;
        break;
      case "help":
        say(COMMANDS);
        break;
      case "quit":
        return true;
      default:
        throw new ShapeError(
          `chat: the command must be one of /adapter, /base, /system, /clear, /help and /quit, got /${command}`,
        );
    }
    return false;
  }

  #known(name: string): string {
    const { adapters } = this.#chat;
    if (!adapters.includes(name))
      throw new ShapeError(`chat: the adapter must be one of ${adapters.join(", ") || "none"}, got "${name}"`);
    return name;
  }

  #adapterList(): string {
    return `adapters: ${this.#chat.adapters.join(", ") || "none"}; answers are by ${this.#adapter ?? "the base"}`;
  }

  async #answer(text: string): Promise<void> {
    const { seed = 0 } = this.#sampling;
    const said: readonly Message[] = [...this.#messages, { role: "user", content: text }];
    const system = this.#system === "" ? [] : [{ role: "system", content: this.#system }];
    const stop = new AbortController();
    this.#stop = stop;
    let [answer, count, isCut] = ["", 0, false];
    try {
      for await (const piece of this.#chat.ask({
        ...this.#sampling,
        ...{ temperature: temperatureOf(this.#sampling), seed: seed + this.#answers },
        ...{ messages: [...system, ...said], adapter: this.#adapter, signal: stop.signal },
      })) {
        process.stdout.write(piece.text);
        answer += piece.text;
        count += piece.tokens.length;
        isCut = piece.finishReason === "length";
      }
      result("");
      if (isCut) say(`the answer is cut off after ${count} tokens: by --max-tokens, or the end of the context`);
      this.#answers++;
      if (answer !== "" || !stop.signal.aborted) this.#messages = [...said, { role: "assistant", content: answer }];
    } finally {
      this.#stop = undefined;
    }
  }
}

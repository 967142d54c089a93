/** What scripts/golden/chat.py made. */
import { readFileSync } from "node:fs";
import { memoryDirectory } from "../../../src/io/bytes.ts";
import { type ChatTemplate, chatTemplate } from "../../../src/io/chat-template.ts";
import type { JsonObject } from "../../../src/io/json.ts";
import { loadTokenizer, type Tokenizer } from "../../../src/io/tokenizer.ts";

const here = (name: string): string => readFileSync(new URL(name, import.meta.url), "utf8");

export interface GoldenChat {
  readonly text?: string;
  readonly error?: string;
  readonly ids?: readonly number[];
  /** 1 where transformers says that the assistant wrote the token. */
  readonly mask?: readonly number[];
}

export interface GoldenCase {
  readonly messages: readonly JsonObject[];
  readonly tools?: readonly JsonObject[];
  readonly addGenerationPrompt?: boolean;
}

export const TEMPLATES = ["chatml", "headers", "instructions"] as const;

type Golden = Readonly<Record<(typeof TEMPLATES)[number], Readonly<Record<string, GoldenChat>>>> & {
  readonly special: Readonly<Record<string, number>>;
  readonly cases: Readonly<Record<string, GoldenCase>>;
  readonly real: Readonly<Record<string, { readonly sha256: string; readonly ids: number }>>;
};

export const golden = JSON.parse(here("golden.json")) as Golden;

export const goldenTemplate = (name: string): ChatTemplate =>
  chatTemplate(here(`${name}.jinja`), `${name}.jinja`, { bos_token: "<s>", eos_token: "</s>" });

/** The tokenizer of demo/base with the marks of the three templates. */
export async function goldenTokenizer(): Promise<Tokenizer> {
  const definition = JSON.parse(here("../../../demo/base/tokenizer.json")) as { added_tokens: object[] };
  for (const [content, id] of Object.entries(golden.special))
    definition.added_tokens.push({
      ...{ id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true },
    });
  return loadTokenizer(
    memoryDirectory("golden", {
      "tokenizer.json": JSON.stringify(definition),
      "tokenizer_config.json": here("../../../demo/base/tokenizer_config.json"),
    }),
  );
}

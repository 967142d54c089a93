/** Examples → token ids, and which of them are learned. */
import type { ChatTemplate } from "../../io/chat-template.ts";
import { FormatError } from "../../io/errors.ts";
import { excerpt } from "../../io/json.ts";
import type { Tokenizer } from "../../io/tokenizer.ts";
import { chatRow } from "./chat.ts";
import type { Example, Segment } from "./forms.ts";
import { commonPrefix, type Encoded, type LossOn, masked } from "./masks.ts";
import { IGNORED } from "./row.ts";

/** What encoding takes. */
export interface Encoder {
  readonly tokenizer: Tokenizer | undefined;
  readonly chatTemplate: ChatTemplate | undefined;
  readonly lossOn: LossOn | undefined;
  /** Rows of the model's embedding. */
  readonly vocabSize: number;
  /** Ids of the prompts seen lately: many files have several completions of each. */
  readonly promptIds: Map<string, readonly number[]>;
}

const MOST_PROMPTS = 10_000;

/** Throws a FormatError. */
export function encodeExample(example: Example, encoder: Encoder, where: string): Encoded {
  if (example.kind === "ids") return idsRow(example.inputIds, example.labels, encoder.vocabSize, where);
  const { tokenizer, lossOn, vocabSize } = encoder;
  if (!tokenizer)
    throw new FormatError(
      `${where}: a row of text needs a tokenizer, got a model without one. Use rows of {"input_ids"}`,
    );
  const encoded = encodeText(example, encoder, tokenizer, lossOn, where);
  checkIds(encoded.inputIds, "the tokenizer's ids", where, vocabSize);
  return encoded;
}

function encodeText(
  example: Exclude<Example, { kind: "ids" }>,
  { chatTemplate, promptIds }: Encoder,
  tokenizer: Tokenizer,
  lossOn: LossOn | undefined,
  where: string,
): Encoded {
  if (example.kind === "chat") {
    if (!chatTemplate)
      throw new FormatError(
        `${where}: messages need a chat template, got a model without one. Give one, such as --chat-template chatml`,
      );
    return chatRow(example, chatTemplate, tokenizer, lossOn, where);
  }
  if (example.kind === "segments") return segmentsRow(example.segments, tokenizer);
  if (example.kind === "completion") {
    const inputIds = ended(tokenizer.encode(example.prompt + example.completion), tokenizer);
    if (lossOn === "all") return { inputIds, labels: inputIds, unclear: false };
    return learnedAfter(promptIdsOf(example.prompt, tokenizer, promptIds), inputIds);
  }
  if (lossOn !== undefined && lossOn !== "all")
    throw new FormatError(
      `${where}: a row of text can be learned as a whole, got --loss-on ${lossOn}. Use all, or leave it out`,
    );
  const inputIds = ended(tokenizer.encode(example.text), tokenizer);
  return { inputIds, labels: inputIds, unclear: false };
}

/** With an EOS at the end where there is none. */
function ended(ids: number[], { eosId }: Tokenizer): number[] {
  if (eosId !== undefined && ids.at(-1) !== eosId) ids.push(eosId);
  return ids;
}

function promptIdsOf(prompt: string, tokenizer: Tokenizer, seen: Map<string, readonly number[]>): readonly number[] {
  const ids = seen.get(prompt) ?? tokenizer.encode(prompt);
  if (seen.size >= MOST_PROMPTS) seen.clear();
  seen.set(prompt, ids);
  return ids;
}

function learnedAfter(prompt: readonly number[], inputIds: number[]): Encoded {
  const start = commonPrefix(prompt, inputIds);
  return { inputIds, labels: masked(inputIds, [[start, inputIds.length]]), unclear: start < prompt.length };
}

/** Each segment by itself, with no token but its own. */
function segmentsRow(segments: readonly Segment[], tokenizer: Tokenizer): Encoded {
  const parts = segments.map(({ text, isLearned }) => {
    const ids = tokenizer.encode(text, { addSpecialTokens: false });
    return { ids, labels: isLearned ? ids : ids.map(() => IGNORED) };
  });
  return { inputIds: parts.flatMap(({ ids }) => ids), labels: parts.flatMap(({ labels }) => labels), unclear: false };
}

function idsRow(given: unknown, labelled: unknown, vocabSize: number, where: string): Encoded {
  const inputIds = checkIds(given, "input_ids", where, vocabSize);
  if (inputIds.length === 0) throw new FormatError(`${where}: input_ids must have at least one id, got none`);
  if (labelled === undefined) return { inputIds, labels: inputIds, unclear: false };
  const labels = checkIds(labelled, "labels", where, vocabSize, IGNORED);
  if (labels.length !== inputIds.length)
    throw new FormatError(
      `${where}: labels must be as many as input_ids (${inputIds.length}), got ${labels.length}. Do not shift them, and write ${IGNORED} where a token is not to be learned`,
    );
  return { inputIds, labels, unclear: false };
}

function checkIds(value: unknown, name: string, where: string, vocabSize: number, alsoAllowed?: number): number[] {
  if (!Array.isArray(value))
    throw new FormatError(`${where}: ${name} must be a list of ids, got ${excerpt(JSON.stringify(value))}`);
  const bad = value.findIndex((id) => id !== alsoAllowed && !(Number.isInteger(id) && id >= 0 && id < vocabSize));
  if (bad >= 0)
    throw new FormatError(
      `${where}: ${name} must be whole numbers from 0 to ${vocabSize - 1}${alsoAllowed === undefined ? "" : ` or ${alsoAllowed}`}, got ${shown(value[bad])} at index ${bad}. Was this made for another model?`,
    );
  return value;
}

const shown = (value: unknown): string => (typeof value === "number" ? String(value) : excerpt(JSON.stringify(value)));

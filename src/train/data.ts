/** JSONL → rows of token ids with labels. */
import { FormatError } from "../io/errors.ts";
import { excerpt, type JsonObject, parseJsonObject } from "../io/json.ts";
import type { Tokenizer } from "../io/tokenizer.ts";
import { ShapeError } from "../tensor/errors.ts";

/** A label that takes no part in the loss. */
export const IGNORED = -100;

export interface Row {
  readonly inputIds: readonly number[];
  /** As long as inputIds and not shifted: labels[t] is inputIds[t], or IGNORED. */
  readonly labels: readonly number[];
}

export interface DataStats {
  /** Rows kept. */
  readonly rows: number;
  /** Rows cut to maxLength. */
  readonly truncated: number;
  /** Rows left out because no label remained (after the shift by one). */
  readonly dropped: number;
  /** Ids of the rows kept, and how many of them are a target of the loss. */
  readonly tokens: number;
  readonly trainedTokens: number;
  /** Rows whose prompt, tokenised alone, is not a prefix of prompt + completion: the loss starts where the two part. */
  readonly unclearBoundaries: number;
}

export interface DataLimits {
  /** Longer rows are cut. */
  readonly maxLength: number;
  /** Positions of the model. */
  readonly contextLength: number;
  /** Rows of the model's embedding. */
  readonly vocabSize: number;
}

const FORMS = '{"text"}, {"prompt","completion"}, {"input_ids"} or {"input_ids","labels"}';

/**
 * Reads one JSON object per line, in these forms:
 *
 *     {"text"}                  loss on every token
 *     {"prompt","completion"}   loss on the completion; where it starts is the common prefix of prompt and prompt + completion
 *     {"input_ids","labels"?}   as they are; labels default to input_ids
 *
 * Text gets the special tokens of the tokenizer's template, and an EOS at the end where it has none; the EOS is learned too.
 * Throws a FormatError that names file and line, and a ShapeError if maxLength does not suit the model.
 */
export function readRows(
  text: string,
  fileName: string,
  tokenizer: Tokenizer | undefined,
  { maxLength, contextLength, vocabSize }: DataLimits,
): { rows: Row[]; stats: DataStats } {
  if (!Number.isInteger(maxLength) || maxLength < 2)
    throw new ShapeError(`readRows: maxLength must be a whole number of at least 2, got ${maxLength}`);
  if (maxLength > contextLength)
    throw new ShapeError(
      `readRows: maxLength must be at most the model's context of ${contextLength}, got ${maxLength}. Set it to ${contextLength} or less`,
    );
  const rows: Row[] = [];
  let [truncated, dropped, tokens, trainedTokens, unclearBoundaries] = [0, 0, 0, 0, 0];
  for (const [index, line] of text
    .replace(/^\ufeff/, "")
    .split("\n")
    .entries()) {
    if (line.trim() === "") continue;
    const where = `${fileName}:${index + 1}`;
    const full = parseRow(parseJsonObject(line, where), where, tokenizer, vocabSize);
    if (full.unclear) unclearBoundaries++;
    if (full.inputIds.length > maxLength) truncated++;
    const row = { inputIds: full.inputIds.slice(0, maxLength), labels: full.labels.slice(0, maxLength) };
    const trained = trainedCount(row);
    if (trained === 0) {
      dropped++;
      continue;
    }
    rows.push(row);
    tokens += row.inputIds.length;
    trainedTokens += trained;
  }
  if (rows.length === 0)
    throw new FormatError(
      dropped === 0
        ? `${fileName}: must have at least one row, got an empty file. Write one JSON object per line: ${FORMS}`
        : `${fileName}: a row must leave a token to learn, got ${dropped} rows with none in their first ${maxLength}. Raise maxLength, or shorten the prompts`,
    );
  return { rows, stats: { rows: rows.length, truncated, dropped, tokens, trainedTokens, unclearBoundaries } };
}

/** Targets of the loss in one row: the first label is nobody's target. */
const trainedCount = ({ labels }: Row): number =>
  labels.reduce((n, label, t) => n + Number(t > 0 && label !== IGNORED), 0);

function parseRow(
  row: JsonObject,
  where: string,
  tokenizer: Tokenizer | undefined,
  vocabSize: number,
): Row & { readonly unclear?: boolean } {
  const keys = Object.keys(row).sort().join(" ");
  if (keys === "input_ids" || keys === "input_ids labels") return idsRow(row, where, vocabSize);
  if (keys !== "text" && keys !== "completion prompt")
    throw new FormatError(
      `${where}: a row must be ${FORMS}, got ${
        Object.keys(row)
          .map((key) => JSON.stringify(excerpt(key)))
          .join(", ") || "no keys"
      }`,
    );
  const string = (key: string): string => {
    const value = row[key];
    if (typeof value !== "string")
      throw new FormatError(`${where}: "${key}" must be a string, got ${excerpt(JSON.stringify(value))}`);
    return value;
  };
  const prompt = keys === "text" ? undefined : string("prompt");
  const written = prompt === undefined ? string("text") : prompt + string("completion");
  if (!tokenizer)
    throw new FormatError(
      `${where}: a row of text needs a tokenizer, got a model without one. Use rows of {"input_ids"}`,
    );
  const inputIds = tokenizer.encode(written);
  if (tokenizer.eosId !== undefined && inputIds.at(-1) !== tokenizer.eosId) inputIds.push(tokenizer.eosId);
  checkIds(inputIds, "the tokenizer's ids", where, vocabSize);
  if (prompt === undefined) return { inputIds, labels: inputIds };
  const promptIds = tokenizer.encode(prompt);
  const parting = promptIds.findIndex((id, t) => id !== inputIds[t]);
  const start = parting < 0 ? promptIds.length : parting;
  return { inputIds, labels: inputIds.map((id, t) => (t < start ? IGNORED : id)), unclear: parting >= 0 };
}

function idsRow(row: JsonObject, where: string, vocabSize: number): Row {
  const inputIds = checkIds(row.input_ids, "input_ids", where, vocabSize);
  if (inputIds.length === 0) throw new FormatError(`${where}: input_ids must have at least one id, got none`);
  if (row.labels === undefined) return { inputIds, labels: inputIds };
  const labels = checkIds(row.labels, "labels", where, vocabSize, IGNORED);
  if (labels.length !== inputIds.length)
    throw new FormatError(
      `${where}: labels must be as many as input_ids (${inputIds.length}), got ${labels.length}. Do not shift them, and write ${IGNORED} where a token is not to be learned`,
    );
  return { inputIds, labels };
}

function checkIds(value: unknown, name: string, where: string, vocabSize: number, alsoAllowed?: number): number[] {
  if (!Array.isArray(value))
    throw new FormatError(`${where}: ${name} must be a list of ids, got ${excerpt(JSON.stringify(value))}`);
  const bad = value.findIndex((id) => id !== alsoAllowed && !(Number.isInteger(id) && id >= 0 && id < vocabSize));
  if (bad >= 0)
    throw new FormatError(
      `${where}: ${name} must be whole numbers from 0 to ${vocabSize - 1}${alsoAllowed === undefined ? "" : ` or ${alsoAllowed}`}, got ${excerpt(JSON.stringify(value[bad]))} at index ${bad}. Was this made for another model?`,
    );
  return value;
}

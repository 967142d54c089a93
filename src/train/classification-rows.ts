/** JSONL → rows with a class. */
import { FormatError } from "../io/errors.ts";
import { excerpt, type JsonObject, parseJsonObject } from "../io/json.ts";
import type { PairTokenizer } from "../io/tokenizer.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { ClassificationRow, ClassifierLimits } from "./classify.ts";

export interface ClassificationLimits extends ClassifierLimits {
  /** Longer rows are cut. */
  readonly maxLength: number;
  /** Tokens that a row of the model may have. */
  readonly contextLength: number;
}

export interface ClassificationStats {
  readonly rows: number;
  /** Rows cut to maxLength. */
  readonly truncated: number;
  readonly tokens: number;
  /** Rows of each class. */
  readonly counts: readonly number[];
}

const FORMS = '{"text","label"}, {"text","text_pair","label"} or {"input_ids","label"}';

/**
 * Reads one JSON object per line, in these forms:
 *
 *     {"text","label"}, {"text","text_pair","label"}       "sentence" may stand for "text"
 *     {"input_ids","token_type_ids"?,"label"}              as they are, cut at the end
 *
 * A label is the number or the name of a class. Text gets the special tokens of the tokenizer's template. Throws FormatError that names file
 * and line, and ShapeError if maxLength does not suit the model.
 */
export function readClassificationRows(
  text: string,
  fileName: string,
  tokenizer: PairTokenizer | undefined,
  limits: ClassificationLimits,
): { rows: ClassificationRow[]; stats: ClassificationStats } {
  const { maxLength, contextLength, labels } = limits;
  if (!Number.isInteger(maxLength) || maxLength < 4 || maxLength > contextLength)
    throw new ShapeError(
      `readClassificationRows: maxLength must be a whole number from 4 to the model's context of ${contextLength}, got ${maxLength}`,
    );
  const rows: ClassificationRow[] = [];
  let truncated = 0;
  for (const [index, line] of text
    .replace(/^\ufeff/, "")
    .split("\n")
    .entries()) {
    if (line.trim() === "") continue;
    const where = `${fileName}:${index + 1}`;
    const { isCut, ...row } = parseRow(parseJsonObject(line, where), where, tokenizer, limits);
    truncated += Number(isCut);
    rows.push(row);
  }
  if (rows.length === 0)
    throw new FormatError(
      `${fileName}: must have at least one row, got an empty file. Write one JSON object per line: ${FORMS}`,
    );
  const tokens = rows.reduce((sum, { inputIds }) => sum + inputIds.length, 0);
  const counts = labels.map((_, c) => rows.filter(({ label }) => label === c).length);
  return { rows, stats: { rows: rows.length, truncated, tokens, counts } };
}

type Parsed = ClassificationRow & { readonly isCut: boolean };

function parseRow(
  row: JsonObject,
  where: string,
  tokenizer: PairTokenizer | undefined,
  limits: ClassificationLimits,
): Parsed {
  const { label: _, ...inputs } = row;
  const keys = Object.keys(inputs).sort().join(" ");
  if (keys === "input_ids" || keys === "input_ids token_type_ids")
    return { ...idsRow(row, where, limits), label: labelOf(row, where, limits) };
  if (!/^(sentence|text)( text_pair)?$/.test(keys) || row.label === undefined) {
    const got = Object.keys(row).map((key) => JSON.stringify(excerpt(key)));
    throw new FormatError(`${where}: a row must be ${FORMS}, got ${got.join(", ") || "no keys"}`);
  }
  if (!tokenizer)
    throw new FormatError(
      `${where}: a row of text needs a tokenizer, got a model without one. Use rows of {"input_ids"}`,
    );
  const string = (key: string): string => {
    const value = row[key];
    if (typeof value !== "string")
      throw new FormatError(`${where}: "${key}" must be a string, got ${excerpt(JSON.stringify(value))}`);
    return value;
  };
  const pair = row.text_pair === undefined ? undefined : string("text_pair");
  const written = string(row.text === undefined ? "sentence" : "text");
  const { ids, tokenTypes, isCut } = tokenizer.encodeTexts(written, pair, limits.maxLength);
  checked(ids, "the tokenizer's ids", where, limits);
  // RoBERTa has one kind of tokens.
  const types = limits.tokenTypes > 1 ? { tokenTypeIds: tokenTypes } : {};
  return { inputIds: ids, ...types, label: labelOf(row, where, limits), isCut };
}

function labelOf({ label }: JsonObject, where: string, { labels }: ClassificationLimits): number {
  const found = typeof label === "string" ? labels.indexOf(label) : label;
  if (Number.isInteger(found) && Number(found) >= 0 && Number(found) < labels.length) return Number(found);
  const names = excerpt(labels.join(", "));
  throw new FormatError(
    `${where}: "label" must be a number from 0 to ${labels.length - 1} or one of ${names}, got ${excerpt(JSON.stringify(label) ?? "none")}`,
  );
}

function idsRow(row: JsonObject, where: string, limits: ClassificationLimits): Omit<Parsed, "label"> {
  const ids = checked(row.input_ids, "input_ids", where, limits);
  if (ids.length === 0) throw new FormatError(`${where}: input_ids must have at least one id, got none`);
  const cut = (list: readonly number[]): number[] => list.slice(0, limits.maxLength);
  const isCut = ids.length > limits.maxLength;
  if (row.token_type_ids === undefined) return { inputIds: cut(ids), isCut };
  const types = checked(row.token_type_ids, "token_type_ids", where, limits, limits.tokenTypes);
  if (types.length !== ids.length)
    throw new FormatError(`${where}: token_type_ids must be as many as input_ids (${ids.length}), got ${types.length}`);
  return { inputIds: cut(ids), tokenTypeIds: cut(types), isCut };
}

/** A list of whole numbers below a limit, none of them padding where they are ids. */
function checked(
  value: unknown,
  name: string,
  where: string,
  { vocabSize, padId }: ClassificationLimits,
  below?: number,
): readonly number[] {
  if (!Array.isArray(value))
    throw new FormatError(`${where}: ${name} must be a list of numbers, got ${excerpt(JSON.stringify(value))}`);
  const limit = below ?? vocabSize;
  const bad = value.find((id) => !(Number.isInteger(id) && id >= 0 && id < limit));
  if (bad !== undefined)
    throw new FormatError(
      `${where}: ${name} must be whole numbers from 0 to ${limit - 1}, got ${excerpt(JSON.stringify(bad))}. Was this made for another model?`,
    );
  if (below === undefined && value.includes(padId))
    throw new FormatError(`${where}: ${name} must be without padding, got the padding's id ${padId}. Leave it out`);
  return value;
}

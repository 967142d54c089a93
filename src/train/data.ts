/** Records of training data → rows of token ids with labels. */
import type { ChatTemplate } from "../io/chat-template.ts";
import { FormatError } from "../io/errors.ts";
import { type JsonObject, parseRecord } from "../io/json.ts";
import type { Tokenizer } from "../io/tokenizer.ts";
import { ShapeError } from "../tensor/errors.ts";
import { encodeExample } from "./data/encode.ts";
import { type Example, FORM_LIST, parseExample } from "./data/forms.ts";
import type { LossOn } from "./data/masks.ts";
import { PAIR_FORMS, parsePair } from "./data/pairs.ts";
import { type PreferencePair, type Row, trainedCount } from "./data/row.ts";

export type { LossOn } from "./data/masks.ts";
export { PAIR_FORMS } from "./data/pairs.ts";
export { IGNORED, type PreferencePair, type Row } from "./data/row.ts";

/** Of rows, or of pairs, which count as one where it says rows and as two where it says ids. */
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
  /** Rows whose prompt, tokenised alone, is not a prefix of the whole: the loss starts where the two part. */
  readonly unclearBoundaries: number;
  /** The first of those, such as "train.jsonl:12". */
  readonly firstUnclear?: string;
  /** Rows of each form, also those left out: "messages", "text" and so on. */
  readonly forms: Readonly<Record<string, number>>;
  /** Keys of records that were not looked at. */
  readonly ignoredKeys: readonly string[];
}

export interface DataLimits {
  /** Longer rows are cut. */
  readonly maxLength: number;
  /** Positions of the model. */
  readonly contextLength: number;
  /** Rows of the model's embedding. */
  readonly vocabSize: number;
}

export interface RowOptions extends DataLimits {
  /** Writes messages as text. */
  readonly chatTemplate?: ChatTemplate | undefined;
  /** See `LossOn`. */
  readonly lossOn?: LossOn | undefined;
}

/** A record and where it is from, as `readRecords` of `lowrank/data` gives them. */
interface SourceRecord {
  readonly value: JsonObject;
  readonly where: string;
}

interface Made {
  readonly rows: readonly Row[];
  /** Whether one of them has an unclear boundary, or was cut. */
  readonly isUnclear: boolean;
  readonly isCut: boolean;
}

/** Whether they are two with the same ids. */
const areSame = ([a, b]: readonly Row[]): boolean =>
  a !== undefined && b?.inputIds.length === a.inputIds.length && a.inputIds.every((id, t) => id === b.inputIds[t]);

/** Turns one record after the other into a row or a pair of rows, and counts. */
export class RowMaker {
  readonly #tokenizer: Tokenizer | undefined;
  readonly #options: RowOptions;
  readonly #ignoredKeys = new Set<string>();
  readonly #forms = new Map<string, number>();
  readonly #counts = { rows: 0, truncated: 0, dropped: 0, tokens: 0, trainedTokens: 0, unclearBoundaries: 0 };
  readonly #promptIds = new Map<string, readonly number[]>();
  #firstUnclear: string | undefined;

  /** Throws a ShapeError if maxLength does not suit the model. */
  constructor(tokenizer: Tokenizer | undefined, options: RowOptions) {
    const { maxLength, contextLength } = options;
    if (!Number.isInteger(maxLength) || maxLength < 2)
      throw new ShapeError(`readRows: maxLength must be a whole number of at least 2, got ${maxLength}`);
    if (maxLength > contextLength)
      throw new ShapeError(
        `readRows: maxLength must be at most the model's context of ${contextLength}, got ${maxLength}. Set it to ${contextLength} or less`,
      );
    this.#tokenizer = tokenizer;
    this.#options = options;
  }

  /** The row of a record, cut to maxLength, or undefined where it leaves nothing to learn. Throws a FormatError. */
  row({ value, where }: SourceRecord): Row | undefined {
    const { form, example, ignored } = parseExample(value, where, this.#options.chatTemplate !== undefined);
    return this.#count(form, ignored, where, this.#rows([example], where))?.[0];
  }

  /**
   * The pair of a record, both rows cut to maxLength and learned from where the prompt ends, whatever `lossOn` says. Undefined where one of
   * them leaves nothing to learn, or both are the same. Throws a FormatError.
   */
  pair({ value, where }: SourceRecord): PreferencePair | undefined {
    const { form, chosen, rejected, ignored } = parsePair(value, where);
    const made = this.#rows([chosen, rejected], where, "completion");
    const [first, second] = this.#count(form, ignored, where, made) ?? [];
    return first && second && { chosen: first, rejected: second };
  }

  /** Rows that go together. */
  #rows(examples: readonly Example[], where: string, lossOn = this.#options.lossOn): Made {
    const { maxLength, chatTemplate, vocabSize } = this.#options;
    const encoder = { tokenizer: this.#tokenizer, chatTemplate, lossOn, vocabSize, promptIds: this.#promptIds };
    const encoded = examples.map((example) => encodeExample(example, encoder, where));
    return {
      rows: encoded.map(({ inputIds, labels }) => ({
        inputIds: inputIds.slice(0, maxLength),
        labels: labels.slice(0, maxLength),
      })),
      isUnclear: encoded.some(({ unclear }) => unclear),
      isCut: encoded.some(({ inputIds }) => inputIds.length > maxLength),
    };
  }

  /** The rows, unless there is nothing to learn from them. */
  #count(form: string, ignored: readonly string[], where: string, made: Made): readonly Row[] | undefined {
    const { rows, isUnclear, isCut } = made;
    for (const key of ignored) this.#ignoredKeys.add(key);
    this.#forms.set(form, (this.#forms.get(form) ?? 0) + 1);
    const counts = this.#counts;
    if (isUnclear) {
      counts.unclearBoundaries++;
      this.#firstUnclear ??= where;
    }
    if (isCut) counts.truncated++;
    if (rows.some((row) => trainedCount(row) === 0) || areSame(rows)) {
      counts.dropped++;
      return undefined;
    }
    counts.rows++;
    for (const row of rows) {
      counts.tokens += row.inputIds.length;
      counts.trainedTokens += trainedCount(row);
    }
    return rows;
  }

  get stats(): DataStats {
    return {
      ...this.#counts,
      ...(this.#firstUnclear !== undefined && { firstUnclear: this.#firstUnclear }),
      forms: Object.fromEntries(this.#forms),
      ignoredKeys: [...this.#ignoredKeys],
    };
  }

  /** Throws a FormatError unless there was a row to learn from in the file. `forms` are those that a row may have. */
  demandRows(fileName: string, forms: string = FORM_LIST): void {
    const { rows, dropped } = this.#counts;
    if (rows > 0) return;
    throw new FormatError(
      dropped === 0
        ? `${fileName}: must have at least one row, got an empty file. Write one JSON object per line: ${forms}`
        : `${fileName}: a row must leave a token to learn, got ${dropped} rows with none in their first ${this.#options.maxLength}. Raise maxLength, or shorten the prompts`,
    );
  }
}

/**
 * Reads JSON Lines, a row each, in one of these forms, which a record's keys say; other keys are ignored and listed:
 *
 *     {"messages","tools"?}                            a chat, written by the chat template
 *     {"prompt","completion"}                          two texts, or two lists of messages
 *     {"text"}
 *     {"instruction","output","input"?,"system"?,"history"?}
 *     {"conversations","system"?,"tools"?}             ShareGPT's turns of {"from","value"}
 *     {"segments"}                                     {"label","text"}: those with a true label are learned
 *     {"input_ids","labels"?}                          as they are; labels default to input_ids
 *
 * `lossOn` says what is learned. Text and completions get the special tokens of the tokenizer, and an EOS at the end where they have
 * none; the EOS is learned too. Throws a FormatError that names file and line, and a ShapeError if maxLength does not suit the model.
 */
export function readRows(
  text: string,
  fileName: string,
  tokenizer: Tokenizer | undefined,
  options: RowOptions,
): { rows: Row[]; stats: DataStats } {
  const maker = new RowMaker(tokenizer, options);
  const rows = recordsOf(text, fileName).flatMap((record) => maker.row(record) ?? []);
  maker.demandRows(fileName);
  return { rows, stats: maker.stats };
}

/**
 * Reads JSON Lines, a pair of answers to one prompt each; `tools` may come with messages, other keys are ignored and listed:
 *
 *     {"prompt","chosen","rejected"}   three texts, or three lists of messages
 *     {"chosen","rejected"}            two texts or conversations, which begin with the same prompt
 *
 * Only what follows the prompt is learned. Throws as `readRows`.
 */
export function readPairs(
  text: string,
  fileName: string,
  tokenizer: Tokenizer | undefined,
  options: RowOptions,
): { pairs: PreferencePair[]; stats: DataStats } {
  const maker = new RowMaker(tokenizer, options);
  const pairs = recordsOf(text, fileName).flatMap((record) => maker.pair(record) ?? []);
  maker.demandRows(fileName, PAIR_FORMS);
  return { pairs, stats: maker.stats };
}

function recordsOf(text: string, fileName: string): SourceRecord[] {
  const lines = text.replace(/^\ufeff/, "").split("\n");
  return lines.flatMap((line, index) => {
    const where = `${fileName}:${index + 1}`;
    return line.trim() === "" ? [] : [{ value: parseRecord(line, where), where }];
  });
}

type Records = AsyncIterable<SourceRecord> | Iterable<SourceRecord>;

/** The rows of records, one after the other, as they come. The maker counts them. */
export async function* rowsOf(records: Records, maker: RowMaker): AsyncGenerator<Row, void, undefined> {
  for await (const record of records) {
    const row = maker.row(record);
    if (row) yield row;
  }
}

/**
 * The rows of a file of any size, tokenised as they are asked for; `records` begins it anew in each of the `epochs`, 1 unless given. For `train`:
 *
 *     const rows = rowStream(() => readRecords(source, "train.jsonl"), "train.jsonl", tokenizer, { maxLength, contextLength, vocabSize });
 *     train({ …, rows, maxLength, steps })
 *
 * Throws as `readRows`, of a record when its turn comes.
 */
export async function* rowStream(
  records: () => Records,
  fileName: string,
  tokenizer: Tokenizer | undefined,
  options: RowOptions & { readonly epochs?: number },
): AsyncGenerator<Row, void, undefined> {
  const maker = new RowMaker(tokenizer, options);
  const { epochs = 1 } = options;
  for (let epoch = 0; epoch < epochs; epoch++) {
    yield* rowsOf(records(), maker);
    maker.demandRows(fileName);
  }
}

/** As `rowsOf`, pairs. */
export async function* pairsOf(records: Records, maker: RowMaker): AsyncGenerator<PreferencePair, void, undefined> {
  for await (const record of records) {
    const pair = maker.pair(record);
    if (pair) yield pair;
  }
}

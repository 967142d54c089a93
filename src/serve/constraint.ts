/** From what a text may be to which token may be next. */
import { isObject } from "../io/json.ts";
import type { TokenBytes } from "../io/tokenizer.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Range, TextState } from "./grammar.ts";
import { jsonMachine } from "./json-schema.ts";
import type { TokenConstraint } from "./sampling.ts";

/**
 * Lets one answer be nothing but JSON that fits the schema: see `jsonMachine`. Throws ShapeError as it does; what it gives throws one where it takes
 * too much to tell which tokens are allowed.
 */
export const jsonConstraint = (schema: unknown, tokenizer: TokenBytes): TokenConstraint =>
  new TextConstraint({ state: jsonMachine(schema), begun: [] }, tokenizer);

/** What `response_format` of OpenAI's API asks for; undefined where any text will do. Throws ShapeError for what it cannot be. */
export function constraintOf(responseFormat: unknown, tokenizer: TokenBytes): TokenConstraint | undefined {
  if (responseFormat === undefined || responseFormat === null) return undefined;
  const { type, json_schema: asked } = isObject(responseFormat) ? responseFormat : {};
  if (type === "text") return undefined;
  if (type === "json_object") return jsonConstraint({ type: "object" }, tokenizer);
  if (type !== "json_schema")
    throw new ShapeError(
      `response_format: type must be "text", "json_object" or "json_schema", got ${JSON.stringify(type) ?? "none"}`,
    );
  if (!isObject(asked) || asked.schema === undefined)
    throw new ShapeError("response_format: json_schema must have a schema, got none");
  return jsonConstraint(asked.schema, tokenizer);
}

/** A place in a text, and the bytes of a character that is not whole yet. */
interface Place {
  readonly state: TextState;
  readonly begun: readonly number[];
}

/** Of `TextState.work` for one token: some tenths of a second. A person with name, age and pets takes a thousandth of it. */
const MOST_WORK = 500_000;

class TextConstraint implements TokenConstraint {
  readonly #tokenizer: TokenBytes;
  #place: Place;
  /** `TextState.work` for the token that is to come. */
  #work = 0;

  constructor(place: Place, tokenizer: TokenBytes) {
    this.#tokenizer = tokenizer;
    this.#place = place;
  }

  fork(): TextConstraint {
    return new TextConstraint(this.#place, this.#tokenizer);
  }

  get mayEnd(): boolean {
    return this.#place.begun.length === 0 && this.#place.state.isComplete;
  }

  get isDone(): boolean {
    return this.mayEnd && this.#place.state.isEnd;
  }

  allows(id: number): boolean {
    return id === this.#tokenizer.eosId ? this.mayEnd : this.#after(id) !== undefined;
  }

  accept(id: number): void {
    this.#place = this.#after(id) ?? this.#place;
    this.#work = 0;
  }

  /** undefined for tokens without text, too: with them alone an answer could go on for ever. */
  #after(id: number): Place | undefined {
    const bytes = this.#tokenizer.tokenBytes(id);
    if (!bytes || bytes.length === 0) return undefined;
    let { state, begun } = this.#place;
    const spent = this.#work - state.work; // which is of all answers of the grammar
    for (const byte of bytes) {
      begun = [...begun, byte];
      const range = characters(begun);
      if (!range) return undefined;
      if (begun.length < lengthOf(begun[0] ?? 0)) {
        if (!state.mayStep(range)) return undefined;
        continue;
      }
      const next = state.stepCode(range[0]);
      this.#work = spent + state.work;
      if (this.#work > MOST_WORK)
        throw new ShapeError(
          `constraint: a token must be told from all others by at most ${MOST_WORK} ways to read them, got more. Make alternatives differ earlier, or fewer`,
        );
      if (!next) return undefined;
      [state, begun] = [next, []];
    }
    return { state, begun };
  }
}

/** Bytes of the UTF-8 character that begins with this one; 0 where none does. */
const lengthOf = (byte: number): number =>
  byte < 0x80 ? 1 : byte < 0xc2 ? 0 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : byte < 0xf5 ? 4 : 0;

/** The first character of each length: one below is never written so long. */
const LEAST = [0, 0, 0x80, 0x800, 0x10000];

/** Which characters begin with these bytes of UTF-8; undefined where none does. */
function characters([first = 0, ...others]: readonly number[]): Range | undefined {
  const length = lengthOf(first);
  if (length === 0 || others.some((byte) => byte >> 6 !== 0b10)) return undefined;
  const start = length === 1 ? first : first & (0x7f >> length);
  const known = others.reduce((code, byte) => code * 64 + (byte & 0x3f), start);
  const open = 64 ** (length - 1 - others.length);
  const [low, high] = [Math.max(known * open, LEAST[length] ?? 0), known * open + open - 1];
  return low <= high ? [low, high] : undefined;
}

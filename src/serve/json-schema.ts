/** The JSON texts that fit a JSON Schema (2020-12), as a grammar. */
import { groupBy } from "../io/group-by.ts";
import { excerpt, isObject, type JsonObject } from "../io/json.ts";
import { ShapeError } from "../tensor/errors.ts";
import {
  ANY,
  alt,
  altOf,
  childrenOf,
  type Grammar,
  literal,
  minus,
  type Range,
  repeat,
  seq,
  set,
  TextState,
} from "./grammar.ts";
import { patternGrammar } from "./pattern.ts";

const ANNOTATIONS = ["$schema", "$comment", "$defs", "definitions", "title", "description", "default", "examples"];
const MORE_ANNOTATIONS = ["deprecated", "readOnly", "writeOnly"];
const APPLICATORS = ["$ref", "anyOf", "oneOf", "allOf", "enum", "const"];
const RANGE = ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"];
const CHECKS = [
  ...["type", "properties", "required", "additionalProperties", "items", "prefixItems", "minItems", "maxItems"],
  ...["minLength", "maxLength", "pattern", "format", ...RANGE],
];
const TYPES = ["object", "array", "string", "number", "integer", "boolean", "null"];
const MOST_CHARACTERS = 200_000;
const DEEPEST = 200;
const MOST_SCHEMAS = 20_000;
const MOST_PIECES = 200_000;
/** Each of them comes to several pieces of a grammar. */
const MOST_LETTERS = 50_000;
const LONGEST_NAME = 1000;

const DATE = "\\d{4}-(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1\\d|2[0-8])|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)";
const TIME = "(?:[01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(?:\\.\\d{1,9})?(?:Z|[+-](?:[01]\\d|2[0-3]):[0-5]\\d)";
/** Texts that are of the format for certain: 29 February, say, is left out. */
const FORMATS: ReadonlyMap<unknown, string> = new Map([
  ["date", `^${DATE}$`],
  ["time", `^${TIME}$`],
  ["date-time", `^${DATE}T${TIME}$`],
  ["uuid", "^[\\da-f]{8}-[\\da-f]{4}-[\\da-f]{4}-[\\da-f]{4}-[\\da-f]{12}$"],
]);

const SPACE = repeat(literal(" "), 0, 1);
const COMMA = seq(literal(","), SPACE);
const COLON = seq(literal(":"), SPACE);
const QUOTE = literal('"');
/** Below 10²¹, and as many digits as JavaScript writes, so that no model goes on for ever; finite. */
const NUMBER = patternGrammar(
  "^-?(0|[1-9]\\d{0,20})(\\.\\d{1,23})?$|^-?\\d(\\.\\d{1,23})?[eE][+-]?(\\d{1,2}|[12]\\d\\d|30[0-7])$",
);
const INTEGER_DIGITS = 21;
const CHARACTER = patternGrammar(
  '^[^"\\\\\\x00-\\x1f]$|^\\\\["\\\\/bfnrt]$|^\\\\u([\\da-cefA-CEF][\\da-fA-F]{3}|[dD][0-7][\\da-fA-F]{2}|[dD][89abAB][\\da-fA-F]{2}\\\\u[dD][c-fC-F][\\da-fA-F]{2})$',
);

/** Characters that a string has only escaped. */
const ESCAPED = [0x22, 0x5c, ...Array.from({ length: 0x20 }, (_, code) => code)];
const single = (code: number): Range => [code, code];
const escapeOf = (code: number): string => JSON.stringify(String.fromCharCode(code)).slice(1, -1);
const ESCAPES = oneOf(ESCAPED.map(escapeOf));

/** A character of these, as it is written. */
type Writer = (ranges: readonly Range[]) => Grammar;

/** As JSON.stringify writes them; the same ones are the same object. */
function jsonWriter(): Writer {
  const known = new Map<string, Grammar>();
  return (ranges) => {
    const name = ranges.join();
    const found = known.get(name);
    if (found) return found;
    const escaped = ESCAPED.filter((code) => ranges.some(([a, b]) => a <= code && code <= b));
    const escapes = escaped.length === ESCAPED.length ? ESCAPES : oneOf(escaped.map(escapeOf));
    const node = alt(set(minus(ranges, ESCAPED.map(single))), escapes);
    known.set(name, node);
    return node;
  };
}
const WRITTEN = repeat(jsonWriter()(ANY));

/** Strings without quotes, other than these, which are given as code points and are alike before `at`. */
function otherThan(texts: readonly (readonly number[])[], written: Writer, at = 0): Grammar {
  if (texts.length === 0) return WRITTEN;
  const longer = texts.filter((text) => text.length > at);
  const heads = groupBy(longer, (text) => text[at] as number);
  return altOf([
    ...(longer.length < texts.length ? [] : [seq()]),
    seq(written(minus(ANY, [...heads.keys()].map(single))), WRITTEN),
    ...Array.from(heads, ([head, same]) => seq(written([single(head)]), otherThan(same, written, at + 1))),
  ]);
}

/** One of these texts, which are all different: what they begin with alike is read once. */
function oneOf(texts: readonly string[]): Grammar {
  const [first = ""] = texts;
  if (texts.length < 2) return texts.length === 0 ? alt() : literal(first);
  let same = 0;
  while (same < first.length && texts.every((text) => text[same] === first[same])) same++;
  if (/[\ud800-\udbff]/.test(first[same - 1] ?? "")) same--; // a character is two of these
  const headOf = (text: string): string => Array.from(text.slice(same, same + 2))[0] ?? "";
  const tails = Array.from(groupBy(texts, headOf), ([head, all]) =>
    seq(literal(head), head === "" ? seq() : oneOf(all.map((text) => text.slice(same + head.length)))),
  );
  return seq(literal(first.slice(0, same)), altOf(tails));
}

interface Part {
  readonly node: Grammar;
  readonly isRequired: boolean;
}

interface Members {
  readonly parts: readonly Part[];
  /** What comes after the parts, so many times. */
  readonly more: Grammar;
  readonly least: number;
  readonly most: number;
}

/** Parts in their order and more, with commas. A part that is left out ends an array, but not an object. */
function members(open: string, close: string, { parts, more, least, most }: Members): Grammar {
  const end = literal(close);
  const next = seq(COMMA, more);
  let after = seq(repeat(next, least, most), end);
  let first =
    most === 0
      ? end
      : alt(...(least === 0 ? [end] : []), seq(more, repeat(next, Math.max(0, least - 1), most - 1), end));
  for (const { node, isRequired } of parts.toReversed()) {
    const skipped = open === "[" ? [end, end] : [first, after];
    first = alt(seq(node, after), ...(isRequired ? [] : skipped.slice(0, 1)));
    after = alt(seq(COMMA, node, after), ...(isRequired ? [] : skipped.slice(1)));
  }
  return seq(literal(open), first);
}

/** Exactly this value. */
function constant(value: unknown, path: string, depth: number = 0): Grammar {
  if (depth > DEEPEST) refuse(path, `values must be at most ${DEEPEST} deep`);
  const of = (one: unknown): Grammar => constant(one, path, depth + 1);
  const none = { more: alt(), least: 0, most: 0 };
  const required = (node: Grammar): Part => ({ node, isRequired: true });
  if (Array.isArray(value)) return members("[", "]", { parts: value.map((one) => required(of(one))), ...none });
  if (!isObject(value)) return literal(JSON.stringify(value));
  const parts = Object.entries(value).map(([name, one]) => required(seq(key(name), of(one))));
  return members("{", "}", { parts, ...none });
}

const key = (name: string): Grammar => seq(literal(JSON.stringify(name)), COLON);

const typeOf = (value: unknown): readonly string[] => {
  if (value === null) return ["null"];
  if (Array.isArray(value)) return ["array"];
  return Number.isInteger(value) ? ["integer", "number"] : [typeof value];
};

/** Digits from a to b, which are as many in both, as a pattern. */
function between(a: string, b: string): string {
  const [x = "", y = ""] = [a[0], b[0]];
  const left = a.length - 1;
  if (a === "") return "";
  if (/^0*$/.test(a) && /^9*$/.test(b)) return `\\d{${a.length}}`;
  if (x === y) return x + between(a.slice(1), b.slice(1));
  const inner = Number(y) - Number(x) > 1 ? [`[${Number(x) + 1}-${Number(y) - 1}]\\d{${left}}`] : [];
  const low = x + between(a.slice(1), "9".repeat(left));
  return `(?:${[low, ...inner, y + between("0".repeat(left), b.slice(1))].join("|")})`;
}

/** Whole numbers from a ≥ 0 to b, as a pattern. */
function naturals(a: bigint, b: bigint): string {
  const [low, high] = [`${a}`, `${b}`];
  if (low.length === high.length) return between(low, high);
  const [n, m] = [low.length, high.length];
  const inner = m - n > 1 ? [`[1-9]\\d{${n},${m - 2}}`] : [];
  return [between(low, "9".repeat(n)), ...inner, between(`1${"0".repeat(m - 1)}`, high)].join("|");
}

/** Whole numbers from `low` to `high`. */
function integers(low: number, high: number): Grammar {
  const most = 10n ** BigInt(INTEGER_DIGITS) - 1n;
  const clipped = (x: number): bigint => (Math.abs(x) < Number(most) ? BigInt(x) : x < 0 ? -most : most);
  const [a, b] = [clipped(Math.ceil(low)), clipped(Math.floor(high))];
  const options = [
    ...(b >= 0n && b >= a ? [naturals(a > 0n ? a : 0n, b)] : []),
    ...(a < 0n && b >= a ? [`-(?:${naturals(b < 0n ? -b : 1n, -a)})`] : []),
  ];
  return options.length === 0 ? alt() : patternGrammar(`^(?:${options.join("|")})$`);
}

const BOOLEAN = oneOf(["true", "false"]);
const NULL = literal("null");

/** The schema that everything fits. */
const EVERYTHING: JsonObject = {};

class SchemaReader {
  readonly #root: unknown;
  /** Each schema is read once, whatever leads to it; one that is being read is known already. */
  readonly #known = new Map<JsonObject, Grammar>();
  readonly #written = jsonWriter();
  readonly #pieces = new Set<Grammar>();
  #count = 0;
  /** Of patterns, and of names that others must differ from. */
  #letters = 0;
  #depth = 0;

  constructor(root: unknown) {
    this.#root = root;
  }

  grammar(schema: unknown = this.#root, path = "#"): Grammar {
    if (schema === false) return alt();
    if (schema !== true && !isObject(schema)) return refuse(path, "must be an object, true or false", schema);
    if (schema !== true && ++this.#count > MOST_SCHEMAS)
      throw new ShapeError(
        `json schema: must have at most ${MOST_SCHEMAS} schemas in it, got more. Leave out properties or alternatives`,
      );
    const one = schema === true || Object.keys(schema).length === 0 ? EVERYTHING : schema;
    const known = this.#known.get(one);
    if (known) return known;
    const node = alt();
    this.#known.set(one, node);
    if (++this.#depth > DEEPEST) refuse(path, `must be at most ${DEEPEST} deep`);
    node.options = this.#options(one, path);
    this.#depth--;
    this.#demandFewPieces(node.options);
    return node;
  }

  /** Goes through what was not there before. */
  #demandFewPieces(nodes: readonly Grammar[]): void {
    const work = [...nodes];
    for (const node of work) {
      if (this.#pieces.has(node)) continue;
      this.#pieces.add(node);
      for (const child of childrenOf(node)) work.push(child);
    }
    if (this.#pieces.size > MOST_PIECES)
      throw new ShapeError(
        `json schema: must come to at most ${MOST_PIECES} pieces of a grammar, got more. Leave out properties or alternatives`,
      );
  }

  #options(schema: JsonObject, path: string): Grammar[] {
    const keywords = Object.keys(schema).filter((name) => ![...ANNOTATIONS, ...MORE_ANNOTATIONS].includes(name));
    const unknown = keywords.find((name) => ![...APPLICATORS, ...CHECKS].includes(name) && !isIdle(name, schema, path));
    if (unknown !== undefined)
      refuse(path, "must have keywords that can be kept to", unknown, ". Leave it out, and check the text afterwards");
    const applicator = APPLICATORS.find((name) => keywords.includes(name));
    return applicator ? this.#applied(applicator, keywords, schema, path) : this.#plain(schema, path);
  }

  #applied(keyword: string, keywords: readonly string[], schema: JsonObject, path: string): Grammar[] {
    const isValue = keyword === "enum" || keyword === "const";
    const other = keywords.find(
      (name) => name !== keyword && !isIdle(name, schema, path) && !(isValue && name === "type"),
    );
    if (other !== undefined) refuse(path, `${keyword} must be without other keywords that check`, other);
    const value = schema[keyword];
    if (keyword === "$ref") return [this.#referred(value, path)];
    const values = keyword === "const" ? [value] : list(value, `${path}/${keyword}`);
    if (isValue) {
      const types = typesOf(schema, path);
      const fitting = values.filter((one) => typeOf(one).some((type) => types.includes(type)));
      const [simple, others] = [fitting.filter((one) => !isNested(one)), fitting.filter(isNested)];
      return [
        oneOf([...new Set(simple.map((one) => JSON.stringify(one)))]),
        ...others.map((one) => constant(one, path)),
      ];
    }
    if (keyword === "allOf" && values.length !== 1) refuse(path, "allOf must have one schema", values.length);
    return values.map((one, i) => this.grammar(one, `${path}/${keyword}/${i}`));
  }

  #referred(pointer: unknown, path: string): Grammar {
    if (typeof pointer !== "string" || !/^#(\/|$)/.test(pointer))
      return refuse(path, "$ref must begin with #/, a place in this schema", pointer);
    let target = this.#root;
    for (const part of pointer.split("/").slice(1)) {
      const name = unescaped(part);
      const isThere = typeof target === "object" && target !== null && Object.hasOwn(target, name);
      if (!isThere) refuse(path, "$ref must be of a place that is there", pointer);
      target = (target as JsonObject)[name];
    }
    return this.grammar(target, pointer);
  }

  #plain(schema: JsonObject, path: string): Grammar[] {
    const types = typesOf(schema, path);
    const ranged = RANGE.find((name) => Object.hasOwn(schema, name));
    if (ranged !== undefined && types.includes("number"))
      refuse(path, `${ranged} must be with the type "integer"`, schema.type ?? "no type");
    const readers: Readonly<Record<string, () => Grammar>> = {
      object: () => this.#object(schema, path),
      array: () => this.#array(schema, path),
      string: () => this.#string(schema, path),
      number: () => NUMBER,
      integer: () => integers(...limits(schema, path)),
      boolean: () => BOOLEAN,
      null: () => NULL,
    };
    const needed = types.includes("number") ? types.filter((type) => type !== "integer") : types;
    return needed.map((type) => readers[type]?.() ?? alt());
  }

  #demandFewLetters(texts: readonly string[], path: string): void {
    for (const { length } of texts) this.#letters += length;
    if (this.#letters > MOST_LETTERS)
      refuse(
        path,
        `patterns, and names of objects that may have others, must have at most ${MOST_LETTERS} characters in all`,
        this.#letters,
      );
  }

  #string(schema: JsonObject, path: string): Grammar {
    if (typeof schema.pattern === "string") this.#demandFewLetters([schema.pattern], path);
    return seq(QUOTE, characters(schema, path, this.#written), QUOTE);
  }

  #object(schema: JsonObject, path: string): Grammar {
    const { properties = {}, additionalProperties } = schema;
    if (!isObject(properties)) return refuse(path, "properties must be an object", properties);
    const required = new Set(list(schema.required ?? [], `${path}/required`).map(String));
    const names = [...new Set([...Object.keys(properties), ...required])];
    const long = names.find((name) => name.length > LONGEST_NAME);
    if (long !== undefined) refuse(path, `names must have at most ${LONGEST_NAME} characters`, long);
    const at = `${path}/additionalProperties`;
    const isOpen = !Object.hasOwn(schema, "properties");
    const listed = Object.entries(properties).map(([name, one]) => this.grammar(one, `${path}/properties/${name}`));
    const others = additionalProperties ?? isOpen;
    const value = this.grammar(others, at);
    const missing = others === additionalProperties ? value : this.grammar(true, at);
    // The names that are listed come first.
    const parts = names.map((name, i) => ({
      isRequired: required.has(name),
      node: seq(key(name), listed[i] ?? missing),
    }));
    const more = others === false ? alt() : seq(QUOTE, this.#otherThan(names, path), QUOTE, COLON, value);
    return members("{", "}", { parts, more, least: 0, most: Number.POSITIVE_INFINITY });
  }

  #otherThan(names: readonly string[], path: string): Grammar {
    this.#demandFewLetters(names, path);
    const codes = names.map((name) => Array.from(name, (c) => c.codePointAt(0) as number));
    return otherThan(codes, this.#written);
  }

  #array(schema: JsonObject, path: string): Grammar {
    const [least, most] = [count(schema, "minItems", path, 0), count(schema, "maxItems", path)];
    const all = list(schema.prefixItems ?? [], `${path}/prefixItems`);
    const parts = all.map((one, i) => ({
      isRequired: i < least,
      node: this.grammar(one, `${path}/prefixItems/${i}`),
    }));
    if (most < least) return alt();
    const more = this.grammar(schema.items ?? true, `${path}/items`);
    return members("[", "]", {
      ...{ parts: parts.slice(0, most), more },
      ...{ least: Math.max(0, least - parts.length), most: Math.max(0, most - parts.length) },
    });
  }
}

/** What is between the quotes. */
function characters(schema: JsonObject, path: string, written: Writer): Grammar {
  const { pattern, format } = schema;
  const [least, most] = [count(schema, "minLength", path, 0), count(schema, "maxLength", path)];
  const checks = ["pattern", "format", "minLength", "maxLength"].filter((name) => Object.hasOwn(schema, name));
  if (checks.length > 1 && (pattern !== undefined || format !== undefined))
    refuse(path, "pattern and format must be alone", checks.join(" with "));
  if (format !== undefined && !FORMATS.has(format))
    refuse(path, `format must be one of ${[...FORMATS.keys()].join(", ")}`, format);
  const found = pattern ?? FORMATS.get(format);
  if (found === undefined) return repeat(CHARACTER, least, most);
  if (typeof found !== "string") return refuse(path, "pattern must be a text", found);
  try {
    return patternGrammar(found, written);
  } catch (error) {
    throw error instanceof ShapeError ? new ShapeError(`json schema: at ${shown(path)}: ${error.message}`) : error;
  }
}

function typesOf({ type }: JsonObject, path: string): readonly string[] {
  if (type === undefined) return TYPES;
  const types = [...new Set(Array.isArray(type) ? type : [type])];
  const bad = types.find((one) => !TYPES.includes(one));
  if (bad !== undefined) refuse(path, `type must be of ${TYPES.join(", ")}`, bad);
  return types;
}

function limits(schema: JsonObject, path: string): [low: number, high: number] {
  const [least, most, above, below] = RANGE.map((name) => {
    const value = schema[name];
    if (value !== undefined && typeof value !== "number") refuse(path, `${name} must be a number`, value);
    return value as number | undefined;
  });
  const infinite = Number.POSITIVE_INFINITY;
  return [
    Math.max(least ?? -infinite, above === undefined ? -infinite : Math.floor(above) + 1),
    Math.min(most ?? infinite, below === undefined ? infinite : Math.ceil(below) - 1),
  ];
}

function count(schema: JsonObject, name: string, path: string, preset = Number.POSITIVE_INFINITY): number {
  const value = schema[name];
  if (value === undefined) return preset;
  if (!Number.isInteger(value) || (value as number) < 0)
    refuse(path, `${name} must be a whole number of at least 0`, value);
  return value as number;
}

const list = (value: unknown, path: string): readonly unknown[] =>
  Array.isArray(value) ? value : refuse(path, "must be a list", value);

const isNested = (value: unknown): boolean => typeof value === "object" && value !== null;

/** Whether a keyword says nothing. */
const isIdle = (name: string, { [name]: value }: JsonObject, path: string): boolean =>
  (name === "uniqueItems" && value === false) || (name === "$id" && path === "#");

const unescaped = (part: string): string => {
  try {
    return decodeURIComponent(part).replaceAll("~1", "/").replaceAll("~0", "~");
  } catch {
    return part;
  }
};

const shown = (path: string): string => (path.length > 100 ? `${path.slice(0, 97)}...` : path);

function refuse(path: string, rule: string, value?: unknown, wayOut = ""): never {
  const got = value === undefined ? "" : `, got ${excerpt(JSON.stringify(value))}`;
  throw new ShapeError(`json schema: at ${shown(path)}: ${rule}${got}${wayOut}`);
}

/**
 * The start of any JSON text that fits the schema: compact, at most one space at the start and after `:` and `,`. Every text that can be gone through
 * fits; the other way round, of the texts that fit these are left out: properties in another order than the schema's; properties that it does
 * not list, where it lists some and says nothing of `additionalProperties`; names, and strings with a `pattern`, with escapes that need not be;
 * numbers of 10²¹ and above but as 1e21, and of more digits than JavaScript writes. oneOf is taken as anyOf. What is checked of lengths is code points.
 *
 * Throws ShapeError, with the place, for a keyword that it cannot keep to, and where no text fits or the schema is too large.
 */
export function jsonMachine(schema: unknown): TextState {
  let json: string | undefined;
  try {
    json = JSON.stringify(schema);
  } catch (error) {
    throw new ShapeError(`json schema: must be JSON, and not too deep, got ${String(error)}`);
  }
  if (json === undefined) throw new ShapeError(`json schema: must be JSON, got ${String(schema)}`);
  if (json.length > MOST_CHARACTERS)
    throw new ShapeError(`json schema: must have at most ${MOST_CHARACTERS} characters, got ${json.length}`);
  const start = TextState.of(seq(SPACE, new SchemaReader(JSON.parse(json)).grammar()));
  if (!start) throw new ShapeError("json schema: must have a text that fits it, got one that none fits");
  return start;
}

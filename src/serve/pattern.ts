/** Regular expressions as grammars. */
import { excerpt } from "../io/json.ts";
import { ShapeError } from "../tensor/errors.ts";
import { ANY, altOf, type Grammar, minus, type Range, repeat, seq, set } from "./grammar.ts";

const CLASSES: Readonly<Record<string, readonly Range[]>> = {
  d: [[0x30, 0x39]],
  w: [
    [0x30, 0x39],
    [0x41, 0x5a],
    [0x5f, 0x5f],
    [0x61, 0x7a],
  ],
  // As ECMAScript's \s.
  s: [
    [0x09, 0x0d],
    [0x20, 0x20],
    [0xa0, 0xa0],
    [0x1680, 0x1680],
    [0x2000, 0x200a],
    [0x2028, 0x2029],
    [0x202f, 0x202f],
    [0x205f, 0x205f],
    [0x3000, 0x3000],
    [0xfeff, 0xfeff],
  ],
};
const LINE_ENDS: readonly Range[] = [
  [0x0a, 0x0a],
  [0x0d, 0x0d],
  [0x2028, 0x2029],
];
const CONTROLS: Readonly<Record<string, string>> = { n: "\n", r: "\r", t: "\t", f: "\f", v: "\v", 0: "\0" };
const MOST_CHARACTERS = 10_000;
const LONGEST = 4000;
const DEEPEST = 100;

const only = (character: string): readonly Range[] => [
  [character.codePointAt(0) as number, character.codePointAt(0) as number],
];

/**
 * The texts in which an ECMAScript regular expression (flag u) finds something: anywhere, unless it begins with ^ or ends with $, as JSON
 * Schema's `pattern`. `character` says how one of a set of characters is written. Takes literals, classes, groups, |, quantifiers, and ^ and $ at the ends.
 *
 * Throws ShapeError for anything else, and where its quantifiers written out have more than 10,000 characters.
 */
export function patternGrammar(pattern: string, character: (ranges: readonly Range[]) => Grammar = set): Grammar {
  if (pattern.length > LONGEST)
    throw new ShapeError(`pattern: must have at most ${LONGEST} characters, got ${pattern.length}`);
  try {
    new RegExp(pattern, "u");
  } catch (error) {
    throw new ShapeError(`pattern: must be a regular expression, got ${(error as Error).message}`);
  }
  return new Parser(pattern, character).alternatives(true);
}

class Parser {
  readonly #pattern: string;
  readonly #left: string[];
  readonly #character: (ranges: readonly Range[]) => Grammar;
  #size = 0;
  #depth = 0;

  constructor(pattern: string, character: (ranges: readonly Range[]) => Grammar) {
    this.#pattern = pattern;
    this.#left = [...pattern].reverse();
    this.#character = character;
  }

  /** The outermost ones may have anchors. */
  alternatives(isOutermost: boolean): Grammar {
    const options: Grammar[] = [];
    do options.push(this.#sequence(isOutermost));
    while (this.#take("|"));
    return altOf(options);
  }

  #sequence(isOutermost: boolean): Grammar {
    const anything = repeat(this.#character(ANY));
    const parts: Grammar[] = [];
    const isFirst = !isOutermost || this.#take("^");
    let isLast = !isOutermost;
    while (!["|", ")", undefined].includes(this.#left.at(-1))) {
      if (isOutermost && this.#left.at(-1) === "$" && ["|", undefined].includes(this.#left.at(-2))) {
        isLast = this.#take("$");
        break;
      }
      parts.push(this.#quantified());
    }
    return seq(...(isFirst ? [] : [anything]), ...parts, ...(isLast ? [] : [anything]));
  }

  #quantified(): Grammar {
    const before = this.#size;
    const item = this.#atom();
    const [min, max] = this.#quantifier();
    this.#take("?"); // lazy: finds the same texts
    this.#size = before + (this.#size - before) * Math.max(1, max < Number.POSITIVE_INFINITY ? max : min);
    if (this.#size > MOST_CHARACTERS)
      throw new ShapeError(
        `pattern: must have at most ${MOST_CHARACTERS} characters with its quantifiers written out, got more in ${this.#quoted}`,
      );
    return min === 1 && max === 1 ? item : repeat(item, min, max);
  }

  #quantifier(): readonly [min: number, max: number] {
    if (this.#take("*")) return [0, Number.POSITIVE_INFINITY];
    if (this.#take("+")) return [1, Number.POSITIVE_INFINITY];
    if (this.#take("?")) return [0, 1];
    if (!this.#take("{")) return [1, 1];
    let text = "";
    while (!this.#take("}")) text += this.#next();
    const [min = "", max = min] = text.split(",");
    return [Number(min), max === "" ? Number.POSITIVE_INFINITY : Number(max)];
  }

  #atom(): Grammar {
    const c = this.#next();
    if (c === "(") {
      if (this.#take("?") && !this.#take(":")) this.#refuse(`(?${this.#next()}`);
      if (++this.#depth > DEEPEST)
        throw new ShapeError(`pattern: groups must be at most ${DEEPEST} deep, got more in ${this.#quoted}`);
      const inner = this.alternatives(false);
      this.#take(")");
      this.#depth--;
      return inner;
    }
    this.#size++;
    if (c === "[") return this.#character(this.#class());
    if (c === ".") return this.#character(minus(ANY, LINE_ENDS));
    if (c === "\\") return this.#character(this.#escape(false));
    if (c === "^" || c === "$") this.#refuse(`${c} within`);
    return this.#character(only(c));
  }

  #class(): readonly Range[] {
    const isOther = this.#take("^");
    const ranges: Range[] = [];
    const member = (): readonly Range[] => (this.#take("\\") ? this.#escape(true) : only(this.#next()));
    while (!this.#take("]")) {
      const first = member();
      if (this.#left.at(-1) !== "-" || this.#left.at(-2) === "]") ranges.push(...first);
      else {
        this.#take("-");
        ranges.push([first[0]?.[0] ?? 0, member()[0]?.[0] ?? 0]);
      }
    }
    // So that ranges are sorted and apart, and no surrogates are left.
    const others = minus(ANY, ranges);
    return isOther ? others : minus(ANY, others);
  }

  #escape(isInClass: boolean): readonly Range[] {
    const c = this.#next();
    const known = CLASSES[c.toLowerCase()];
    if (known) return c === c.toLowerCase() ? known : minus(ANY, known);
    if (c === "b" && isInClass) return only("\b");
    if (c === "x" || (c === "u" && this.#left.at(-1) !== "{")) return this.#coded(this.#some(c === "x" ? 2 : 4));
    if (c === "u") {
      let digits = "";
      for (this.#take("{"); !this.#take("}"); ) digits += this.#next();
      return this.#coded(digits);
    }
    if (/[a-zA-Z1-9]/.test(c) && !(c in CONTROLS)) this.#refuse(`\\${c}`);
    return only(CONTROLS[c] ?? c);
  }

  #coded(digits: string): readonly Range[] {
    const code = Number.parseInt(digits, 16);
    if (code >= 0xd800 && code <= 0xdfff) this.#refuse(`the surrogate \\u${digits}`);
    return [[code, code]];
  }

  #some(count: number): string {
    return Array.from({ length: count }, () => this.#next()).join("");
  }

  #next(): string {
    return this.#left.pop() ?? "";
  }

  #take(c: string): boolean {
    if (this.#left.at(-1) !== c) return false;
    this.#left.pop();
    return true;
  }

  get #quoted(): string {
    return JSON.stringify(excerpt(this.#pattern));
  }

  #refuse(what: string): never {
    throw new ShapeError(
      `pattern: must be of literals, classes, groups, |, quantifiers, and ^ and $ at its ends, got ${what} in ${this.#quoted}`,
    );
  }
}

/** Languages of texts, and reading a text of one character by character: a pushdown automaton that follows all of its runs at once. */
import { ShapeError } from "../tensor/errors.ts";

/** Code points, both ends included. */
export type Range = readonly [first: number, last: number];

/** Which texts there are: one character of a set, one part after the other, one of the options, or so many of an item. */
export type Grammar =
  | { readonly kind: "set"; readonly ranges: readonly Range[] }
  | { readonly kind: "seq"; readonly parts: readonly Grammar[] }
  | { readonly kind: "alt"; options: Grammar[] }
  | { readonly kind: "repeat"; readonly item: Grammar; readonly min: number; max: number; next?: Grammar };

/** All characters: a surrogate is none. */
export const ANY: readonly Range[] = [
  [0, 0xd7ff],
  [0xe000, 0x10ffff],
];

export const set = (ranges: readonly Range[]): Grammar => ({ kind: "set", ranges });
export const seq = (...parts: readonly Grammar[]): Grammar => ({ kind: "seq", parts });
/** Without options there is no such text, not even an empty one. */
export const alt = (...options: Grammar[]): Grammar & { readonly kind: "alt" } => ({ kind: "alt", options });
export const repeat = (item: Grammar, min: number = 0, max: number = Number.POSITIVE_INFINITY): Grammar =>
  max < min ? alt() : { kind: "repeat", item, min, max };
export const literal = (text: string): Grammar =>
  seq(...Array.from(text, (c) => set([[c.codePointAt(0) as number, c.codePointAt(0) as number]])));

/** The characters of `all` that are not in `others`. */
export function minus(all: readonly Range[], others: readonly Range[]): Range[] {
  let left = [...all];
  for (const [first, last] of others)
    left = left.flatMap(([a, b]): Range[] =>
      last < a || first > b
        ? [[a, b]]
        : [...(a < first ? [[a, first - 1] as const] : []), ...(last < b ? [[last + 1, b] as const] : [])],
    );
  return left;
}

/** Takes out the options that no text can be of, so that whatever can be begun can be ended. Says whether any text is left. */
function prune(root: Grammar): boolean {
  const users = new Map<Grammar, Grammar[]>([[root, []]]);
  for (const [node] of users)
    for (const child of childrenOf(node)) {
      const known = users.get(child);
      if (known) known.push(node);
      else users.set(child, [node]);
    }
  const good = new Set<Grammar>();
  const work = [...users.keys()].reverse();
  for (const node of work) {
    if (good.has(node) || !hasText(node, good)) continue;
    good.add(node);
    for (const user of users.get(node) ?? []) work.push(user);
  }
  for (const node of good) {
    if (node.kind === "alt") node.options = node.options.filter((option) => good.has(option));
    if (node.kind === "repeat" && !good.has(node.item)) node.max = 0;
  }
  return good.has(root);
}

function childrenOf(node: Grammar): readonly Grammar[] {
  if (node.kind === "set") return [];
  if (node.kind === "repeat") return [node.item];
  return node.kind === "seq" ? node.parts : node.options;
}

function hasText(node: Grammar, good: ReadonlySet<Grammar>): boolean {
  if (node.kind === "set") return node.ranges.length > 0;
  if (node.kind === "repeat") return node.min === 0 || good.has(node.item);
  return node.kind === "seq" ? node.parts.every((part) => good.has(part)) : node.options.some((one) => good.has(one));
}

/** A stack of what is still to come. The same stack is the same object, so that runs which meet are one. */
class Stack {
  readonly top: Grammar | undefined;
  readonly rest: Stack | undefined;
  #pushed: Map<Grammar, Stack> | undefined;

  constructor(top?: Grammar, rest?: Stack) {
    this.top = top;
    this.rest = rest;
  }

  push(node: Grammar): Stack {
    this.#pushed ??= new Map();
    const stack = this.#pushed.get(node) ?? new Stack(node, this);
    this.#pushed.set(node, stack);
    return stack;
  }
}

const MOST_STACKS = 20_000;

/** What is left of an item's count after one more. */
function counted(node: Grammar & { readonly kind: "repeat" }): Grammar {
  if (node.min === 0 && node.max === Number.POSITIVE_INFINITY) return node;
  node.next ??= repeat(node.item, Math.max(0, node.min - 1), node.max - 1);
  return node.next;
}

/** Where a text is, of which there is at least one whole text that it begins. Never changes. */
export class TextState {
  /** Each begins with a set. */
  readonly #stacks: readonly Stack[];
  /** Whether the text may end here. */
  readonly isComplete: boolean;
  readonly #known = new Map<number, TextState | undefined>();

  private constructor(starts: Iterable<Stack>) {
    const all = new Set(starts);
    const stacks: Stack[] = [];
    let isComplete = false;
    for (const stack of all) {
      const { top: node, rest } = stack;
      if (!node || !rest) isComplete = true;
      else if (node.kind === "set") stacks.push(stack);
      else if (node.kind === "seq") all.add(node.parts.reduceRight((below, part) => below.push(part), rest));
      else if (node.kind === "alt") for (const option of node.options) all.add(rest.push(option));
      else {
        if (node.max > 0) all.add(rest.push(counted(node)).push(node.item));
        if (node.min === 0) all.add(rest);
      }
      if (all.size > MOST_STACKS)
        throw new ShapeError(
          `constraint: a text must be read in at most ${MOST_STACKS} ways at a time, got more. Make alternatives differ earlier, or fewer`,
        );
    }
    this.#stacks = stacks;
    this.isComplete = isComplete;
  }

  /** Before the first character; undefined where there is no text at all. Changes the grammar: see `prune`. */
  static of(grammar: Grammar): TextState | undefined {
    return prune(grammar) ? new TextState([new Stack().push(grammar)]) : undefined;
  }

  /** Whether nothing can follow. */
  get isEnd(): boolean {
    return this.#stacks.length === 0;
  }

  /** After these characters too; undefined where no text goes on so. */
  step(text: string): TextState | undefined {
    let state: TextState | undefined = this;
    for (const character of text) state = state?.stepCode(character.codePointAt(0) as number);
    return state;
  }

  stepCode(code: number): TextState | undefined {
    if (!this.#known.has(code)) this.#known.set(code, this.#after(code));
    return this.#known.get(code);
  }

  /** Whether any of these characters may follow. */
  mayStep([first, last]: Range): boolean {
    return this.#stacks.some(({ top }) => top?.kind === "set" && top.ranges.some(([a, b]) => a <= last && first <= b));
  }

  #after(code: number): TextState | undefined {
    const rests = this.#stacks.flatMap(({ top, rest }) =>
      rest && top?.kind === "set" && top.ranges.some(([a, b]) => a <= code && code <= b) ? [rest] : [],
    );
    if (rests.length === 0) return undefined;
    const next = new TextState(rests);
    // Within a string, say, nothing changes: then all that was found out stays known.
    const isSame = next.isComplete === this.isComplete && next.#stacks.length === this.#stacks.length;
    return isSame && next.#stacks.every((stack, i) => stack === this.#stacks[i]) ? this : next;
  }
}

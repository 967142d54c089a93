/** Languages of texts, and reading a text of one character by character: a pushdown automaton that follows all of its runs at once. */
import { groupBy } from "../io/group-by.ts";
import { ShapeError } from "../tensor/errors.ts";

/** Code points, both ends included. */
export type Range = readonly [first: number, last: number];

/** Which texts there are: one character of a set, one part after the other, one of the options, or so many of an item. */
export type Grammar =
  | { readonly kind: "set"; readonly ranges: readonly Range[] }
  /** The parts before `from` were there already. */
  | { readonly kind: "seq"; readonly parts: readonly Grammar[]; readonly from: number; next?: Grammar }
  | { readonly kind: "alt"; options: Grammar[] }
  | { readonly kind: "repeat"; readonly item: Grammar; readonly min: number; max: number; next?: Grammar };

/** All characters: a surrogate is none. */
export const ANY: readonly Range[] = [
  [0, 0xd7ff],
  [0xe000, 0x10ffff],
];

export const set = (ranges: readonly Range[]): Grammar => ({ kind: "set", ranges });
/** Of a list, where there may be more parts than a call has arguments. */
const seqOf = (parts: readonly Grammar[]): Grammar => ({ kind: "seq", parts, from: 0 });
export const seq = (...parts: readonly Grammar[]): Grammar => seqOf(parts);
export const altOf = (options: Grammar[]): Grammar & { readonly kind: "alt" } => ({ kind: "alt", options });
/** Without options there is no such text, not even an empty one. */
export const alt = (...options: Grammar[]): Grammar & { readonly kind: "alt" } => altOf(options);
export const repeat = (item: Grammar, min: number = 0, max: number = Number.POSITIVE_INFINITY): Grammar =>
  max < min ? alt() : { kind: "repeat", item, min, max };
const ASCII = Array.from({ length: 0x80 }, (_, code) => set([[code, code]]));
export const literal = (text: string): Grammar =>
  seqOf(
    Array.from(text, (c) => {
      const code = c.codePointAt(0) as number;
      return ASCII[code] ?? set([[code, code]]);
    }),
  );

/** The characters of `all` that are not in `others`. Sorted and apart where `all` is, whatever `others` are. */
export function minus(all: readonly Range[], others: readonly Range[]): Range[] {
  const cuts = others.toSorted(([a], [b]) => a - b);
  return all.flatMap(([a, b]) => {
    const left: Range[] = [];
    let from = a;
    for (const [first, last] of cuts) {
      if (first > b) break;
      if (first > from) left.push([from, first - 1]);
      from = Math.max(from, last + 1);
    }
    return from <= b ? [...left, [from, b]] : left;
  });
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

export function childrenOf(node: Grammar): readonly Grammar[] {
  if (node.kind === "set") return [];
  if (node.kind === "repeat") return [node.item];
  return node.kind === "seq" ? node.parts : node.options;
}

function hasText(node: Grammar, good: ReadonlySet<Grammar>): boolean {
  if (node.kind === "set") return node.ranges.length > 0;
  if (node.kind === "repeat") return node.min === 0 || good.has(node.item);
  return node.kind === "seq" ? node.parts.every((part) => good.has(part)) : node.options.some((one) => good.has(one));
}

/** A stack of what is still to come. */
class Stack {
  /** Of all stacks of its memory another one. */
  readonly id: number;
  readonly top: Grammar | undefined;
  readonly rest: Stack | undefined;

  constructor(id: number, top?: Grammar, rest?: Stack) {
    this.id = id;
    this.top = top;
    this.rest = rest;
  }
}

const MOST_STACKS = 20_000;
/** In what was gone through: tens of megabytes. */
const MOST_KEPT = 1_000_000;

/** What the states of a grammar found out together. It may be forgotten at any time: to find it out again is only work. */
class Memory {
  /** Stacks and ranges that were gone through. Nothing is kept without going through as many. */
  work = 0;
  #ids = 0;
  #begun = 0;
  /** The same stack is the same object, so that runs which meet are one. */
  #pushed = new Map<Stack, Map<Grammar, Stack>>();
  /** By their stacks, and by what these were before they began with a set. */
  states = new Map<string, TextState>();
  #steps = new Map<TextState, Map<number, TextState | undefined>>();

  empty(): Stack {
    return new Stack(this.#ids++);
  }

  push(rest: Stack, node: Grammar): Stack {
    const above = this.#pushed.get(rest) ?? new Map<Grammar, Stack>();
    if (above.size === 0) this.#pushed.set(rest, above);
    const stack = above.get(node) ?? new Stack(this.#ids++, node, rest);
    above.set(node, stack);
    return stack;
  }

  stepsOf(state: TextState): Map<number, TextState | undefined> {
    const known = this.#steps.get(state) ?? new Map<number, TextState | undefined>();
    if (known.size === 0) this.#steps.set(state, known);
    return known;
  }

  forgetIfMuch(): void {
    if (this.work - this.#begun <= MOST_KEPT) return;
    this.#begun = this.work;
    this.#pushed = new Map();
    this.states = new Map();
    this.#steps = new Map();
  }
}

/** What is left of an item's count after one more. */
function counted(node: Grammar & { readonly kind: "repeat" }): Grammar {
  if (node.min === 0 && node.max === Number.POSITIVE_INFINITY) return node;
  node.next ??= repeat(node.item, Math.max(0, node.min - 1), node.max - 1);
  return node.next;
}

/** The parts after the first; undefined where there are none. */
function tailOf(node: Grammar & { readonly kind: "seq" }): Grammar | undefined {
  const { parts, from } = node;
  if (from + 2 >= parts.length) return parts[from + 1];
  node.next ??= { kind: "seq", parts, from: from + 1 };
  return node.next;
}

/** Which characters lead where. */
interface Ways {
  /** By their first characters. */
  readonly ranges: readonly { readonly first: number; readonly last: number; readonly rests: readonly Stack[] }[];
  /** Of each range the greatest last character of it and those before. */
  readonly reach: readonly number[];
  /** Sorted; characters with none of them in between are in the same ranges. */
  readonly borders: Float64Array;
}

/** How many of n things come before the first for which it holds; it holds for all after that. */
function before(n: number, holds: (i: number) => boolean): number {
  let [low, high] = [0, n];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (holds(middle)) high = middle;
    else low = middle + 1;
  }
  return low;
}

const nameOf = (stacks: readonly Stack[]): string =>
  Uint32Array.from(stacks, ({ id }) => id)
    .sort()
    .join();

/** Where a text is, of which there is at least one whole text that it begins. Never changes. */
export class TextState {
  readonly #memory: Memory;
  /** Each begins with a set. */
  readonly #stacks: readonly Stack[];
  /** Whether the text may end here. */
  readonly isComplete: boolean;
  #ways: Ways | undefined;

  private constructor(memory: Memory, stacks: readonly Stack[], isComplete: boolean) {
    this.#memory = memory;
    this.#stacks = stacks;
    this.isComplete = isComplete;
  }

  /** Before the first character; undefined where there is no text at all. Changes the grammar: see `prune`. */
  static of(grammar: Grammar): TextState | undefined {
    const memory = new Memory();
    return prune(grammar) ? TextState.#at([memory.push(memory.empty(), grammar)], memory) : undefined;
  }

  /** The same object where what can follow is the same. */
  static #at(starts: readonly Stack[], memory: Memory): TextState {
    const { states } = memory;
    const key = nameOf(starts);
    const known = states.get(key);
    if (known) return known;
    const all = new Set(starts);
    const stacks: Stack[] = [];
    let isComplete = false;
    for (const stack of all) {
      const { top: node, rest } = stack;
      if (!node || !rest) isComplete = true;
      else if (node.kind === "set") stacks.push(stack);
      else if (node.kind === "seq") {
        const [part, tail] = [node.parts[node.from], tailOf(node)];
        const below = tail ? memory.push(rest, tail) : rest;
        all.add(part ? memory.push(below, part) : rest);
      } else if (node.kind === "alt") for (const option of node.options) all.add(memory.push(rest, option));
      else {
        if (node.max > 0) all.add(memory.push(memory.push(rest, counted(node)), node.item));
        if (node.min === 0) all.add(rest);
      }
      if (all.size > MOST_STACKS)
        throw new ShapeError(
          `constraint: a text must be read in at most ${MOST_STACKS} ways at a time, got more. Make alternatives differ earlier, or fewer`,
        );
    }
    memory.work += all.size;
    const whole = `${isComplete}:${nameOf(stacks)}`;
    const state = states.get(whole) ?? new TextState(memory, stacks, isComplete);
    states.set(key, state).set(whole, state);
    return state;
  }

  /** Whether nothing can follow. */
  get isEnd(): boolean {
    return this.#stacks.length === 0;
  }

  /** How much was looked at so far to find the states of this grammar, in stacks and ranges of characters. */
  get work(): number {
    return this.#memory.work;
  }

  /** After these characters too; undefined where no text goes on so. */
  step(text: string): TextState | undefined {
    let state: TextState | undefined = this;
    for (const character of text) state = state?.stepCode(character.codePointAt(0) as number);
    return state;
  }

  /** Throws ShapeError where the text can be read in too many ways. */
  stepCode(code: number): TextState | undefined {
    const { borders } = this.#waysOn();
    const interval = before(borders.length, (i) => (borders[i] as number) > code);
    const steps = this.#memory.stepsOf(this);
    if (!steps.has(interval)) steps.set(interval, this.#after(code));
    return steps.get(interval);
  }

  /** Whether any of these characters may follow. */
  mayStep([first, last]: Range): boolean {
    const { ranges, reach } = this.#waysOn();
    const at = before(ranges.length, (i) => (ranges[i]?.first as number) > last) - 1;
    return at >= 0 && (reach[at] as number) >= first;
  }

  #after(code: number): TextState | undefined {
    this.#memory.forgetIfMuch();
    const { ranges, reach } = this.#waysOn();
    const rests = new Set<Stack>();
    const end = before(ranges.length, (i) => (ranges[i]?.first as number) > code);
    for (let i = end - 1; i >= 0 && (reach[i] as number) >= code; i--) {
      this.#memory.work++;
      const range = ranges[i];
      if (range && range.last >= code) for (const rest of range.rests) rests.add(rest);
    }
    this.#memory.work += rests.size;
    return rests.size === 0 ? undefined : TextState.#at([...rests], this.#memory);
  }

  #waysOn(): Ways {
    if (this.#ways) return this.#ways;
    const ranges = [...groupBy(this.#stacks, ({ top }) => top)].flatMap(([node, stacks]) => {
      const rests = stacks.flatMap(({ rest }) => rest ?? []);
      return node?.kind === "set" ? node.ranges.map(([first, last]) => ({ first, last, rests })) : [];
    });
    ranges.sort((a, b) => a.first - b.first);
    let far = -1;
    const reach = ranges.map(({ last }) => {
      far = Math.max(far, last);
      return far;
    });
    const borders = Float64Array.from(new Set(ranges.flatMap(({ first, last }) => [first, last + 1]))).sort();
    this.#memory.work += this.#stacks.length + ranges.length;
    this.#ways = { ranges, reach, borders };
    return this.#ways;
  }
}

/** Which pages of the key-value cache hold what: who uses them, and what prompts they can spare computing. */

import { ShapeError } from "../tensor/errors.ts";

/** A page whose tokens, and all before them, are known. */
interface Known {
  readonly page: number;
  /** Of the page before it, or of the adapter: what makes equal tokens after different beginnings different. */
  readonly key: string;
  readonly id: number;
}

/** Pages that one sequence uses. */
export interface Lease {
  /** In order. */
  readonly pages: readonly number[];
  /** Tokens of the prompt whose keys and values are there already. */
  readonly reused: number;
}

/**
 * Pages by counts of their users, with reuse of prefixes: a full page is known by its tokens and by the page before it, and stays until its
 * memory is needed, the least recently used first (arXiv:2309.06180 §4.4, 2312.07104 §3). Keys and values depend on the adapter, so each has a
 * `root` of its own.
 */
export class PagePool {
  readonly pageTokens: number;
  readonly count: number;
  readonly #free: number[];
  readonly #users: Uint32Array;
  readonly #byKey = new Map<string, Known>();
  readonly #byPage = new Map<number, Known>();
  /** Known pages that nobody uses, the least recently used first. */
  readonly #idle = new Set<number>();
  #lastId = 0;

  constructor(count: number, pageTokens: number) {
    this.count = count;
    this.pageTokens = pageTokens;
    this.#free = Array.from({ length: count }, (_, i) => count - 1 - i);
    this.#users = new Uint32Array(count);
  }

  /** Pages that somebody uses. */
  get used(): number {
    return this.count - this.#free.length - this.#idle.size;
  }

  pagesFor(tokens: number): number {
    return Math.ceil(tokens / this.pageTokens);
  }

  /**
   * Pages for a sequence that begins with `ids` and may have `tokens` in all, with those of its beginning that are known, but never of all of
   * `ids`: the last one's logits are wanted. undefined where there are not enough now.
   */
  lease(root: string, ids: readonly number[], tokens: number): Lease | undefined {
    const shared: number[] = [];
    let parent = root;
    for (let at = 0; at + this.pageTokens < ids.length; at += this.pageTokens) {
      const known = this.#byKey.get(this.#key(parent, ids, at));
      if (!known) break;
      shared.push(known.page);
      parent = String(known.id);
    }
    const more = this.pagesFor(tokens) - shared.length;
    const idle = this.#idle.size - shared.filter((page) => this.#idle.has(page)).length;
    if (more > this.#free.length + idle) return undefined;
    for (const page of shared) this.share(page);
    const fresh = Array.from({ length: more }, () => this.take());
    return { pages: [...shared, ...fresh], reused: shared.length * this.pageTokens };
  }

  /** The same with one page more; undefined where there is none now. */
  grown(lease: Lease): Lease | undefined {
    if (this.used === this.count) return undefined;
    return { ...lease, pages: [...lease.pages, this.take()] };
  }

  /** Says what the pages hold, as far as they are full: the keys and values of `ids`, which are computed. */
  remember(root: string, ids: readonly number[], pages: readonly number[]): void {
    let parent = root;
    for (let i = 0; (i + 1) * this.pageTokens <= ids.length; i++) {
      const page = pages[i] as number;
      const key = this.#key(parent, ids, i * this.pageTokens);
      const known = this.#byKey.get(key) ?? (this.#byPage.has(page) ? undefined : { page, key, id: ++this.#lastId });
      if (!known) return;
      this.#byKey.set(key, known);
      this.#byPage.set(known.page, known);
      parent = String(known.id);
    }
  }

  /** Users of a page. */
  users(page: number): number {
    return this.#users[page] ?? 0;
  }

  release({ pages }: Pick<Lease, "pages">): void {
    // The end of a sequence first: its beginning is more likely to come again.
    for (const page of pages.toReversed()) {
      const left = (this.#users[page] ?? 0) - 1;
      this.#users[page] = left;
      if (left > 0) continue;
      if (this.#byPage.has(page)) this.#idle.add(page);
      else this.#free.push(page);
    }
  }

  #key(parent: string, ids: readonly number[], at: number): string {
    return `${parent}:${ids.slice(at, at + this.pageTokens).join()}`;
  }

  /** One more user of a page. */
  share(page: number): void {
    this.#idle.delete(page);
    this.#users[page] = (this.#users[page] ?? 0) + 1;
  }

  /** A page of undefined content. Throws ShapeError where all are in use. */
  take(): number {
    const [oldest] = this.#idle;
    const page = this.#free.pop() ?? oldest;
    if (page === undefined) throw new ShapeError(`cache: at most ${this.count} pages can be in use, got one more`);
    const known = this.#byPage.get(page);
    if (known) {
      this.#byKey.delete(known.key);
      this.#byPage.delete(page);
    }
    this.share(page);
    return page;
  }
}

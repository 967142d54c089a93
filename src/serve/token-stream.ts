import type { SampledToken } from "./sampling.ts";

/** Tokens on their way to who asked for them. */
export class TokenStream implements AsyncGenerator<SampledToken, void, undefined> {
  readonly #tokens: SampledToken[] = [];
  readonly #onReturn: () => void;
  #isEnded = false;
  #error: unknown;
  #wake: (() => void) | undefined;

  constructor(onReturn: () => void) {
    this.#onReturn = onReturn;
  }

  push(token: SampledToken): void {
    this.#tokens.push(token);
    this.#wake?.();
  }

  end(error?: unknown): void {
    if (this.#isEnded) return;
    this.#isEnded = true;
    this.#error = error;
    this.#wake?.();
  }

  async next(): Promise<IteratorResult<SampledToken, void>> {
    for (;;) {
      const token = this.#tokens.shift();
      if (token) return { value: token, done: false };
      if (this.#isEnded) {
        const error = this.#error;
        this.#error = undefined;
        if (error !== undefined) throw error;
        return { value: undefined, done: true };
      }
      await new Promise<void>((wake) => {
        this.#wake = wake;
      });
    }
  }

  async return(): Promise<IteratorResult<SampledToken, void>> {
    this.#tokens.length = 0;
    this.end();
    this.#onReturn();
    return { value: undefined, done: true };
  }

  async throw(error: unknown): Promise<IteratorResult<SampledToken, void>> {
    await this.return();
    throw error;
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.return();
  }
}

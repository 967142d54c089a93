/** Server-sent events: a stream that keeps quiet connections alive and gives up on a reader that does not read. */

export interface EventStreamOptions {
  /** A comment is sent where nothing else was for so long. */
  readonly keepAliveMs: number;
  /** How long what was sent may wait to be read. */
  readonly stallMs: number;
  /** The reader has gone, or does not read. */
  onAbandoned(): void;
  /** The event that takes the place of the rest, which failed. */
  onError(error: unknown): object;
}

const encoder = new TextEncoder();
const event = (data: string): Uint8Array<ArrayBuffer> => encoder.encode(`data: ${data}\n\n`);

/**
 * Each object as an event, and `[DONE]`. Resolves once there is an event, or `keepAliveMs` have passed: an error before that is thrown, so that it
 * can have a status of its own.
 */
export async function eventStream(
  objects: AsyncGenerator<object, void, undefined>,
  { keepAliveMs, stallMs, onAbandoned, onError }: EventStreamOptions,
): Promise<ReadableStream<Uint8Array>> {
  const ask = (): Promise<IteratorResult<object, void>> => {
    const next = objects.next();
    next.catch(() => undefined); // it may fail while nobody waits
    return next;
  };
  const abandon = (): void => {
    onAbandoned();
    void objects.return().catch(() => undefined);
  };
  let next = ask();
  let stall: ReturnType<typeof setTimeout> | undefined;
  await soon(next, keepAliveMs);
  return new ReadableStream<Uint8Array>({
    async pull(controller) {
      clearTimeout(stall);
      try {
        const result = await soon(next, keepAliveMs);
        if (result?.done) {
          controller.enqueue(event("[DONE]"));
          controller.close();
          return;
        }
        controller.enqueue(result ? event(JSON.stringify(result.value)) : encoder.encode(": keep-alive\n\n"));
        if (result) next = ask();
        stall = setTimeout(() => {
          abandon();
          controller.error(new Error("event stream: what was sent must be read, got a reader that does not"));
        }, stallMs);
      } catch (error) {
        controller.enqueue(event(JSON.stringify(onError(error))));
        controller.close();
      }
    },
    cancel() {
      clearTimeout(stall);
      abandon();
    },
  });
}

/** What the promise gives, or undefined where that takes longer. */
async function soon<T>(promise: Promise<T>, ms: number): Promise<T | undefined> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<undefined>((resolve) => {
    timer = setTimeout(resolve, ms, undefined);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

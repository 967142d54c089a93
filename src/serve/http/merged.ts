/**
 * What all of them give, as it comes, each with its place in the list. Where one throws or nobody wants more, `stop` is called, which has to end
 * them, and they are waited for.
 */
export async function* merged<T>(
  sources: readonly AsyncGenerator<T, void, undefined>[],
  stop: () => void,
): AsyncGenerator<readonly [number, T], void, undefined> {
  type Given = readonly [number, IteratorResult<T, void>];
  const given = new Map<number, Promise<Given>>();
  const ask = (source: AsyncGenerator<T, void, undefined>, i: number): void => {
    const next = source.next().then((result): Given => [i, result]);
    next.catch(() => undefined); // it may fail while nobody waits
    given.set(i, next);
  };
  sources.forEach(ask);
  let isWhole = false;
  try {
    while (given.size > 0) {
      const [i, result] = await Promise.race(given.values());
      given.delete(i);
      if (result.done) continue;
      yield [i, result.value];
      ask(sources[i] as AsyncGenerator<T, void, undefined>, i);
    }
    isWhole = true;
  } finally {
    if (!isWhole) {
      stop();
      await Promise.allSettled(sources.map((source) => source.return()));
    }
  }
}

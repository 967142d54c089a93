/**
 * What all of them give, as it comes, each with its place in the list. The others begin once the first has given something: what it has computed of a
 * prompt is theirs, too. Where one throws or nobody wants more, `stop` is called, which has to end them, and they are waited for.
 */
export async function* merged<T>(
  sources: readonly AsyncGenerator<T, void, undefined>[],
  stop: () => void,
): AsyncGenerator<readonly [number, T], void, undefined> {
  type Given = readonly [number, IteratorResult<T, void>];
  const given = new Map<number, Promise<Given>>();
  const ask = (i: number): void => {
    const next = sources[i]?.next().then((result): Given => [i, result]);
    next?.catch(() => undefined); // it may fail while nobody waits
    if (next) given.set(i, next);
  };
  let hasBegun = false;
  let isWhole = false;
  ask(0);
  try {
    while (given.size > 0) {
      const [i, result] = await Promise.race(given.values());
      given.delete(i);
      if (!hasBegun) for (let other = 1; other < sources.length; other++) ask(other);
      hasBegun = true;
      if (result.done) continue;
      yield [i, result.value];
      ask(i);
    }
    isWhole = true;
  } finally {
    if (!isWhole) {
      stop();
      await Promise.allSettled(sources.map((source) => source.return()));
    }
  }
}

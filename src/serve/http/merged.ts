/**
 * What all of them give, as it comes, each with its place in the flattened list. Of a group the others begin once the first has given something: what
 * it has computed of their prompt is theirs, too. Where one throws or nobody wants more, `stop` is called, which has to end them, and they are waited for.
 */
export async function* merged<T>(
  groups: readonly (readonly AsyncGenerator<T, void, undefined>[])[],
  stop: () => void,
): AsyncGenerator<readonly [number, T], void, undefined> {
  const sources = groups.flat();
  type Given = readonly [number, IteratorResult<T, void>];
  const given = new Map<number, Promise<Given>>();
  const ask = (i: number): void => {
    const next = sources[i]?.next().then((result): Given => [i, result]);
    next?.catch(() => undefined); // it may fail while nobody waits
    if (next) given.set(i, next);
  };
  /** By the first of a group, the others. */
  const behind = new Map<number, readonly number[]>();
  let at = 0;
  for (const { length } of groups) {
    const first = at;
    behind.set(
      first,
      Array.from({ length: length - 1 }, (_, i) => first + 1 + i),
    );
    at += length;
  }
  for (const first of behind.keys()) ask(first);
  let isWhole = false;
  try {
    while (given.size > 0) {
      const [i, result] = await Promise.race(given.values());
      given.delete(i);
      behind.get(i)?.forEach(ask);
      behind.delete(i);
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

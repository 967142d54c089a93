import { ShapeError } from "../../tensor/errors.ts";
import { Random } from "../../tensor/random.ts";

/** Far from the streams that steps, layers and epochs draw from. */
const SPLIT_STREAM = 0x5b117000;

/** Rows drawn by `seed`, a `share` of them and at least one, apart from the rest; both in the order they had. Throws a ShapeError. */
export function splitRows<R>(
  rows: readonly R[],
  share: number,
  seed: number,
): { readonly train: R[]; readonly valid: R[] } {
  const count = Math.max(1, Math.round(rows.length * share));
  if (!(share > 0 && share < 1) || count >= rows.length)
    throw new ShapeError(
      `splitRows: a share above 0 and below 1 must leave rows to train on, got ${share} of ${rows.length}`,
    );
  const order = [...rows.keys()];
  new Random(seed, SPLIT_STREAM).shuffle(order);
  const chosen = new Set(order.slice(0, count));
  return { train: rows.filter((_, i) => !chosen.has(i)), valid: rows.filter((_, i) => chosen.has(i)) };
}

import { AdapterPool, type PoolOptions } from "./adapter-pool.ts";
import { extentOf } from "./page-rows.ts";
import type { HasLinears } from "./parts.ts";
import type { PlainAdapter } from "./plain-adapter.ts";

/** The smallest `maxRank` of a pool that is to take adapters that are not known yet. */
const USUAL_RANK = 16;

/**
 * An enabled pool with these adapters and room for `slots` of them at a time, each of rank `maxRank` (that of the largest, or 16, unless given) and a
 * page more for DoRA's factors. Throws as `AdapterPool.register`.
 */
export async function openPool(
  model: HasLinears,
  adapters: ReadonlyMap<string, PlainAdapter>,
  { slots = Math.max(1, adapters.size), maxRank, dtype = "f32" }: Partial<Omit<PoolOptions, "pages">> = {},
): Promise<AdapterPool> {
  const ranks = [...adapters.values()].map((adapter) => extentOf(adapter).rank);
  const rank = maxRank ?? Math.max(USUAL_RANK, ...ranks);
  const pool = new AdapterPool(model, { pages: slots * (rank + 1), maxRank: rank, slots, dtype });
  try {
    for (const [name, adapter] of adapters) await pool.register(name, adapter);
    pool.enable();
  } catch (error) {
    pool.destroy();
    throw error;
  }
  return pool;
}

/** The next token of a row that was read back. */
import { choicesOf } from "../../src/serve/row-choices.ts";
import type { SampledToken, Sampler } from "../../src/serve/sampling.ts";

export function nextOf(sampler: Sampler, row: Float32Array, top = 0): SampledToken {
  const token = sampler.next(choicesOf(row, sampler.temperature), top);
  if (!token) throw new Error("a sampler that has the whole row chooses a token");
  return token;
}

/** Attention over keys and values in pages: a chunk of one prompt, or a token of each of several sequences. */
import { type PagedPlan, pagedAttention, pagedPlan } from "../../src/kernels/paged.ts";
import { Random } from "../../src/tensor/random.ts";
import { type Tensor, tensor } from "../../src/tensor/tensor.ts";
import type { Case } from "../harness.ts";
import { type SizedContest, split, sum } from "./inputs.ts";

export interface PagedSizes {
  /** Tokens of the batch. */
  readonly T: number;
  /** Keys of each sequence that are there before. */
  readonly before: number;
  /** Whether each token is of a sequence of its own. */
  readonly isDecoding: boolean;
  readonly H: number;
  readonly G: number;
  readonly D: number;
}

const PAGE = 16;
const ONE_BY_ONE: PagedPlan = { heads: 1, tokens: 1, splits: 1 };
const drawn = new Random(5);
const PERIOD = Float32Array.from({ length: 65_537 }, () => drawn.normal());
const valueAt = (i: number, from: number): number => PERIOD[(i + from) % PERIOD.length] as number;

/** A head of a token to a unit, which walks all of the keys, and the default plan. */
export function pagedContest({ T, before, isDecoding, H, G, D }: PagedSizes): SizedContest {
  const sequences = isDecoding ? T : 1;
  const most = Math.ceil((before + (isDecoding ? 1 : T)) / PAGE);
  const shape = [sequences * most, PAGE, G, D];
  const size = shape.reduce((a, b) => a * b);
  const positionOf = (t: number): number => before + (isDecoding ? 0 : t);
  const sequenceOf = (t: number): number => (isDecoding ? t : 0);
  const keys = sum(T, (t) => positionOf(t) + 1);
  const flops = 4 * H * D * keys;
  /** Where key j of head g of token t begins: pages are in the reverse order. */
  const placeOf = (t: number, j: number, g: number): number => {
    const page = sequences * most - 1 - (sequenceOf(t) * most + Math.floor(j / PAGE));
    return ((page * PAGE + (j % PAGE)) * G + g) * D;
  };
  const check: Case["check"] = (_result, element) => {
    const [row, column] = split(element, D);
    const [t, h] = split(row, H);
    const places = Array.from({ length: positionOf(t) + 1 }, (_, j) => placeOf(t, j, Math.floor((h * G) / H)));
    const scores = places.map((at) => sum(D, (i) => valueAt(row * D + i, 2) * valueAt(at + i, 0)) / Math.sqrt(D));
    const top = Math.max(...scores);
    const weights = scores.map((score) => Math.exp(score - top));
    const mixed = sum(places.length, (j) => (weights[j] as number) * valueAt((places[j] as number) + column, 1));
    return mixed / sum(weights.length, (j) => weights[j] as number);
  };
  /** What a plan has to do at the same time, and how much it reads of keys and values for a token. */
  const countsOf = ({ heads, tokens, splits }: PagedPlan): string => {
    const step = isDecoding ? 1 : tokens;
    const tiles = Array.from(
      { length: Math.ceil(T / step) },
      (_, i) => positionOf(Math.min(T, (i + 1) * step) - 1) + 1,
    );
    const units = (tiles.length * H * splits) / heads;
    const read = (8 * D * sum(tiles.length, (i) => tiles[i] as number) * H) / heads / T;
    return `${heads} heads × ${tokens} tokens, ${splits} splits: ${units} units, ${Math.round(read / 1024)} KiB read per token`;
  };
  return {
    name: `paged attention, ${isDecoding ? "decoding" : "prefill"}, ${T} tokens, ${before} before, H=${H}, G=${G}, D=${D}`,
    group: "paged-attention",
    sizes: { M: T, before, isDecoding: String(isDecoding), H, G, D },
    flops,
    largestBytes: 4 * size,
    setup: (gpu) => {
      const of = (lengths: readonly number[], count: number, from: number): Tensor => {
        const values = Float32Array.from({ length: count }, (_, i) => valueAt(i, from));
        return tensor(gpu, values, lengths);
      };
      const ints = (list: readonly number[], lengths: readonly number[]): Tensor =>
        tensor(gpu, Int32Array.from(list), lengths);
      const range = Array.from({ length: T }, (_, t) => t);
      const [k, v, q] = [of(shape, size, 0), of(shape, size, 1), of([T, H, D], T * H * D, 2)];
      const tokens = {
        sequences: ints(range.map(sequenceOf), [T]),
        positions: ints(range.map(positionOf), [T]),
        tables: ints(
          Array.from({ length: sequences * most }, (_, i) => sequences * most - 1 - i),
          [sequences, most],
        ),
      };
      const plans = [ONE_BY_ONE, pagedPlan(gpu.isSoftware, T, H, G, most * PAGE)];
      return {
        inputs: [k, v, q, ...Object.values(tokens)],
        cases: plans.map((plan) => ({
          name: countsOf(plan),
          flops,
          bytes: 4 * (2 * size + 2 * T * H * D),
          run: () => ({ o: pagedAttention(q, { k, v }, tokens, { plan }) }),
          check,
        })),
      };
    },
  };
}

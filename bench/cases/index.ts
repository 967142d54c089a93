/** What is measured, by the adapter and the patience at hand. */
import { loraLadder, matmulLadder } from "../ladder.ts";
import { addition, rowSum } from "./bandwidth.ts";
import { halfArithmetic, matrixUnits } from "./half.ts";
import type { SizedContest } from "./inputs.ts";
import { togetherOverApart } from "./lanes.ts";
import { type LoraSizes, loraBackward, loraForward, loraStep } from "./lora.ts";
import { LAYOUTS, linear, square } from "./matmul.ts";
import { fewPlaces, mixedBatch } from "./mixed.ts";
import { nextToken } from "./next-token.ts";
import { pagedContest } from "./paged.ts";
import { doraOverLora, llamaStep, loraOverFull, nf4OverF16 } from "./step.ts";
import type { StepSizes } from "./step-work.ts";
import { weightFormats } from "./weights.ts";

export interface Scope {
  /** Small sizes only: does everything work? */
  readonly quick: boolean;
  /** All sizes on a software adapter too. */
  readonly full: boolean;
  readonly isSoftware: boolean;
}

/** What a software adapter does in about a second: the product 512×2048×2048, and that with its low-rank term. */
const SOFTWARE_FLOPS = 2 * 512 * 2048 * 2048;
const LOW_RANK_SLACK = 1.15;

/** (K, N) of linear layers: SmolLM2-135M, Llama 3.2 1B, Llama 3.1 8B. */
const LAYERS: readonly (readonly [K: number, N: number])[] = [
  [576, 576],
  [576, 1536],
  [1536, 576],
  [2048, 2048],
  [2048, 8192],
  [8192, 2048],
  [4096, 4096],
  [4096, 14336],
  [14336, 4096],
];

/** One layer: 1024 wide, or half of it where that would take seconds. */
const WIDE: StepSizes = { layers: 1, hidden: 1024, inside: 2816, heads: 8, kvHeads: 4, vocab: 512, T: 256, r: 16 };
const HALF_AS_WIDE: StepSizes = { ...WIDE, hidden: 512, inside: 1376 };

/** Of short rows, at which a step of one adapter leaves a device time to spare. */
const SMALL: StepSizes = { layers: 4, hidden: 256, inside: 688, heads: 8, kvHeads: 4, vocab: 1024, T: 64, r: 8 };

export function contests({ quick, full, isSoftware }: Scope): SizedContest[] {
  if (quick) return quickContests();
  const patient = full || !isSoftware;
  const limit = patient ? Number.POSITIVE_INFINITY : SOFTWARE_FLOPS;
  const loraSizes: LoraSizes[] = [
    { M: 512, N: 2048, K: 2048 },
    { M: 2048, N: 4096, K: 4096 },
  ].flatMap((layer) => [4, 16, 64].map((r) => ({ ...layer, r })));
  const all = [
    ...[256, 512, 1024, 2048, 4096].flatMap((n) => LAYOUTS.map((layout) => square(layout, n))),
    ...[1, 16, 512, 2048].flatMap((M) => LAYERS.map(([K, N]) => linear(M, K, N))),
    ...[1, 512].flatMap((M) =>
      [
        [2048, 2048],
        [4096, 14336],
      ].map(([K = 0, N = 0]) => weightFormats(M, K, N)),
    ),
    ...[256, 4096].flatMap((n) => [halfArithmetic(n), matrixUnits(n)]),
    ...loraSizes.map(loraForward),
    ...loraSizes.map(loraBackward),
    ...loraSizes.filter(({ r }) => patient || r === 16).map(loraStep),
    mixedBatch({ hidden: 2048, inside: 8192, rows: 32, r: 16 }),
    fewPlaces({ hidden: 512, inside: 2048, rows: 32, r: 8 }),
    ...[64, 128].flatMap((D) =>
      [
        { T: 256, before: 0, isDecoding: false },
        { T: 256, before: 1024, isDecoding: false },
        { T: 1, before: 4095, isDecoding: true },
        ...(patient || D === 64 ? [{ T: 32, before: 4095, isDecoding: true }] : []),
      ].map((batch) => pagedContest({ ...batch, H: 32, G: 8, D })),
    ),
    ...[32_000, ...(patient ? [152_064] : [])].flatMap((V) =>
      [1, ...(patient ? [32] : [])].map((N) => nextToken(N, V)),
    ),
    ...[1024, ...(patient ? [4096] : [])].flatMap((n) => [addition(n, n), rowSum(n, n)]),
    llamaStep({ layers: 4, hidden: 256, inside: 688, heads: 8, kvHeads: 4, vocab: 1024, T: 256, r: 8 }),
    loraOverFull({ layers: 2, hidden: 512, inside: 1376, heads: 8, kvHeads: 4, vocab: 1024, T: 256, r: 8 }),
    doraOverLora(patient ? WIDE : HALF_AS_WIDE),
    nf4OverF16(patient ? WIDE : HALF_AS_WIDE),
    ...[2, 4].flatMap((lanes) =>
      [1, 2, 4, 8].map((rows) => togetherOverApart({ ...(patient ? WIDE : SMALL), T: 64, lanes, rows })),
    ),
    ...[1, 2, 4, 8].map((rows) => togetherOverApart({ ...(patient ? WIDE : SMALL), T: 64, lanes: 2, rows }, "nf4")),
    togetherOverApart({ ...(patient ? WIDE : SMALL), T: 64, lanes: 4, rows: 1 }, "nf4"),
    ...[2, 4].map((lanes) => togetherOverApart({ ...(patient ? WIDE : SMALL), T: 16, lanes, rows: 1 })),
    ...ladders(patient ? 2048 : 256),
  ];
  return all.filter(({ flops, group }) => flops <= limit * stepsOf(group));
}

/** A training step is three products. */
const stepsOf = (group: string | undefined): number => LOW_RANK_SLACK * (group?.endsWith("step") ? 3 : 1);

function quickContests(): SizedContest[] {
  const sizes = { M: 128, N: 128, K: 128, r: 16 };
  const tiny = { layers: 2, hidden: 64, inside: 96, heads: 4, kvHeads: 2, vocab: 128, T: 32, r: 8 };
  return [
    ...LAYOUTS.map((layout) => square(layout, 128)),
    linear(1, 576, 576),
    linear(16, 576, 576),
    weightFormats(16, 576, 576),
    halfArithmetic(256),
    matrixUnits(256),
    loraForward(sizes),
    loraBackward(sizes),
    loraStep(sizes),
    mixedBatch({ hidden: 64, inside: 96, rows: 8, r: 4 }),
    fewPlaces({ hidden: 64, inside: 96, rows: 8, r: 4 }, 50),
    pagedContest({ T: 70, before: 30, isDecoding: false, H: 6, G: 2, D: 8 }),
    pagedContest({ T: 1, before: 300, isDecoding: true, H: 6, G: 2, D: 8 }),
    nextToken(2, 1500),
    addition(256, 256),
    rowSum(256, 256),
    llamaStep(tiny),
    loraOverFull(tiny),
    doraOverLora(tiny),
    nf4OverF16(tiny),
    togetherOverApart({ ...tiny, lanes: 2, rows: 1 }),
    ...ladders(128),
  ];
}

/** The study ladders on n × n matrices; they are small enough for any device. */
function ladders(n: number): SizedContest[] {
  const size = { flops: 2 * n ** 3, largestBytes: 4 * n * n };
  return [matmulLadder(n), loraLadder({ M: n, N: n, K: n, r: 16 })].map((ladder) => ({ ...ladder, ...size }));
}

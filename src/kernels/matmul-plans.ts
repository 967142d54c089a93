/** How a matrix product may be computed: the plan taken without tuning, and the plans that tuning chooses from. */
import type { Gpu } from "../gpu/gpu.ts";
import type { Tuned } from "../gpu/kernel.ts";
import type { PackedFormat } from "../tensor/packed.ts";
import type { Layout } from "./matmul.ts";

/** Sizes and storage of one product: all that a plan may depend on. */
export interface MatmulShape {
  readonly layout: Layout;
  readonly M: number;
  readonly N: number;
  readonly K: number;
  /** Rank of the low-rank term, 0 without one. */
  readonly R: number;
  readonly batch: number;
  readonly format: "f32" | PackedFormat;
}

export interface MatmulPlan {
  /** What the tuner's cache calls it. */
  readonly name: string;
  /** `matmul-<family>.wgsl`; "direct" has a twin for "nt". */
  readonly family: "tiled" | "registers" | "rows" | "direct";
  readonly tuned: Tuned;
  /** Pieces into which k is cut. */
  readonly splits: number;
  /** Multiply in f16. Needs shader-f16. */
  readonly half?: boolean;
  /** Add up with subgroup operations. Needs subgroups. */
  readonly subgroups?: boolean;
}

/** Products that one plan suits alike: sizes rounded up to powers of two. */
export function shapeClass({ layout, M, N, K, R, batch, format }: MatmulShape): string {
  const up = (n: number): number => 2 ** Math.ceil(Math.log2(n));
  return `matmul ${layout} ${format} ${up(M)}×${up(N)}×${up(K)}${R > 0 ? " +r" : ""}${batch > 1 ? " batched" : ""}`;
}

/** A thread's tile × its workgroup, widest first. After the tables of several engines and their tuning runs on many GPUs. */
const TILES = {
  "128×128/16": { BK: 16, TM: 8, TN: 8, WX: 16, WY: 16 },
  "128×128": { BK: 8, TM: 8, TN: 8, WX: 16, WY: 16 },
  "128×64": { BK: 8, TM: 8, TN: 8, WX: 8, WY: 16 },
  "64×64": { BK: 8, TM: 8, TN: 8, WX: 8, WY: 8 },
  "64×64/4": { BK: 16, TM: 4, TN: 4, WX: 16, WY: 16 },
  "64×32/4": { BK: 16, TM: 4, TN: 4, WX: 8, WY: 16 },
  "32×32/4": { BK: 16, TM: 4, TN: 4, WX: 8, WY: 8 },
  "64×16/4": { BK: 16, TM: 4, TN: 4, WX: 4, WY: 16 },
  "16×64/4": { BK: 16, TM: 4, TN: 4, WX: 16, WY: 4 },
} as const;

const FEW_ROWS = 16;
/** Workgroups that keep a large GPU busy. */
const BUSY = 128;

/**
 * The plan without tuning, the same on every device of a kind.
 *
 * CPU adapters: `direct`, tiles as tall as the rows allow up to 16 × 8. GPUs: `rows` for "nt" up to 16 rows; else the widest tile
 * that gives 128 workgroups, at most 64 × 16 or 16 × 64 for skinny results, with k split while there are fewer.
 */
export function defaultPlan(gpu: Gpu, shape: MatmulShape): MatmulPlan {
  if (gpu.isSoftware) return directPlan(shape, 16, 8);
  const { layout, M, N, K, R, batch } = shape;
  if (layout === "nt" && M <= FEW_ROWS) return rowsPlan(gpu, shape, 4, 64);
  const skinny = N <= 32 ? "64×16/4" : M <= 32 ? "16×64/4" : undefined;
  const groups = (of: keyof typeof TILES): number => {
    const { TM, TN, WX, WY } = TILES[of];
    return Math.ceil(M / (TM * WY)) * Math.ceil(N / (TN * WX)) * batch;
  };
  const widest = fitsMemory(gpu, TILES["128×128/16"]) ? "128×128/16" : "128×128";
  const fits = ([widest, "64×64", "64×32/4"] as const).find((of) => groups(of) >= BUSY);
  const tile = skinny ?? fits ?? "32×32/4";
  const most = Math.max(1, Math.floor((K + R) / 256));
  return tiledPlan(tile, Math.min(most, Math.max(1, Math.ceil(BUSY / groups(tile)))));
}

/** What tuning tries, the default first. */
export function plans(gpu: Gpu, shape: MatmulShape): readonly MatmulPlan[] {
  const { layout, M, N, K, R } = shape;
  const all: MatmulPlan[] = [defaultPlan(gpu, shape)];
  if (gpu.isSoftware)
    for (const [TM, TN] of [[4, 8], [8, 8], [8, 16], [16, 8], [16, 16]] as const) all.push(directPlan(shape, TM, TN)); // biome-ignore format: one line
  else {
    if (layout === "nt" && M <= FEW_ROWS)
      for (const TN of [2, 4, 8])
        for (const WG of [32, 64, 128, 256]) {
          const plan = rowsPlan(gpu, shape, TN, WG);
          if (4 * (plan.tuned.TM ?? 1) * TN * WG <= gpu.limits.maxComputeWorkgroupStorageSize) all.push(plan);
        }
    const most = Math.floor((K + R) / 128);
    for (const [tile, sizes] of Object.entries(TILES)) {
      const { TM, TN, WX, WY } = sizes;
      if (!fitsMemory(gpu, sizes)) continue;
      if (TM * WY >= 4 * M || TN * WX >= 4 * N) continue; // mostly empty
      const groups = Math.ceil(M / (TM * WY)) * Math.ceil(N / (TN * WX));
      for (const splits of [1, 2, 4, 8, 16, 32])
        if (splits === 1 || (splits <= most && groups * splits <= 8 * BUSY))
          all.push(tiledPlan(tile as keyof typeof TILES, splits));
    }
  }
  return [...new Map(all.map((plan) => [plan.name, plan])).values()];
}

/** Whether a stage of f32 fits the device's workgroup memory: ROW vec4 for each of its k, as `matmul-tiled.wgsl` has it. */
function fitsMemory(gpu: Gpu, { BK, TM, TN, WX, WY }: { [size in "BK" | "TM" | "TN" | "WX" | "WY"]: number }): boolean {
  return 4 * BK * (TM * WY + TN * WX + 4) <= gpu.limits.maxComputeWorkgroupStorageSize;
}

function tiledPlan(tile: keyof typeof TILES, splits: number): MatmulPlan {
  return { name: `tiled ${tile}${splits > 1 ? ` k/${splits}` : ""}`, family: "tiled", tuned: TILES[tile], splits };
}

function rowsPlan(gpu: Gpu, { M }: MatmulShape, TN: number, WG: number): MatmulPlan {
  const subgroups = gpu.features.has("subgroups");
  const tuned = { TM: Math.min(FEW_ROWS, 2 ** Math.ceil(Math.log2(M))), TN, WG };
  return { name: `rows ${TN}/${WG}`, family: "rows", tuned, splits: 1, subgroups };
}

function directPlan({ layout, M, N }: MatmulShape, most: number, TN: number): MatmulPlan {
  const TM = Math.min(most, 2 ** Math.ceil(Math.log2(M)));
  const columns = layout === "nt" ? N : Math.ceil(N / LANES);
  return {
    name: `direct ${most}×${TN}`,
    family: "direct",
    tuned: { TM, TN: Math.min(TN, 2 ** Math.ceil(Math.log2(columns))), LANES },
    splits: 1,
  };
}

/** Invocations that a CPU adapter runs side by side: four f32 are a vector register of every x86-64 and Arm. */
const LANES = 4;

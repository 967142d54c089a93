/** How a matrix product may be computed: the plan taken without tuning, and the plans that tuning chooses from. */
import type { Gpu } from "../gpu/gpu.ts";
import { MAX_GROUPS, type Tuned } from "../gpu/kernel.ts";
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
  /** Of x or y, where their columns lie in blocks. */
  readonly isBlocked?: boolean;
}

export interface MatmulPlan {
  /** What the tuner's cache calls it. */
  readonly name: string;
  /** `matmul-<family>.wgsl`. */
  readonly family: "tiled" | "registers" | "rows" | "units";
  readonly tuned: Tuned;
  /** Pieces into which k is cut. */
  readonly splits: number;
  /** Multiply in f16. Needs shader-f16. */
  readonly half?: boolean;
  /** Add up, or share what is read, with subgroup operations. Needs subgroups. */
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
 * With matrix units (`openGpu({ matrixUnits: true })`): `units`, the widest tile of which there are 128, where one suits.
 * CPU adapters: `rows`, × 8, for "nt" up to 4 rows, else `registers`, tiles of at most 16 × 8, or 8 × 8 below 2²⁵ operations, two by two
 * to a quad. GPUs: `rows` for "nt" up to 16 rows; else the widest tile
 * that gives 128 workgroups, at most 64 × 16 or 16 × 64 for skinny results, with k split while there are fewer.
 */
export function defaultPlan(gpu: Gpu, shape: MatmulShape): MatmulPlan {
  const units = unitsPlans(gpu, shape).find(({ tuned }) => {
    const tile = unitsTile(tuned);
    return (shape.M / tile.M) * (shape.N / tile.N) >= BUSY;
  });
  if (units) return units;
  const { layout, M, N, K, R, batch } = shape;
  if (gpu.isSoftware) {
    const isWide = 2 * M * N * K * batch >= CPU_WIDE;
    if (layout === "nt" && batch === 1 && M <= 4) return cpuRowsPlan(shape, 16, 8);
    return isWide ? cpuPlan(gpu, shape, 16, 8) : cpuPlan(gpu, shape, 8, 8);
  }
  if (layout === "nt" && batch === 1 && M <= FEW_ROWS) return rowsPlan(gpu, shape, 4, 64);
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
  const all: MatmulPlan[] = [defaultPlan(gpu, shape), ...unitsPlans(gpu, shape)];
  if (gpu.isSoftware) {
    for (const [TM, TN] of [[4, 8], [8, 8], [8, 16], [16, 8], [16, 16]] as const) all.push(cpuPlan(gpu, shape, TM, TN)); // biome-ignore format: one line
    if (layout === "nt" && shape.batch === 1) for (const TN of [8, 16]) all.push(cpuRowsPlan(shape, 16, TN));
  } else {
    if (layout === "nt" && shape.batch === 1 && M <= FEW_ROWS)
      for (const TN of [2, 4, 8]) for (const WG of [32, 64, 128, 256]) all.push(rowsPlan(gpu, shape, TN, WG));
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

/** A subgroup's matrices × a workgroup's subgroups, widest first. NVIDIA's 16×16×16 gives a subgroup 64×64, 64×32 or 32×32 of y. */
const UNITS_TILES = [
  { TM: 4, TN: 4, WX: 4, WY: 2, BK: 32, BUFFERS: 1 },
  { TM: 4, TN: 4, WX: 2, WY: 2, BK: 32, BUFFERS: 2 },
  { TM: 4, TN: 4, WX: 2, WY: 2, BK: 64, BUFFERS: 1 },
  { TM: 4, TN: 4, WX: 2, WY: 2, BK: 32, BUFFERS: 0 },
  { TM: 4, TN: 2, WX: 4, WY: 2, BK: 32, BUFFERS: 2 },
  { TM: 2, TN: 2, WX: 2, WY: 2, BK: 32, BUFFERS: 2 },
] as const;

/** One of `GPUAdapterInfo.subgroupMatrixConfigs`, which the types of WebGPU do not have yet. */
interface UnitsConfig {
  readonly componentType: string;
  readonly resultComponentType: string;
  readonly M: number;
  readonly N: number;
  readonly K: number;
}

/** The rows and columns of y that a workgroup of `matmul-units.wgsl` makes. */
export function unitsTile({ UM = 1, UN = 1, TM = 1, TN = 1, WX = 1, WY = 1 }: Tuned): { M: number; N: number } {
  return { M: UM * TM * WY, N: UN * TN * WX };
}

/** False if the plan cannot compute such a product: `matmul-units.wgsl` takes whole tiles only, and `matmul-rows.wgsl` no batches. */
export function suits({ family, tuned }: MatmulPlan, shape: MatmulShape): boolean {
  if (family === "rows") return shape.batch === 1;
  if (family !== "units") return true;
  const { layout, M, N, K, R, batch, format, isBlocked = false } = shape;
  const tile = unitsTile(tuned);
  const { BK = 1, BUFFERS = 2 } = tuned;
  return (
    batch === 1 &&
    !isBlocked &&
    (format === "f32" || format === "f16") &&
    M % tile.M === 0 &&
    N % tile.N === 0 &&
    K % BK === 0 &&
    R % (BUFFERS === 0 ? BK : 8) === 0 &&
    !(R > 0 && layout === "tn")
  );
}

/** The tiles of matrix units that this device and product allow; none without the units. */
function unitsPlans(gpu: Gpu, shape: MatmulShape): MatmulPlan[] {
  if (!UNITS_FEATURES.every((feature) => gpu.features.has(feature))) return [];
  const info: GPUAdapterInfo & { readonly subgroupMatrixConfigs?: readonly UnitsConfig[] } = gpu.info;
  const { subgroupMinSize: lanes, subgroupMaxSize, subgroupMatrixConfigs: configs = [] } = info;
  // How many subgroups a workgroup has is fixed when the pipeline is made: their size must be.
  if (lanes !== subgroupMaxSize) return [];
  const unit = configs
    .filter(({ componentType, resultComponentType }) => componentType === "f16" && resultComponentType === "f32")
    .sort((a, b) => b.M * b.N * b.K - a.M * a.N * a.K)[0];
  if (!unit) return [];
  return UNITS_TILES.map((tile): MatmulPlan => {
    const tuned = { ...tile, UM: unit.M, UN: unit.N, UK: unit.K, WG: tile.WX * tile.WY * lanes };
    const { M, N } = unitsTile(tuned);
    return { name: `units ${M}×${N}×${tile.BK}/${tuned.WG}, ${tile.BUFFERS} held`, family: "units", tuned, splits: 1 };
  }).filter((plan) => {
    const { BK = 1, BUFFERS = 0, WG = 1, UK = 1 } = plan.tuned;
    const { M, N } = unitsTile(plan.tuned);
    const bytes = (side: number): number => 2 * Math.max(1, BUFFERS) * Math.max(side * (BK + 8), BK * (side + 8));
    return (
      WG <= gpu.limits.maxComputeInvocationsPerWorkgroup &&
      bytes(M) + bytes(N) <= gpu.limits.maxComputeWorkgroupStorageSize &&
      BK % UK === 0 &&
      (M * BK) % (8 * WG) === 0 &&
      (N * BK) % (8 * WG) === 0 &&
      suits(plan, shape)
    );
  });
}

const UNITS_FEATURES = ["chromium-experimental-subgroup-matrix", "shader-f16"];

function tiledPlan(tile: keyof typeof TILES, splits: number): MatmulPlan {
  return { name: `tiled ${tile}${splits > 1 ? ` k/${splits}` : ""}`, family: "tiled", tuned: TILES[tile], splits };
}

/** Columns of a workgroup of `rows`, twice as many as long as N would take more workgroups than an axis has. */
const wideEnough = (N: number, TN: number): number => (Math.ceil(N / TN) > MAX_GROUPS ? wideEnough(N, 2 * TN) : TN);

/** With a smaller WG where the sums of its threads would not fit. */
function rowsPlan(gpu: Gpu, { M, N, format }: MatmulShape, leastTN: number, mostWG: number): MatmulPlan {
  const TM = Math.min(FEW_ROWS, 2 ** Math.ceil(Math.log2(M)));
  const TN = wideEnough(N, leastTN);
  let WG = mostWG;
  const levels = format === "nf4" ? 64 : 0; // parts/nf4-levels.wgsl
  while (4 * TM * TN * WG + levels > gpu.limits.maxComputeWorkgroupStorageSize) WG /= 2;
  const subgroups = gpu.features.has("subgroups");
  return { name: `rows ${TN}/${WG}`, family: "rows", tuned: { TM, TN, WG }, splits: 1, subgroups };
}

/** For a CPU adapter: `registers`, a tile of at most TM × TN to a thread. */
function cpuPlan(gpu: Gpu, { M, N }: MatmulShape, most: number, widest: number): MatmulPlan {
  // A quad is two tiles by two. What one side does not need goes to the other.
  const side = (n: number, limit: number): number => Math.max(4, Math.min(limit, 2 ** Math.ceil(Math.log2(n / 2))));
  const [high, wide] = [side(M, most), side(N, widest)];
  const [TM, TN] = [side(M, Math.min(16, (most * widest) / wide)), side(N, Math.min(16, (most * widest) / high))];
  const tuned = { TM: wide < widest ? TM : high, TN: high < most ? TN : wide, WG: LANES };
  return {
    ...{ name: `cpu ${most}×${widest}`, family: "registers", tuned, splits: 1 },
    subgroups: gpu.features.has("subgroups"),
  };
}

/** For a CPU adapter and "nt": `rows`, whose lanes read along k, so that a cache line is used up at once. */
function cpuRowsPlan({ M, N }: MatmulShape, most: number, leastTN: number): MatmulPlan {
  const TM = Math.min(most, 2 ** Math.ceil(Math.log2(M)));
  const TN = wideEnough(N, leastTN);
  return { name: `cpu rows ${most}×${TN}`, family: "rows", tuned: { TM, TN, WG: 4 }, splits: 1 };
}

/** Invocations that a CPU adapter runs side by side: eight f32 are a vector register of AVX2, or two of SSE and Neon. */
const LANES = 8;
/** Operations from which the wide tile's longer compilation pays. */
export const CPU_WIDE: number = 2 ** 25;

/**
 * Operations of one dispatch: about 100 ms on a software adapter of two cores and on a GPU of half a TFLOP/s, so that no page or driver waits for
 * it too long. Windows takes a device away that is busy for two seconds.
 */
export const mostOperations = ({ isSoftware }: Gpu): number => (isSoftware ? 2 ** 29 : 5e10);

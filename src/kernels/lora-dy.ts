import type { Gpu } from "../gpu/gpu.ts";
import { defineKernel, definePart } from "../gpu/kernel.ts";
import { dims2, empty, expectDType, expectShape, type Tensor, view } from "../tensor/tensor.ts";
import loraDySource from "./lora-dy.wgsl";
import sumsSource from "./lora-dy-sums.wgsl";
import { matmul } from "./matmul.ts";
import { defaultPlan } from "./matmul-plans.ts";
import raggedSource from "./parts/ragged-dy.wgsl";

const loraDyKernel = defineKernel("lora-dy", loraDySource);
const loraDySums = defineKernel("lora-dy-sums", sumsSource);
const RAGGED = definePart("ragged-dy", raggedSource);

/** How to compute the two products: by one `matmul` each, or together. */
export type LoraDyPlan = { readonly name: "apart" } | Fused;

interface Fused {
  readonly name: string;
  /** Of a tile. */
  readonly rows: 64 | 128;
  /** About so many: they cut the columns into strips. */
  readonly workgroups: number;
}

export interface LoraDyShape {
  readonly M: number;
  readonly N: number;
  readonly R: number;
}

/** Of v [...,R] and dB [N,R]. */
export interface LoraDy {
  readonly v: Tensor;
  readonly dB: Tensor;
}

/**
 * v = s·dy·B and dB = s·dyᵀ·u: what a LoRA layer's backward pass needs of dy beside dx, in two dispatches that read dy once, or by
 * two products where those are the cheaper way.
 *
 * dy [...,N], B [N,R], u [...,R]; leading axes are rows. f32. v goes to `out`, of its shape, if that is given. Ranks above 64 are computed
 * apart. Throws ShapeError if the shapes do not fit.
 */
export function loraDy(dy: Tensor, B: Tensor, u: Tensor, s: number, plan?: LoraDyPlan, out?: Tensor): LoraDy {
  const { gpu } = dy;
  const [M, N] = dims2("loraDy", "dy", dy);
  const [, R] = dims2("loraDy", "B", B);
  expectShape("loraDy", "B must be [N,R]", B, [N, R]);
  if (u.shape.length !== 2) expectShape("loraDy", "u must be [...,R]", u, [...dy.shape.slice(0, -1), R]);
  else expectShape("loraDy", "u must be [M,R]", u, [M, R]);
  for (const [name, t] of Object.entries({ dy, B, u })) expectDType("loraDy", name, t, "f32");
  if (out) expectShape("loraDy", "out must be [...,R]", out, [...dy.shape.slice(0, -1), R]);
  const shape = { M, N, R };
  const chosen =
    plan ??
    gpu.tuner.choose(shapeClass(shape), () => ({
      candidates: loraDyPlans(gpu, shape),
      trial: () => trial(gpu, shape),
    })) ??
    defaultLoraDyPlan(gpu, shape);
  return run(chosen, dy, B, u, s, shape, out);
}

function run(
  plan: LoraDyPlan,
  dy: Tensor,
  B: Tensor,
  u: Tensor,
  s: number,
  { M, N, R }: LoraDyShape,
  out?: Tensor,
): LoraDy {
  const { gpu } = dy;
  if (!("rows" in plan) || R > MOST_RANK || M * N * R === 0) {
    const flat = view(dy, [M, N]);
    return {
      v: matmul(dy, B, "nn", { scale: s, ...(out && { out }) }),
      dB: matmul(flat, view(u, [M, R]), "tn", { scale: s }),
    };
  }
  const { R4, BN4, WG, blocks, strips, tiles, partials } = fusedSizes(plan, { M, N, R });
  const ragged = N % 4 !== 0 || R % 4 !== 0;
  return gpu.scope(() => {
    const parts = empty(gpu, [partials], "loraDy");
    const v = out ?? empty(gpu, [...dy.shape.slice(0, -1), R], "loraDy");
    const dB = empty(gpu, [N, R], "loraDy");
    loraDyKernel(
      gpu,
      { M, N, R, strips, tiles },
      { dy, B, u, parts },
      [strips * WG, blocks],
      { BM: plan.rows, BN4, R4, WG },
      ragged ? [RAGGED] : [],
    );
    loraDySums(gpu, { M, N, R, strips, blocks, s }, { parts, v, dB }, [(M + N) * R]);
    return { v, dB };
  });
}

/** Above it a thread's share of v would not fit into registers. */
const MOST_RANK = 64;

/** How a plan cuts dy, and how many f32 of partial sums it writes. */
function fusedSizes({ rows, workgroups }: Fused, { M, N, R }: LoraDyShape) {
  const R4 = 2 ** Math.ceil(Math.log2(Math.ceil(R / 4)));
  const WG = rows === 128 ? 128 : 64;
  const BN4 = rows === 128 ? 4 : Math.min(8, WG / R4);
  const blocks = Math.ceil(M / rows);
  const across = Math.ceil(N / (4 * BN4));
  const tiles = Math.ceil(across / Math.min(across, Math.ceil(workgroups / blocks)));
  const strips = Math.ceil(across / tiles);
  return { R4, BN4, WG, blocks, strips, tiles, partials: 4 * Math.ceil(R / 4) * (strips * M + blocks * N) };
}

const FUSED: readonly Fused[] = ([128, 64] as const).flatMap((rows) =>
  [128, 512].map((workgroups) => ({ name: `fused ${rows} /${workgroups}`, rows, workgroups })),
);
/** Bytes that a GPU moves while it gets from one dispatch to the next: some µs at some hundred GB/s. */
const DISPATCH_BYTES = 2 ** 20;

/**
 * The plan without tuning: "apart" on a CPU adapter, else whichever costs fewer bytes, a dispatch counting as 1 MiB.
 *
 *     fused   4MN + 8·partial sums                            two dispatches
 *     apart   8MN + 8·partial sums where k is split           two dispatches, one more for each product that is split
 *
 * Tiles have 128 rows, or 64 where M is at most 64. 128 workgroups, or 512 where their strips are at least 8·R columns wide and the
 * partial sums of v so at most a quarter of dy's bytes.
 */
export function defaultLoraDyPlan(gpu: Gpu, shape: LoraDyShape): LoraDyPlan {
  const { M, N, R } = shape;
  const apart = { name: "apart" } as const;
  const height = M > 64 ? 128 : 64;
  const many = (N * Math.ceil(M / height)) / 512 >= 8 * R;
  const fused = FUSED.find(({ rows, workgroups }) => rows === height && workgroups === (many ? 512 : 128));
  if (gpu.isSoftware || !fused || R > MOST_RANK || M * N * R === 0) return apart;
  let apartCost = 8 * M * N;
  for (const product of [
    { layout: "nn", M, N: R, K: N },
    { layout: "tn", M: N, N: R, K: M },
  ] as const) {
    const { splits } = defaultPlan(gpu, { ...product, R: 0, batch: 1, format: "f32" });
    apartCost += DISPATCH_BYTES;
    if (splits > 1) apartCost += 8 * splits * product.M * R + DISPATCH_BYTES;
  }
  const fusedCost = 4 * M * N + 8 * fusedSizes(fused, shape).partials + 2 * DISPATCH_BYTES;
  return fusedCost < apartCost ? fused : apart;
}

/** What tuning tries, the default first. On a CPU adapter that is all: "fused" took at least three times the CPU time there. */
export function loraDyPlans(gpu: Gpu, shape: LoraDyShape): readonly LoraDyPlan[] {
  const first = defaultLoraDyPlan(gpu, shape);
  if (gpu.isSoftware || shape.R > MOST_RANK) return [first];
  const all: LoraDyPlan[] = [first, { name: "apart" }, ...FUSED];
  return [...new Map(all.map((plan) => [plan.name, plan])).values()];
}

function shapeClass({ M, N, R }: LoraDyShape): string {
  const up = (n: number): number => 2 ** Math.ceil(Math.log2(n));
  return `lora-dy ${up(M)}×${up(N)} r${up(R)}`;
}

/** Operands of such a shape, for the tuner to time plans on. */
function trial(gpu: Gpu, shape: LoraDyShape): { readonly run: (plan: LoraDyPlan) => void; readonly done: () => void } {
  const { M, N, R } = shape;
  const [dy, B, u] = [empty(gpu, [M, N], "tune"), empty(gpu, [N, R], "tune"), empty(gpu, [M, R], "tune")];
  for (const t of [dy, B, u])
    gpu.write(
      t,
      Float32Array.from({ length: t.size }, (_, i) => ((i * 37) % 64) / 64 - 0.5),
    );
  return {
    run: (plan) =>
      gpu.scope(() => {
        run(plan, dy, B, u, 1, shape);
      }),
    done: () => gpu.release(dy, B, u),
  };
}

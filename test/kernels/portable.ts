// In whatever runtime: compiles every kernel and every variant of the products with its pipeline, then runs products of all layouts,
// formats and plans and compares them with f64. npm run kernels:deno, npm run kernels:chrome. With the argument "numbers" it compiles
// only what it runs: npm run same-numbers.
import { compileErrors } from "../../bench/compile.ts";
import { type Gpu, openGpu } from "../../src/gpu/gpu.ts";
import { type Layout, type MatmulOptions, matmul } from "../../src/kernels/matmul.ts";
import type { MatmulPlan } from "../../src/kernels/matmul-plans.ts";
import { packMatrix } from "../../src/kernels/pack.ts";
import { unpackMatrix } from "../../src/kernels/unpack.ts";
import { isPacked, type PackedMatrix } from "../../src/tensor/packed.ts";
import { Random } from "../../src/tensor/random.ts";
import { read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import {
  HALF,
  KERNELS,
  LAYOUTS,
  matmulVariants,
  otherVariants,
  REGISTERS,
  ROWS,
  SPLIT,
  type STORED,
  SUBGROUP_ROWS,
  storedFor,
  TILED,
  type Variant,
} from "./variants.ts";

/** What one product came to. */
interface Outcome {
  /** Of the bits of y: equal hashes are equal numbers. */
  readonly hash: string;
  /** The largest |y − expected| / (1 + |expected|). */
  readonly error: number;
}

export interface KernelReport {
  readonly ok: boolean;
  readonly runtime: string;
  readonly adapter: string;
  /** Pipelines made, and variants for which the device lacks a feature. */
  readonly compiled: number;
  readonly skipped: number;
  /** What the compilers said, and which products were wrong. */
  readonly complaints: readonly string[];
  readonly worst: number;
  readonly outcomes: Readonly<Record<string, Outcome>>;
}

const SEED = 20_260_801;
/** Relative to 1 + |expected|: sums of up to 128 products of numbers below 1, in f32, or of products rounded to f16. */
const ALLOWED = { f32: 1e-5, f16: 1e-2 };
/** How far packing may move a number below 1: half a unit in the last place, half a step of the codes. */
const PACKING = { f32: 0, f16: 2 ** -12, bf16: 2 ** -9, int8: 0.5 / 127, nf4: 0.1519036 };
const SCALES_PACKING = 0.0071;

/** A product of few rows, wide enough that nf4's quantised scales have two blocks; and one of which no size is even. */
const WIDE = { M: 5, N: 132, K: 128 };
const ODD = { M: 17, N: 29, K: 35 };

try {
  const gpu = await openGpu({ tune: "off", poison: true });
  const outcomes: Record<string, Outcome> = {};
  const complaints: string[] = [];
  let [compiled, skipped] = [0, 0];
  if (!scriptArgs.includes("numbers")) {
    const all = everything();
    const here = all.filter(({ needs }) => needs.every((feature) => gpu.features.has(feature)));
    // As `Gpu` does: naga has the subgroup functions but refuses the line that WGSL wants for them.
    const text = (source: string): string =>
      gpu.runtime === "deno" ? source.replace(/^enable subgroups;$/m, "") : source;
    complaints.push(
      ...(await compileErrors(
        gpu.device,
        here.map(({ key, source, constants }) => ({ name: key, source: text(source), constants })),
      )),
    );
    [compiled, skipped] = [here.length, all.length - here.length];
  }
  for (const product of products(gpu)) {
    const { name, allowed } = product;
    const found = await outcome(gpu, product);
    outcomes[name] = found;
    if (!(found.error <= allowed)) complaints.push(`${name}: off by ${found.error}, allowed are ${allowed}`);
  }
  const report: KernelReport = {
    ok: complaints.length === 0,
    runtime: gpu.runtime,
    adapter: `${gpu.info.vendor} ${gpu.info.architecture} ${gpu.info.description}`,
    ...{ compiled, skipped, complaints, outcomes },
    worst: Math.max(...Object.values(outcomes).map(({ error }) => error)),
  };
  finish(JSON.stringify(report));
} catch (error) {
  finish(JSON.stringify({ ok: false, error: String(error), stack: (error as Error).stack }));
}

function everything(): readonly Variant[] {
  const asTheyStand = Object.entries(KERNELS).map(([key, source]) => ({ key, source, constants: {}, needs: [] }));
  return [...asTheyStand, ...otherVariants(), ...matmulVariants()];
}

interface Product {
  readonly name: string;
  readonly layout: Layout;
  readonly stored: (typeof STORED)[number];
  readonly plan: MatmulPlan | undefined;
  readonly sizes: typeof WIDE;
  /** With LoRA columns, a bias, SiLU and a residual. */
  readonly whole: boolean;
  readonly allowed: number;
}

function products(gpu: Gpu): Product[] {
  const all: Product[] = [];
  for (const layout of LAYOUTS)
    for (const stored of storedFor(layout)) {
      const f32 = stored.format === "f32";
      const plans = [
        undefined,
        TILED,
        ...(f32 ? [SPLIT, REGISTERS] : []),
        ...(layout === "nt" ? [ROWS] : []),
        ...(layout === "nt" && gpu.features.has("subgroups") ? [SUBGROUP_ROWS] : []),
        ...(gpu.features.has("shader-f16") ? [HALF] : []),
      ];
      for (const plan of plans)
        for (const [kind, sizes] of [...(f32 ? ([[", ragged", ODD]] as const) : []), ["", WIDE]] as const)
          all.push({
            name: `${plan?.name ?? "default"}, ${layout} ${stored.name}${kind}`,
            ...{ layout, stored, plan, sizes },
            whole: f32 && sizes === WIDE,
            allowed: plan?.half ? ALLOWED.f16 : ALLOWED.f32,
          });
    }
  return all;
}

async function outcome(gpu: Gpu, { layout, stored, plan, sizes: { M, N, K }, whole }: Product): Promise<Outcome> {
  const random = new Random(SEED);
  const make = (...shape: number[]): { values: Float32Array; on: Tensor } => {
    const values = Float32Array.from({ length: shape.reduce((size, n) => size * n, 1) }, () => random.uniform(-1, 1));
    return { values, on: tensor(gpu, values, shape) };
  };
  const R = 3;
  const wShape: [number, number] = layout === "nt" ? [N, K] : [K, N];
  const x = layout === "tn" ? make(K, M) : make(M, K);
  const given = make(...wShape);
  const [u, b, bias, residual] = [make(M, R), layout === "nt" ? make(N, R) : make(R, N), make(N), make(M, N)];
  const { doubleQuant = false } = stored;
  const w: Tensor | PackedMatrix =
    stored.format === "f32" ? given.on : packMatrix(gpu, given.values, wShape, stored.format, { doubleQuant });

  const used = isPacked(w) ? await read(unpackMatrix(w)) : given.values;
  const moved = used.reduce((most, value, i) => Math.max(most, Math.abs(value - (given.values[i] ?? 0))), 0);
  if (!(moved <= PACKING[stored.format] + (doubleQuant ? SCALES_PACKING : 0)))
    throw new Error(`${stored.name}: packing moved a number by ${moved}`);

  const options: MatmulOptions = {
    ...{ ...(plan && { plan }), scale: 0.5 },
    ...(whole && { lowRank: { u: u.on, b: b.on, scale: 2 }, bias: bias.on, activation: "silu", residual: residual.on }),
  };
  const y = await read(gpu.scope(() => matmul(x.on, w, layout, options)));
  gpu.release(x.on, given.on, u.on, b.on, bias.on, residual.on);

  let error = 0;
  for (let i = 0; i < M; i++)
    for (let j = 0; j < N; j++) {
      let expected = 0;
      for (let k = 0; k < K; k++)
        expected +=
          0.5 *
          (x.values[layout === "tn" ? k * M + i : i * K + k] ?? 0) *
          (used[layout === "nt" ? j * K + k : k * N + j] ?? 0);
      if (whole) {
        for (let r = 0; r < R; r++)
          expected += 2 * (u.values[i * R + r] ?? 0) * (b.values[layout === "nt" ? j * R + r : r * N + j] ?? 0);
        expected += bias.values[j] ?? 0;
        expected = expected / (1 + Math.exp(-expected)) + (residual.values[i * N + j] ?? 0);
      }
      const off = Math.abs((y[i * N + j] ?? Number.NaN) - expected) / (1 + Math.abs(expected));
      if (!(off <= error)) error = Number.isNaN(off) ? Number.POSITIVE_INFINITY : off;
    }
  return { hash: hash(y), error };
}

/** FNV-1a of the bits. */
function hash(values: Float32Array<ArrayBuffer>): string {
  let sum = 0x811c9dc5;
  for (const byte of new Uint8Array(values.buffer)) sum = Math.imul(sum ^ byte, 0x01000193) >>> 0;
  return sum.toString(16).padStart(8, "0");
}

// What the ops' tests (test/autograd) do not see: the ways a row is gone through, on a GPU too, and that bits repeat.
import { expect, test } from "vitest";
import type { HasBuffer } from "../../src/gpu/gpu.ts";
import { rmsNorm, rmsNormBackward, rmsNormBackwardWeight } from "../../src/kernels/rms-norm.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { empty, read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { expectClose, freshSeed, type Nd, nd, randomNd, testGpu, upload } from "../harness.ts";
import { findRaces } from "../race.ts";
import { rmsNormTwin } from "../reference/model-ops.ts";
import { type Recorded, Recorder } from "./recorder.ts";

const EPS = 1e-5;

/** dx and dw of Σ dy·rmsNorm(x), by the formula. */
function backwardTwin(dy: Nd, x: Nd, w: Nd): { dx: Float64Array; dw: Float64Array } {
  const H = w.data.length;
  const [dx, dw] = [new Float64Array(x.data.length), new Float64Array(H)];
  const value = (t: Nd, i: number): number => t.data[i] ?? Number.NaN;
  for (let row = 0; row < x.data.length; row += H) {
    let [squares, along] = [0, 0];
    for (let h = 0; h < H; h++) {
      squares += value(x, row + h) ** 2;
      along += value(dy, row + h) * value(w, h) * value(x, row + h);
    }
    const r = 1 / Math.sqrt(squares / H + EPS);
    for (let h = 0; h < H; h++) {
      dx[row + h] = r * (value(dy, row + h) * value(w, h) - (value(x, row + h) * r * r * along) / H);
      dw[h] = (dw[h] ?? 0) + value(dy, row + h) * value(x, row + h) * r;
    }
  }
  return { dx, dw };
}

const sumOf = (a: Nd, b: Nd): Nd =>
  nd(
    a.shape,
    a.data.map((value, i) => Math.fround(value + (b.data[i] ?? 0))),
  );

/** Sizes below, at and above the workgroups of 32, 128 and 256 threads, in fours and one by one. */
const SIZES: [rows: number, H: number][] = [
  [1, 1],
  [3, 4],
  [2, 127],
  [2, 129],
  [5, 512],
  [66, 516],
  [2, 2052],
];

test.each(SIZES)("rmsNorm of %i rows of %i, of a sum too, and its gradients equal their f64 twins", async (rows, H) => {
  const gpu = await testGpu();
  const seed = freshSeed();
  const random = new Random(seed);
  const [x, delta, dy, more] = Array.from({ length: 4 }, () => randomNd([rows, H], random)) as [Nd, Nd, Nd, Nd];
  const w = randomNd([H], random);
  const [tx, tdelta, tdy, tmore, tw] = [x, delta, dy, more, w].map((t) => upload(gpu, t)) as Tensor[] as [
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
  ];
  const sum = sumOf(x, delta);
  const plain = rmsNorm(tx, tw, EPS);
  const summed = rmsNorm(tx, tw, EPS, 0, tdelta);
  expect(plain.sum, "of nothing added").toBe(tx);
  expectClose(await read(plain.y), rmsNormTwin(x, w, EPS).data, 1e-5, `y (seed ${seed})`);
  expect([...(await read(summed.sum))]).toEqual([...sum.data]);
  expectClose(await read(summed.y), rmsNormTwin(sum, w, EPS).data, 1e-5, `y of the sum (seed ${seed})`);
  const apart = rmsNorm(upload(gpu, sum), tw, EPS);
  expect(await read(summed.y), "the bits of a sum made before").toEqual(await read(apart.y));

  const expected = backwardTwin(dy, sum, w);
  const dx = () => rmsNormBackward(tdy, summed.sum, tw, summed.r);
  const into = rmsNormBackward(tdy, summed.sum, tw, summed.r, 0, tmore);
  expectClose(await read(dx()), expected.dx, 2e-5, `dx (seed ${seed})`);
  const added = expected.dx.map((value, i) => value + (more.data[i] ?? 0));
  expectClose(await read(into), added, 2e-5, `dx added (seed ${seed})`);
  const dw = () => rmsNormBackwardWeight(tdy, summed.sum, summed.r);
  expectClose(await read(dw()), expected.dw, 1e-4, `dw (seed ${seed})`);
  expect(await read(dx()), "dx again").toEqual(await read(dx()));
  expect(await read(dw()), "dw again").toEqual(await read(dw()));
});

test("addRmsNorm names the delta that does not fit", async () => {
  const gpu = await testGpu();
  expect(() => rmsNorm(empty(gpu, [2, 3], "x"), empty(gpu, [3], "w"), EPS, 0, empty(gpu, [3, 2], "delta"))).toThrow(
    new ShapeError("addRmsNorm: delta must have the shape of x = [2,3], got [3,2]"),
  );
});

/** A GPU, not a CPU adapter, played by the interpreter. */
class Interpreter extends Recorder {
  readonly races: string[] = [];
  readonly #edit: (source: string) => string;
  readonly #data = new Map<GPUBuffer, Float32Array>();

  constructor(edit: (source: string) => string) {
    super();
    this.#edit = edit;
  }

  override allocate(size: number): GPUBuffer {
    const buffer = super.allocate(size);
    this.#data.set(buffer, new Float32Array(size / 4).fill(Number.NaN));
    return buffer;
  }

  override write({ buffer }: HasBuffer, data: ArrayBufferView): void {
    this.#data.set(buffer, Float32Array.from(data as Float32Array));
  }

  protected override record({ sent, uniforms, buffers, groups }: Recorded): void {
    const ids = Object.entries(buffers);
    const given = Object.fromEntries(ids.map(([id, buffer]) => [id, this.values(buffer)]));
    const { key: name, constants } = sent;
    const found = findRaces({ name, source: this.#edit(sent.source), constants, groups, uniforms, buffers: given });
    this.races.push(...found.races, ...found.divergences);
    for (const [id, buffer] of ids) if (found.outputs[id]) this.#data.set(buffer, found.outputs[id]);
  }

  values(buffer: GPUBuffer): Float32Array {
    return this.#data.get(buffer) ?? new Float32Array();
  }
}

/** Runs both kernels, with what can be added or without, on a GPU that is none. */
function interpret(H: number, adds: boolean, edit = (source: string): string => source) {
  const gpu = new Interpreter(edit);
  const random = new Random(freshSeed());
  const [x, delta, dy, more] = Array.from({ length: 4 }, () => randomNd([2, H], random)) as [Nd, Nd, Nd, Nd];
  const w = randomNd([H], random);
  const on = ({ shape, data }: Nd): Tensor => tensor(gpu, Float32Array.from(data), shape);
  const { y, r, sum } = rmsNorm(on(x), on(w), EPS, 0, adds ? on(delta) : undefined);
  const dx = rmsNormBackward(on(dy), sum, on(w), r, 0, adds ? on(more) : undefined);
  const s = adds ? sumOf(x, delta) : x;
  const expected = backwardTwin(dy, s, w).dx.map((value, i) => value + (adds ? (more.data[i] ?? 0) : 0));
  const values = (t: Tensor): Float32Array => gpu.values(t.buffer).slice(0, t.size);
  return { gpu, y: values(y), dx: values(dx), expectedY: rmsNormTwin(s, w, EPS).data, expectedDx: expected };
}

test.each([
  [148, false],
  [35, true],
  [148, true],
])("on a GPU no threads of a row of %i race, added to: %s", (H, adds) => {
  const { gpu, y, dx, expectedY, expectedDx } = interpret(H, adds);
  expect(gpu.races).toEqual([]);
  expectClose(y, expectedY, 1e-5, "y");
  expectClose(dx, expectedDx, 2e-5, "dx");
});

test.each([0, 1])("without its barrier %i threads of a row race", (n) => {
  const { gpu } = interpret(148, false, (source) => {
    let barriers = 0;
    return source.replace(/workgroupBarrier\(\);/g, (barrier) => (barriers++ === n ? "" : barrier));
  });
  expect(gpu.races.join("\n")).toMatch(/Data race on 'sums'/);
});

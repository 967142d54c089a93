/** A tensor is a shape on a buffer. Row-major, contiguous; arithmetic is upstairs in `kernels`. */
import type { Gpu, HasBuffer } from "../gpu/gpu.ts";
import { ShapeError } from "./errors.ts";

/** What 4 bytes of the buffer hold. Weights stored in 16 bits are widened to f32 on their way in. */
export type DType = "f32" | "i32";

/** Sizes of the axes, the outermost first; [] of a single number. */
export type Shape = readonly number[];

/** WebGPU §3.6.2: minStorageBufferOffsetAlignment is at most this. */
export const VIEW_ALIGNMENT = 256;

/** Makes the gradient of one input. One that `adds` takes the gradient there is already and returns their sum: see `adding`. */
export type Thunk = ((sum?: Tensor) => Tensor) & { readonly adds?: true };

/** How a tensor was made: what `record` keeps and `backward` walks. */
export interface GraphNode {
  readonly op: string;
  readonly inputs: readonly Tensor[];
  readonly vjp: (dy: Tensor) => readonly Thunk[];
  /** In place of `vjp`, where the one input is all that was kept: computes what led to y again. */
  readonly again?: (dy: Tensor) => { readonly dx: Tensor | undefined; readonly leaves: Map<Tensor, Tensor> };
}

/** An array of f32 or i32 on the device, row-major. Has the buffer that it was made with, which a scope or `gpu.release` gives back. */
export class Tensor implements HasBuffer {
  readonly gpu: Gpu;
  readonly buffer: GPUBuffer;
  readonly shape: Shape;
  readonly dtype: DType;
  /** Where it starts in the buffer: 0, but for a view of some rows. */
  readonly offsetBytes: number;
  /** True for a trainable leaf, and for whatever was computed from one. */
  requiresGrad = false;
  node: GraphNode | undefined;

  constructor(gpu: Gpu, buffer: GPUBuffer, shape: Shape, dtype: DType, offsetBytes = 0) {
    this.gpu = gpu;
    this.buffer = buffer;
    this.shape = shape;
    this.dtype = dtype;
    this.offsetBytes = offsetBytes;
  }

  /** Number of elements. */
  get size(): number {
    return this.shape.reduce((a, b) => a * b, 1);
  }

  get sizeBytes(): number {
    return 4 * this.size;
  }
}

/** A tensor of undefined content. */
export function empty(gpu: Gpu, shape: Shape, op: string, dtype: DType = "f32"): Tensor {
  if (shape.some((n) => !Number.isInteger(n) || n < 0))
    throw new ShapeError(`${op}: a shape is of whole numbers, got [${shape}]`);
  const size = shape.reduce((a, b) => a * b, 1);
  return new Tensor(gpu, gpu.allocate(4 * size, op), shape, dtype);
}

/** A tensor with these values. Float32Array makes f32, Int32Array i32; a plain array makes f32. Throws if the count does not fit. */
export function tensor(gpu: Gpu, values: Float32Array | Int32Array | readonly number[], shape: Shape): Tensor {
  const data = ArrayBuffer.isView(values) ? values : Float32Array.from(values);
  const t = empty(gpu, shape, "tensor", data instanceof Int32Array ? "i32" : "f32");
  if (data.length !== t.size)
    throw new ShapeError(`tensor: shape [${shape}] holds ${t.size} values, got ${data.length}`);
  gpu.write(t, data);
  return t;
}

/** The same buffer under another shape of the same size. Not differentiable: see `reshape` in autograd. */
export function view(t: Tensor, shape: Shape, op = "view"): Tensor {
  const viewed = new Tensor(t.gpu, t.buffer, shape, t.dtype, t.offsetBytes);
  if (viewed.size !== t.size)
    throw new ShapeError(`${op}: [${t.shape}] has ${t.size} elements and cannot take the shape [${shape}]`);
  return viewed;
}

/** The elements of t from `first` on as a tensor of this shape: a view. Throws ShapeError unless they start at 256 bytes. */
export function slice(t: Tensor, first: number, shape: Shape): Tensor {
  const sliced = new Tensor(t.gpu, t.buffer, shape, t.dtype, t.offsetBytes + 4 * first);
  if (first < 0 || first + sliced.size > t.size)
    throw new ShapeError(`slice: elements must be within the ${t.size} of t, got ${sliced.size} from ${first} on`);
  if (sliced.offsetBytes % VIEW_ALIGNMENT !== 0)
    throw new ShapeError(
      `slice: a view must start at a multiple of ${VIEW_ALIGNMENT} bytes, got ${sliced.offsetBytes}. Copy the rows`,
    );
  return sliced;
}

/** How many rows of so many columns a block of at least `rows` has, so that the block after it begins where a view may. */
export function blockRows(rows: number, columns: number): number {
  const elements = VIEW_ALIGNMENT / 4;
  let step = elements;
  while (step % 2 === 0 && ((step / 2) * columns) % elements === 0) step /= 2;
  return Math.ceil(rows / step) * step;
}

/** Rows first … first + count of a matrix, as a view. Throws ShapeError as `slice`. */
export function rowsOf(t: Tensor, first: number, count: number): Tensor {
  const [, columns] = dims2("rowsOf", "t", t);
  return slice(t, first * columns, [count, columns]);
}

/** The values of one tensor, in row-major order. Waits for the device. */
export async function read(t: Tensor): Promise<Float32Array<ArrayBuffer>> {
  const [values] = await readAll([t]);
  return values ?? new Float32Array();
}

/** The values of several tensors in one readback. i32 values come as numbers. */
export async function readAll(tensors: readonly Tensor[]): Promise<Float32Array<ArrayBuffer>[]> {
  const [first] = tensors;
  if (!first) return [];
  const buffers = await first.gpu.read(tensors);
  return buffers.map((bytes, i) =>
    tensors[i]?.dtype === "i32" ? Float32Array.from(new Int32Array(bytes)) : new Float32Array(bytes),
  );
}

/** The two sizes of a matrix, leading axes folded into the first. Throws ShapeError below two axes. */
export function dims2(op: string, name: string, t: Tensor): [rows: number, columns: number] {
  const columns = t.shape.at(-1);
  if (t.shape.length < 2 || columns === undefined)
    throw new ShapeError(`${op}: ${name} must have at least two axes, got [${t.shape}]`);
  return [t.shape.slice(0, -1).reduce((a, b) => a * b, 1), columns];
}

/** Throws ShapeError unless t has this shape. `rule` names it in letters, such as "W must be [N,K]". */
export function expectShape(op: string, rule: string, t: Tensor, shape: Shape): void {
  if (t.shape.length !== shape.length || t.shape.some((n, i) => n !== shape[i]))
    throw new ShapeError(`${op}: ${rule} = [${shape}], got [${t.shape}]`);
}

/** Throws ShapeError unless t has this dtype. */
export function expectDType(op: string, name: string, t: Tensor, dtype: DType): void {
  if (t.dtype !== dtype) throw new ShapeError(`${op}: ${name} must be ${dtype}, got ${t.dtype}`);
}

// What the benchmark uses of its peers, declared here so that types can be checked where they are not installed.

declare module "@jax-js/jax" {
  interface Array {
    readonly ref: Array;
    dispose(): void;
    /** Has all that this array depends on submitted. Consumes the reference. */
    gpuBufferSync(): GPUBuffer;
    data(): Promise<Float32Array>;
    blockUntilReady(): Promise<Array>;
    add(other: Array | number): Array;
    sub(other: Array | number): Array;
    mul(other: Array | number): Array;
    div(other: Array | number): Array;
    neg(): Array;
    sum(): Array;
    mean(axis: number, options: { keepdims: boolean }): Array;
    reshape(shape: number[]): Array;
    transpose(): Array;
  }
  type Pure = (...args: Array[]) => Array[];
  export const numpy: {
    array(values: Float32Array | Int32Array, options: { shape: number[] }): Array;
    concatenate(xs: Array[], axis: number): Array;
    matmul(x: Array, w: Array): Array;
    split(x: Array, sections: number, axis: number): Array[];
    sqrt(x: Array): Array;
    square(x: Array): Array;
    sum(x: Array, axis: number): Array;
    take(x: Array, indices: Array, axis: number): Array;
  };
  export const nn: {
    dotProductAttention(q: Array, k: Array, v: Array, options: { isCausal: boolean }): Array;
    logSoftmax(x: Array): Array;
    oneHot(x: Array, classes: number): Array;
    silu(x: Array): Array;
  };
  export function init(device: "webgpu"): Promise<string[]>;
  export function defaultDevice(device: "webgpu"): void;
  export function getWebGPUDevice(): GPUDevice;
  export function jit(f: Pure): Pure & { dispose(): void };
  export function valueAndGrad(f: (xs: Array[]) => Array): (xs: Array[]) => [value: Array, gradients: Array[]];
  export function vjp(
    f: (...args: Array[]) => Array,
    primals: Array[],
  ): [Array, ((cotangent: Array) => Array[]) & { dispose(): void }];
}

declare module "@tensorflow/tfjs-core" {
  export interface Tensor {
    data(): Promise<Float32Array>;
    dispose(): void;
  }
  export function setBackend(name: string): Promise<boolean>;
  export function backend(): unknown;
  export function registerGradient(config: object): void;
  export function tensor2d(values: Float32Array, shape: [number, number]): Tensor;
  export function tensor1d(values: Int32Array | Float32Array, dtype?: "int32"): Tensor;
  export function tensor3d(values: Float32Array, shape: [number, number, number]): Tensor;
  export function zeros(shape: number[]): Tensor;
  export function oneHot(indices: Tensor, depth: number): Tensor;
  export function gather(x: Tensor, indices: Tensor): Tensor;
  export function tidy<T>(f: () => T): T;
  export function matMul(a: Tensor, b: Tensor, transposeA?: boolean, transposeB?: boolean): Tensor;
  export function add(a: Tensor, b: Tensor | number): Tensor;
  export function div(a: Tensor, b: Tensor | number): Tensor;
  export function mul(a: Tensor, b: Tensor | number): Tensor;
  export function sub(a: Tensor, b: Tensor): Tensor;
  export function concat(xs: Tensor[], axis: number): Tensor;
  export function split(x: Tensor, sections: number, axis: number): Tensor[];
  export function slice(x: Tensor, begin: number[], size: number[]): Tensor;
  export function reshape(x: Tensor, shape: number[]): Tensor;
  export function transpose(x: Tensor, order: number[]): Tensor;
  export function mean(x: Tensor, axis: number, keepDims: boolean): Tensor;
  export function rsqrt(x: Tensor): Tensor;
  export function sigmoid(x: Tensor): Tensor;
  export function softmax(x: Tensor): Tensor;
  export function sqrt(x: Tensor): Tensor;
  export function square(x: Tensor): Tensor;
  export function sum(x: Tensor, axis?: number): Tensor;
  export const losses: { softmaxCrossEntropy(onehotLabels: Tensor, logits: Tensor): Tensor };
  export function valueAndGrads(
    f: (...args: Tensor[]) => Tensor,
  ): (args: Tensor[], dy?: Tensor) => { value: Tensor; grads: Tensor[] };
}

declare module "@tensorflow/tfjs-core/dist/gradients/*" {
  // One object: the gradient of one op.
}

declare module "@tensorflow/tfjs-backend-webgpu" {}

declare module "onnxruntime-web/webgpu" {
  export class Tensor {
    static fromGpuBuffer(buffer: GPUBuffer, options: { dataType: "float32"; dims: readonly number[] }): Tensor;
    constructor(type: "float32", data: Float32Array, dims: readonly number[]);
  }
  export interface InferenceSession {
    run(feeds: Record<string, Tensor>, fetches: Record<string, Tensor>): Promise<Record<string, Tensor>>;
    release(): Promise<void>;
  }
  export const InferenceSession: {
    create(model: Uint8Array, options: Record<string, unknown>): Promise<InferenceSession>;
  };
  export const env: {
    logLevel: string;
    readonly wasm: { numThreads: number; wasmBinary: Uint8Array };
    readonly webgpu: { device: Promise<GPUDevice> | GPUDevice };
  };
}

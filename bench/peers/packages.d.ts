// What the benchmark uses of its peers, declared here so that types can be checked where they are not installed.

declare module "@jax-js/jax" {
  interface Array {
    readonly ref: Array;
    dispose(): void;
    /** Has all that this array depends on submitted. Consumes the reference. */
    gpuBufferSync(): GPUBuffer;
    data(): Promise<Float32Array>;
    blockUntilReady(): Promise<Array>;
    add(other: Array): Array;
    mul(other: number): Array;
    transpose(): Array;
  }
  type Pure = (...args: Array[]) => Array[];
  export const numpy: {
    array(values: Float32Array, options: { shape: number[] }): Array;
    matmul(x: Array, w: Array): Array;
    sum(x: Array, axis: number): Array;
  };
  export function init(device: "webgpu"): Promise<string[]>;
  export function defaultDevice(device: "webgpu"): void;
  export function getWebGPUDevice(): GPUDevice;
  export function jit(f: Pure): Pure & { dispose(): void };
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
  export function tidy<T>(f: () => T): T;
  export function matMul(a: Tensor, b: Tensor, transposeA?: boolean, transposeB?: boolean): Tensor;
  export function add(a: Tensor, b: Tensor): Tensor;
  export function mul(a: Tensor, b: Tensor | number): Tensor;
  export function sum(x: Tensor, axis: number): Tensor;
  export function valueAndGrads(
    f: (...args: Tensor[]) => Tensor,
  ): (args: Tensor[], dy: Tensor) => { value: Tensor; grads: Tensor[] };
}

declare module "@tensorflow/tfjs-core/dist/gradients/Add_grad.js" {
  export const addGradConfig: object;
}

declare module "@tensorflow/tfjs-core/dist/gradients/BatchMatMul_grad.js" {
  export const batchMatMulGradConfig: object;
}

declare module "@tensorflow/tfjs-core/dist/gradients/Multiply_grad.js" {
  export const multiplyGradConfig: object;
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

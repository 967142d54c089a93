/** A Gpu without a device: it keeps what kernels would have sent to one, as they would have sent it. Portable. */
import { type Dispatch, Gpu, type HasBuffer, type Pipeline } from "../../src/gpu/gpu.ts";
import { readWgsl } from "../../src/gpu/kernel.ts";

/** A compiled kernel, had it been compiled. */
export interface Sent {
  /** What `Gpu` knows the pipeline by: the kernel, its parts, its tuned values. */
  readonly key: string;
  readonly source: string;
  readonly constants: Readonly<Record<string, number>>;
}

/** One dispatch. */
export interface Recorded {
  readonly sent: Sent;
  readonly uniforms: Readonly<Record<string, number>>;
  /** The storage buffers by name. */
  readonly buffers: Readonly<Record<string, GPUBuffer>>;
  readonly groups: readonly [x: number, y: number, z: number];
}

export interface RecorderSettings {
  readonly isSoftware?: boolean;
  readonly features?: readonly GPUFeatureName[];
}

/** WebGPU §3.6.2: what every device has. */
const LEAST_LIMITS = {
  minUniformBufferOffsetAlignment: 256,
  maxComputeWorkgroupStorageSize: 16_384,
  maxComputeInvocationsPerWorkgroup: 256,
};

export class Recorder extends Gpu {
  readonly dispatches: Recorded[] = [];
  readonly #sent = new Map<string, Sent & { readonly pipeline: Pipeline }>();

  constructor({ isSoftware = false, features = [] }: RecorderSettings = {}) {
    const device = {
      features: new Set(features),
      limits: LEAST_LIMITS,
      createBuffer: () => ({}),
      lost: new Promise(() => {}),
      addEventListener: () => {},
    };
    super(device as unknown as GPUDevice, {} as GPUAdapterInfo, { isSoftware, runtime: "node", tune: "off" });
  }

  override allocate(size: number): GPUBuffer {
    return { size } as GPUBuffer;
  }

  override release(): void {}

  override write(_to: HasBuffer, _data: ArrayBufferView): void {}

  override pipeline(...[name, key, source, constants, bindings, uniformBytes]: Parameters<Gpu["pipeline"]>): Pipeline {
    const known = this.#sent.get(key);
    if (known) return known.pipeline;
    const id = this.#sent.size;
    const pipeline = { name, id, bindings, uniformBytes } as unknown as Pipeline;
    this.#sent.set(key, { key, source: source(), constants, pipeline });
    return pipeline;
  }

  override dispatch({ pipeline, fill, buffers, groups }: Dispatch): void {
    const sent = [...this.#sent.values()].find((one) => one.pipeline === pipeline);
    if (!sent) throw new Error(`recorder: ${pipeline.name} is a pipeline of this recorder`);
    const slot = new DataView(new ArrayBuffer(pipeline.uniformBytes));
    if (pipeline.uniformBytes > 0) fill(slot);
    const { fields, storage } = readWgsl(sent.source);
    const uniforms = fields.map(({ id, type }, i) => [
      id,
      type === "f32" ? slot.getFloat32(4 * i, true) : slot.getUint32(4 * i, true),
    ]);
    this.record({
      sent,
      uniforms: Object.fromEntries(uniforms),
      buffers: Object.fromEntries(storage.map((id, i) => [id, buffers[i]?.buffer as GPUBuffer])),
      groups,
    });
  }

  protected record(dispatch: Recorded): void {
    this.dispatches.push(dispatch);
  }
}

/** The one owner of a WebGPU device: pipelines, bind groups, buffers, submits, counters. */
import { GpuError } from "./errors.ts";
import { type Placing, Plan, Trace } from "./plan.ts";
import { requestAdapter } from "./provider.ts";
import { MOST_STAGED, stagedPieces } from "./staging.ts";
import { defaultTuneStore, Tuner, type TuneStore } from "./tuner.ts";

/** Anything with a GPU buffer. Kernels need no more of a tensor than this. */
export interface HasBuffer {
  readonly buffer: GPUBuffer;
  /** Where it starts in the buffer, a multiple of 256; 0 unless given. */
  readonly offsetBytes?: number;
}

export interface OpenGpuOptions {
  /** A `GPU` to use instead of the runtime's own. */
  readonly gpu?: GPU;
  /** Refuse allocations that would take live bytes past this. Drivers over-commit silently; this does not. */
  readonly budgetBytes?: number;
  /**
   * "auto", the default: plans that `gpu.tuner.tune` found on this adapter before are used. "off", also by LOWRANK_TUNE=off: the
   * documented default plans, always.
   */
  readonly tune?: "auto" | "off";
  /** Where tuned plans are kept, in place of the cache directory or `localStorage`. */
  readonly tuneStore?: TuneStore;
  /**
   * Multiply matrices on the device's matrix units where it has them and the sizes suit: operands are rounded to f16, so that an
   * element of x·w is off by up to 2⁻¹⁰·Σ|x·w|; values beyond 65504 become infinite, those below 3·10⁻⁸ zero. Sums are f32.
   * In Node this turns on Dawn's unsafe APIs, in Chrome it needs `--enable-unsafe-webgpu`. Without such units nothing changes.
   */
  readonly matrixUnits?: boolean;
  /** Fill every buffer with NaN bits when it is handed out, so that reading what was never written shows. For tests. */
  readonly poison?: boolean;
}

/** What has been done so far; all counts since `openGpu` or `resetCounters`, but for the live ones. */
export interface Counters {
  /** Bytes handed out and not given back. */
  readonly bytesLive: number;
  /** The most `bytesLive` has been. */
  readonly bytesPeak: number;
  /** Bytes held from the driver: live and pooled. */
  readonly bytesReserved: number;
  readonly buffersLive: number;
  readonly buffersCreated: number;
  readonly bindGroupsCreated: number;
  readonly submits: number;
  readonly readbacks: number;
  /** Number of dispatches by kernel name. */
  readonly dispatches: ReadonlyMap<string, number>;
}

// WebGPU §5.1: the values of GPUBufferUsage, which Node has no global for.
const BufferUsage = { MAP_READ: 1, COPY_SRC: 4, COPY_DST: 8, UNIFORM: 64, STORAGE: 128 } as const;
const QUERY_RESOLVE = 0x200;
const MAP_MODE_READ = 1;
const SHADER_STAGE_COMPUTE = 4;

const UNIFORM_SLOTS = 1024; // a full arena flushes by itself
const MOST_BIND_GROUPS = 16384; // of dispatches made anew: work that never repeats would keep adding to them
const STORAGE = BufferUsage.STORAGE | BufferUsage.COPY_SRC | BufferUsage.COPY_DST;

export interface BindingLayout {
  readonly id: string;
  readonly slot: number;
  readonly type: GPUBufferBindingType;
}

/** A compiled kernel with its bind-group layout. Made by `Gpu.pipeline`, used by `Gpu.dispatch`. */
export interface Pipeline {
  readonly name: string;
  readonly id: number;
  readonly pipeline: GPUComputePipeline;
  readonly layout: GPUBindGroupLayout;
  readonly bindings: readonly BindingLayout[];
  readonly uniformBytes: number;
}

/** One call of a kernel, as it goes into a pass. */
export interface Dispatch {
  readonly pipeline: Pipeline;
  /** By the names of the WGSL's uniform struct; see `Uniform`. */
  readonly uniforms: Readonly<Record<string, number | (() => number)>>;
  /** Writes the uniforms, as they are now, into their slot. */
  readonly fill: (slot: DataView) => void;
  /** The storage bindings in the order of the pipeline's own. */
  readonly buffers: readonly HasBuffer[];
  /** Workgroups. */
  readonly groups: readonly [x: number, y: number, z: number];
}

/**
 * Opens the GPU with the adapter's own limits and whatever optional features it has.
 *
 * Chrome and Deno: `navigator.gpu`. Node: the optional peer `webgpu` (Dawn); without a GPU, the software adapter
 * (`LOWRANK_ADAPTER=software` forces it). Throws GpuError saying what is missing and how to get it.
 */
export async function openGpu(options: OpenGpuOptions = {}): Promise<Gpu> {
  const { adapter, isSoftware, runtime } = await requestAdapter(options.gpu, options.matrixUnits);
  const wanted: string[] = ["shader-f16", "subgroups", "timestamp-query"];
  if (options.matrixUnits) wanted.push("chromium-experimental-subgroup-matrix");
  const requiredLimits: Record<string, number> = {};
  for (const limit of ADAPTER_LIMITS) {
    const value = adapter.limits[limit];
    if (typeof value === "number") requiredLimits[limit] = value;
  }
  let device: GPUDevice;
  try {
    device = await adapter.requestDevice({
      requiredFeatures: wanted.filter((feature) => adapter.features.has(feature)) as GPUFeatureName[],
      requiredLimits,
    });
  } catch (error) {
    throw new GpuError(`openGpu: the adapter gave no device: ${String(error)}`);
  }
  return new Gpu(device, adapter.info, { isSoftware, runtime, ...options });
}

const ADAPTER_LIMITS = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxStorageBuffersPerShaderStage",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
  "maxComputeWorkgroupSizeX",
  "maxComputeWorkgroupSizeY",
] as const satisfies readonly (keyof GPUSupportedLimits)[];

interface Scope {
  readonly owned: Set<GPUBuffer>;
}

/** A device: its buffers, which are used again, its kernels and what waits to be submitted. See `openGpu`. */
export class Gpu {
  readonly device: GPUDevice;
  readonly info: GPUAdapterInfo;
  readonly isSoftware: boolean;
  readonly runtime: "browser" | "deno" | "node";
  readonly tuner: Tuner;
  readonly #budgetBytes: number;
  readonly #poison: boolean;

  readonly #pipelines = new Map<string, Pipeline>();
  readonly #bindGroups = new Map<string, GPUBindGroup>();
  readonly #bufferIds = new WeakMap<GPUBuffer, number>();
  readonly #free = new Map<number, GPUBuffer[]>();
  /** Handed out and not given back. */
  readonly #live = new WeakSet<GPUBuffer>();
  readonly #scopes: Scope[] = [];
  readonly #checks = new Set<Promise<void>>();
  #staging: GPUBuffer[] = [];
  #ids = 0;
  #failure: string | undefined;
  /** What no error scope caught: mostly a consequence of what one did catch, which arrives later. */
  #uncaught: string | undefined;

  readonly #arena: GPUBuffer;
  readonly #arenaBytes: ArrayBuffer;
  readonly #slotBytes: number;
  #slotsUsed = 0;
  #trace: Trace | undefined;
  readonly #inFlight: Promise<unknown>[] = [];
  #encoder: GPUCommandEncoder | undefined;
  #pass: GPUComputePassEncoder | undefined;
  #stopwatch: Stopwatch | undefined;
  #passTimes: GPUComputePassTimestampWrites | undefined;

  #bytesLive = 0;
  #bytesPeak = 0;
  #bytesReserved = 0;
  #buffersLive = 0;
  #buffersCreated = 0;
  #bindGroupsCreated = 0;
  #submits = 0;
  #readbacks = 0;
  readonly #dispatches = new Map<string, number>();

  /** Use `openGpu`. */
  constructor(
    device: GPUDevice,
    info: GPUAdapterInfo,
    settings: OpenGpuOptions & { readonly isSoftware: boolean; readonly runtime: "browser" | "deno" | "node" },
  ) {
    this.device = device;
    this.info = info;
    this.isSoftware = settings.isSoftware;
    this.runtime = settings.runtime;
    this.#budgetBytes = settings.budgetBytes ?? Number.POSITIVE_INFINITY;
    this.#poison = settings.poison ?? false;
    const tune = settings.tune ?? (globalThis as { process?: NodeJS.Process }).process?.env.LOWRANK_TUNE ?? "auto";
    if (tune !== "auto" && tune !== "off")
      throw new GpuError(`openGpu: tune (or LOWRANK_TUNE) must be auto or off, got "${tune}"`);
    this.tuner = new Tuner(this, tune === "off" ? undefined : (settings.tuneStore ?? defaultTuneStore()));
    this.#slotBytes = device.limits.minUniformBufferOffsetAlignment;
    this.#arenaBytes = new ArrayBuffer(UNIFORM_SLOTS * this.#slotBytes);
    this.#arena = device.createBuffer({
      label: "uniform arena",
      size: this.#arenaBytes.byteLength,
      usage: BufferUsage.UNIFORM | BufferUsage.COPY_DST,
    });
    device.lost.then((lost) => {
      if (lost.reason !== "destroyed") this.#fail(`the device was lost (${lost.message}). Open a new one with openGpu`);
    });
    device.addEventListener("uncapturederror", (event) => {
      event.preventDefault();
      this.#uncaught ??= event.error.message;
    });
  }

  get features(): ReadonlySet<string> {
    return this.device.features as ReadonlySet<string>;
  }

  get limits(): GPUSupportedLimits {
    return this.device.limits;
  }

  /** A copy of the counters as they are now. */
  counters(): Counters {
    return {
      bytesLive: this.#bytesLive,
      bytesPeak: this.#bytesPeak,
      bytesReserved: this.#bytesReserved,
      buffersLive: this.#buffersLive,
      buffersCreated: this.#buffersCreated,
      bindGroupsCreated: this.#bindGroupsCreated,
      submits: this.#submits,
      readbacks: this.#readbacks,
      dispatches: new Map(this.#dispatches),
    };
  }

  /** Starts counting anew: dispatches, submits, readbacks and creations from 0, the peak from what is live now. */
  resetCounters(): void {
    this.#bytesPeak = this.#bytesLive;
    this.#buffersCreated = this.#bindGroupsCreated = this.#submits = this.#readbacks = 0;
    this.#dispatches.clear();
  }

  // ---- buffers

  /**
   * A storage buffer of at least `sizeBytes`, from the pool where one of its size class is free. Its content is undefined.
   *
   * Throws GpuError when it exceeds the device's limits or the byte budget.
   */
  allocate(sizeBytes: number, label: string): GPUBuffer {
    this.#throwIfFailed();
    if (this.#trace) return this.#trace.allocate(sizeBytes, label);
    const { maxBufferSize, maxStorageBufferBindingSize } = this.device.limits;
    const limit = Math.min(maxBufferSize, maxStorageBufferBindingSize);
    if (sizeBytes > limit)
      throw new GpuError(
        `${label}: a buffer may have at most ${limit} bytes on this device, got ${sizeBytes}. Use a smaller batch, a shorter length or a smaller model`,
      );
    const size = Math.min(sizeClass(sizeBytes), limit - (limit % 4));
    if (this.#bytesLive + size > this.#budgetBytes)
      throw new GpuError(
        `${label}: ${size} bytes more would pass the budget of ${this.#budgetBytes} bytes, ${this.#bytesLive} are in use. Use a smaller batch, a shorter length or a larger budgetBytes`,
      );
    const buffer = this.#free.get(size)?.pop() ?? this.#create(size, label);
    this.#bytesLive += size;
    this.#bytesPeak = Math.max(this.#bytesPeak, this.#bytesLive);
    this.#buffersLive++;
    this.#live.add(buffer);
    this.#scopes.at(-1)?.owned.add(buffer);
    if (this.#poison) this.write({ buffer }, new Uint8Array(size).fill(0xff));
    return buffer;
  }

  /** Gives the device the memory of buffers that were used and wait to be used again: after what takes much once, such as loading a model. */
  trim(): void {
    if (this.#trace) return;
    this.flush();
    for (const buffer of [...this.#free.values()].flat()) {
      buffer.destroy();
      this.#bytesReserved -= buffer.size;
    }
    this.#free.clear();
    this.#bindGroups.clear(); // they hold buffers
  }

  /**
   * Gives buffers back to the pool, each once. They may be handed out again at once: the queue keeps the order. Views go with what they
   * are views of: throws GpuError for one that comes without, and for what was given back before.
   */
  release(...buffers: readonly HasBuffer[]): void {
    const whole = new Set(buffers.flatMap(({ buffer, offsetBytes }) => (offsetBytes ? [] : [buffer])));
    if (buffers.some(({ buffer }) => !whole.has(buffer)))
      throw new GpuError("release: a view goes with what it is a view of, got one alone. Release that");
    for (const buffer of whole) {
      for (const scope of this.#scopes) scope.owned.delete(buffer);
      this.#recycle(buffer);
    }
  }

  /**
   * Runs `step` and gives back every buffer it allocated, except those in what it returns (a tensor, or an array, map or
   * plain object of them), which pass to the enclosing scope. `step` must not be async.
   */
  scope<T>(step: () => T): T {
    const scope: Scope = { owned: new Set() };
    this.#scopes.push(scope);
    const kept = new Set<GPUBuffer>();
    try {
      const result = step();
      if (result instanceof Promise)
        throw new GpuError("scope: the step must be synchronous, got a promise. Read results after the scope");
      collectBuffers(result, kept);
      return result;
    } finally {
      this.#scopes.pop();
      const outer = this.#scopes.at(-1);
      for (const buffer of scope.owned) {
        if (kept.has(buffer)) outer?.owned.add(buffer);
        else this.#recycle(buffer);
      }
    }
  }

  /** Copies host bytes into a buffer. What was dispatched before still sees the old content. */
  write(to: HasBuffer, data: ArrayBufferView<ArrayBufferLike>, offsetBytes = 0): void {
    if (this.#trace) {
      this.#trace.write(to, data, offsetBytes);
      return;
    }
    this.flush();
    const { byteOffset, byteLength } = data;
    const padded = byteLength % 4 === 0 ? undefined : new Uint8Array(Math.ceil(byteLength / 4) * 4);
    padded?.set(new Uint8Array(data.buffer, byteOffset, byteLength));
    const source = padded ?? new Uint8Array(data.buffer, byteOffset, byteLength);
    this.device.queue.writeBuffer(to.buffer, (to.offsetBytes ?? 0) + offsetBytes, source as Uint8Array<ArrayBuffer>);
  }

  /**
   * Waits for everything dispatched so far and copies the first `sizeBytes` of each buffer to the host, in one readback.
   *
   * Throws GpuError if anything since the last read failed on the device.
   */
  async read(sources: readonly (HasBuffer & { readonly sizeBytes: number })[]): Promise<ArrayBuffer[]> {
    this.#throwIfFailed();
    if (this.#trace) throw new GpuError("read: a traced step reads nothing back. Read after it has run");
    const sizes = sources.map(({ sizeBytes }) => sizeBytes);
    const most = Math.min(MOST_STAGED, Math.floor(this.limits.maxBufferSize / 4) * 4);
    const readbacks = stagedPieces(sizes, most).map(({ pieces, sizeBytes }) => ({
      ...{ pieces, sizeBytes, staging: this.#stagingOf(sizeBytes) },
    }));
    this.#endPass();
    this.#encoder ??= this.device.createCommandEncoder();
    for (const { pieces, staging } of readbacks)
      for (const { source, at, from, sizeBytes } of pieces) {
        const { buffer, offsetBytes = 0 } = sources[source] as HasBuffer;
        this.#encoder.copyBufferToBuffer(buffer, offsetBytes + at, staging, from, Math.ceil(sizeBytes / 4) * 4);
      }
    this.flush();
    this.#readbacks++;
    const copies = sizes.map((sizeBytes) => new Uint8Array(sizeBytes));
    for (const { pieces, sizeBytes: total, staging } of readbacks) {
      try {
        await staging.mapAsync(MAP_MODE_READ, 0, total);
      } catch (error) {
        await Promise.all(this.#checks);
        this.#throwIfFailed();
        throw new GpuError(`read: ${String(error)}`);
      }
      const mapped = staging.getMappedRange(0, total);
      for (const { source, at, from, sizeBytes } of pieces)
        copies[source]?.set(new Uint8Array(mapped, from, sizeBytes), at);
      staging.unmap();
      this.#staging.push(staging);
    }
    for (const old of this.#staging.splice(0, this.#staging.length - 4)) old.destroy();
    await Promise.all(this.#checks);
    this.#throwIfFailed();
    return copies.map(({ buffer }) => buffer);
  }

  /** One that is there, if it is not far too large. */
  #stagingOf(size: number): GPUBuffer {
    const index = this.#staging.findIndex((one) => one.size >= size && one.size <= 4 * size + 4096);
    const [known] = this.#staging.splice(index, index < 0 ? 0 : 1);
    const usage = BufferUsage.MAP_READ | BufferUsage.COPY_DST;
    return known ?? this.device.createBuffer({ label: "readback", size, usage });
  }

  // ---- kernels

  /** The pipeline for this WGSL with these override constants, compiled at its first use and kept. */
  pipeline(
    name: string,
    key: string,
    source: () => string,
    constants: Readonly<Record<string, number>>,
    bindings: readonly BindingLayout[],
    uniformBytes: number,
  ): Pipeline {
    const known = this.#pipelines.get(key);
    if (known) return known;
    this.#throwIfFailed();
    const { device } = this;
    this.#checked(name, "validation", () => {
      const layout = device.createBindGroupLayout({
        label: name,
        entries: bindings.map(({ slot, type }) => ({
          binding: slot,
          visibility: SHADER_STAGE_COMPUTE,
          buffer: { type },
        })),
      });
      const pipeline = device.createComputePipeline({
        label: name,
        layout: device.createPipelineLayout({ bindGroupLayouts: [layout] }),
        compute: {
          module: device.createShaderModule({ label: name, code: this.#forRuntime(source()) }),
          entryPoint: "main",
          constants: { ...constants },
        },
      });
      this.#pipelines.set(key, { name, id: this.#ids++, pipeline, layout, bindings, uniformBytes });
    });
    return this.pipeline(name, key, source, constants, bindings, uniformBytes);
  }

  /** Encodes one dispatch into the current pass. One buffer may not be bound both to read and to write (a WebGPU rule). */
  dispatch(dispatch: Dispatch): void {
    this.#throwIfFailed();
    if (this.#trace) {
      this.#trace.dispatches.push(dispatch);
      return;
    }
    const { pipeline, fill, buffers, groups } = dispatch;
    if (this.#slotsUsed === UNIFORM_SLOTS) this.flush();
    const offset = this.#slotsUsed * this.#slotBytes;
    const hasUniforms = pipeline.uniformBytes > 0;
    if (hasUniforms) {
      fill(new DataView(this.#arenaBytes, offset, pipeline.uniformBytes));
      this.#slotsUsed++;
    }
    const pass = this.#beginPass();
    pass.setPipeline(pipeline.pipeline);
    const uniforms = { buffer: this.#arena, offset };
    pass.setBindGroup(0, this.#bindGroup(pipeline, buffers, uniforms, this.#bindGroups));
    pass.dispatchWorkgroups(...groups);
    this.#count(pipeline.name, 1);
  }

  /**
   * What `step` would dispatch, as a plan to be run again and again: no dispatch is made, and no buffer while it is traced.
   *
   * What the step allocates gets its place when it is done tracing: where buffers are not needed at the same time they are the same memory,
   * in `workspace`, which grows as needed and may serve several plans that run one after the other. So nothing that the step made
   * outlives it: results go into buffers that existed before. What it reads from those may change between runs; uniforms given as functions
   * are asked anew in each. Throws GpuError where the step reads back or writes to a buffer that was there before.
   */
  trace(step: () => void, workspace: GPUBuffer[] = []): Plan {
    if (this.#trace) throw new GpuError("trace: steps are traced one at a time, got a trace within a trace");
    const trace = new Trace();
    this.#trace = trace;
    try {
      this.scope(step);
    } finally {
      this.#trace = undefined;
    }
    return new Plan(trace, workspace, {
      gpu: this,
      slotBytes: this.#slotBytes,
      bindGroup: (pipeline, buffers, uniforms, known) => this.#bindGroup(pipeline, buffers, uniforms, known),
      encode: (dispatches, encode) => {
        this.flush();
        this.#throwIfFailed();
        encode(this.#beginPass());
        for (const [name, n] of dispatches) this.#count(name, n);
        this.flush();
      },
    });
  }

  /** In a trace: what is computed in `source` is computed in `target`, which existed before, if that can be. Says what is left to do. */
  place(source: HasBuffer, target: HasBuffer): Placing {
    return this.#trace?.place(source, target) ?? "copy";
  }

  /** Waits until fewer than `most` of the submits are unfinished, so that a host ahead of its device does not queue without end. */
  async throttle(most: number): Promise<void> {
    this.#inFlight.push(this.device.queue.onSubmittedWorkDone());
    while (this.#inFlight.length >= most) await this.#inFlight.shift();
    this.#throwIfFailed();
  }

  /** Submits what has been dispatched: one uniform write, one pass, one submit. */
  flush(): void {
    if (!this.#encoder || this.#trace) return;
    this.#endPass();
    if (this.#slotsUsed > 0)
      this.device.queue.writeBuffer(this.#arena, 0, this.#arenaBytes, 0, this.#slotsUsed * this.#slotBytes);
    this.device.queue.submit([this.#encoder.finish()]);
    this.#encoder = undefined;
    this.#slotsUsed = 0;
    this.#submits++;
  }

  /**
   * Milliseconds that the device needs for what `step` dispatches, by the device's clock where it has one (timestamp-query), else by
   * the wall clock. Dispatches that fill more than one pass are timed by the wall clock. Not to be called while another is timed.
   */
  async time(step: () => void): Promise<number> {
    await this.finish();
    if (this.features.has("timestamp-query")) this.#stopwatch ??= makeStopwatch(this.device);
    const stopwatch = this.#stopwatch;
    const submits = this.#submits;
    if (stopwatch)
      this.#passTimes = { querySet: stopwatch.queries, beginningOfPassWriteIndex: 0, endOfPassWriteIndex: 1 };
    const start = performance.now();
    try {
      step();
    } finally {
      this.#passTimes = undefined;
    }
    if (!stopwatch || !this.#pass || this.#submits !== submits) {
      await this.finish();
      return performance.now() - start;
    }
    this.#endPass();
    this.#encoder?.resolveQuerySet(stopwatch.queries, 0, 2, stopwatch.result, 0);
    const [bytes = new ArrayBuffer(16)] = await this.read([{ buffer: stopwatch.result, sizeBytes: 16 }]);
    const [begin = 0n, end = 0n] = new BigUint64Array(bytes);
    return Math.max(0, Number(end - begin) / 1e6); // clocks of some devices jump
  }

  /** Waits until the device has done everything dispatched so far. Throws GpuError if any of it failed. */
  async finish(): Promise<void> {
    this.flush();
    await this.device.queue.onSubmittedWorkDone();
    await Promise.all(this.#checks);
    this.#throwIfFailed();
  }

  /** Frees the device and everything on it. */
  destroy(): void {
    this.#fail("the device was destroyed. Open a new one with openGpu");
    this.device.destroy();
  }

  // ---- inside

  #create(size: number, label: string): GPUBuffer {
    if (this.#bytesReserved + size > this.#budgetBytes) this.trim();
    let buffer: GPUBuffer | undefined;
    this.#checked(label, "out-of-memory", () => {
      buffer = this.device.createBuffer({ label, size, usage: STORAGE });
    });
    if (!buffer) throw new GpuError(`${label}: the device gave no buffer of ${size} bytes`);
    this.#bufferIds.set(buffer, this.#ids++);
    this.#bytesReserved += size;
    this.#buffersCreated++;
    return buffer;
  }

  #recycle(buffer: GPUBuffer): void {
    if (Trace.isVirtual(buffer)) return; // liveness is found from what uses it
    if (!this.#live.delete(buffer))
      throw new GpuError(`release: a buffer is given back once, got "${buffer.label}" again`);
    const free = this.#free.get(buffer.size);
    if (free) free.push(buffer);
    else this.#free.set(buffer.size, [buffer]);
    this.#bytesLive -= buffer.size;
    this.#buffersLive--;
  }

  /** Runs f in an error scope. What it finds is thrown by the next call that reaches the device. */
  #checked(label: string, filter: GPUErrorFilter, f: () => void): void {
    this.device.pushErrorScope(filter);
    f();
    const check = this.device.popErrorScope().then(
      (error) => {
        if (error)
          this.#fail(
            filter === "out-of-memory"
              ? `${label}: out of memory: ${error.message}. Use a smaller batch, length or model`
              : `${label}: ${error.message}`,
          );
      },
      () => {}, // the device is gone: `lost` tells
    );
    this.#checks.add(check);
    check.finally(() => this.#checks.delete(check));
  }

  #bindGroup(
    pipeline: Pipeline,
    buffers: readonly HasBuffer[],
    uniforms: { readonly buffer: GPUBuffer; readonly offset: number },
    groups: Map<string, GPUBindGroup>,
  ): GPUBindGroup {
    let key = pipeline.uniformBytes > 0 ? `${pipeline.id}@${uniforms.offset}` : `${pipeline.id}`;
    for (const { buffer, offsetBytes } of buffers)
      key += offsetBytes ? `,${this.#bufferIds.get(buffer)}+${offsetBytes}` : `,${this.#bufferIds.get(buffer)}`;
    const known = groups.get(key);
    if (known) return known;
    const storage = pipeline.bindings.filter(({ type }) => type !== "uniform");
    let next = 0;
    const entries = pipeline.bindings.map(({ slot, type }) => {
      if (type === "uniform") return { binding: slot, resource: { ...uniforms, size: pipeline.uniformBytes } };
      const bound = buffers[next++];
      if (!bound)
        throw new GpuError(`${pipeline.name}: ${pipeline.bindings.length} bindings, got ${buffers.length} buffers`);
      return { binding: slot, resource: { buffer: bound.buffer, offset: bound.offsetBytes ?? 0 } };
    });
    for (const [i, output] of storage.entries())
      if (output.type === "storage")
        for (const [k, other] of storage.entries())
          if (i !== k && buffers[i]?.buffer === buffers[k]?.buffer)
            throw new GpuError(
              `${pipeline.name}: what is written may not share its buffer with another operand, got one buffer for "${output.id}" and "${other.id}"`,
            );
    const group = this.device.createBindGroup({ label: pipeline.name, layout: pipeline.layout, entries });
    if (groups.size >= MOST_BIND_GROUPS) groups.clear();
    groups.set(key, group);
    this.#bindGroupsCreated++;
    return group;
  }

  /** naga, in Deno, has the subgroup functions but refuses the line that WGSL wants for them. */
  #forRuntime(code: string): string {
    return this.runtime === "deno" ? code.replace(/^enable subgroups;$/m, "") : code;
  }

  #beginPass(): GPUComputePassEncoder {
    this.#encoder ??= this.device.createCommandEncoder();
    this.#pass ??= this.#encoder.beginComputePass(this.#passTimes && { timestampWrites: this.#passTimes });
    return this.#pass;
  }

  #count(name: string, n: number): void {
    this.#dispatches.set(name, (this.#dispatches.get(name) ?? 0) + n);
  }

  #endPass(): void {
    this.#pass?.end();
    this.#pass = undefined;
  }

  #fail(message: string): void {
    this.#failure ??= message;
  }

  #throwIfFailed(): void {
    const message = this.#failure ?? this.#uncaught;
    if (message !== undefined) throw new GpuError(message);
  }
}

interface Stopwatch {
  readonly queries: GPUQuerySet;
  readonly result: GPUBuffer;
}

function makeStopwatch(device: GPUDevice): Stopwatch {
  return {
    queries: device.createQuerySet({ label: "stopwatch", type: "timestamp", count: 2 }),
    result: device.createBuffer({ label: "stopwatch", size: 16, usage: QUERY_RESOLVE | BufferUsage.COPY_SRC }),
  };
}

/** Rounded up to eighths of the power of two below: few classes, at most an eighth wasted (or 256 bytes). */
function sizeClass(sizeBytes: number): number {
  const step = Math.max(256, 2 ** (Math.floor(Math.log2(Math.max(1, sizeBytes))) - 3));
  return Math.max(step, Math.ceil(sizeBytes / step) * step);
}

function collectBuffers(value: unknown, found: Set<GPUBuffer>): void {
  if (typeof value !== "object" || value === null || ArrayBuffer.isView(value)) return;
  if ("buffer" in value) {
    found.add((value as HasBuffer).buffer);
    return;
  }
  const parts =
    value instanceof Map || Array.isArray(value) || value instanceof Set ? value.values() : Object.values(value);
  for (const part of parts) collectBuffers(part, found);
}

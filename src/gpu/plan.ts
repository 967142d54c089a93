/** A step traced once and run again and again: the same dispatches, the same buffers, no GPU object made. */
import { GpuError } from "./errors.ts";
import type { Dispatch, Gpu, HasBuffer, Pipeline } from "./gpu.ts";

/** WebGPU §5.1. */
const UNIFORM_COPY_DST = 64 | 8;
const QUERY_RESOLVE = 0x200;
const COPY_SRC = 4;

/** Dispatches timed at a time: a query set has at most 4096 queries. */
const MOST_TIMED = 2048;

const virtual = new WeakSet<GPUBuffer>();

/** What a step did while it was traced. Its buffers are placeholders until a `Plan` gives them their places. */
export class Trace {
  readonly dispatches: Dispatch[] = [];
  /** Host values that the step wrote: the same in each run. */
  readonly constants: Map<GPUBuffer, Uint8Array> = new Map();
  /** Placeholder → the buffer that existed before and takes its place, from `offsetBytes` on. */
  readonly placed: Map<GPUBuffer, Required<HasBuffer>> = new Map();

  static isVirtual(buffer: GPUBuffer): boolean {
    return virtual.has(buffer);
  }

  allocate(sizeBytes: number, label: string): GPUBuffer {
    const buffer = { size: Math.max(4, sizeBytes), label } as GPUBuffer;
    virtual.add(buffer);
    return buffer;
  }

  write({ buffer }: HasBuffer, data: ArrayBufferView, offsetBytes: number): void {
    if (!virtual.has(buffer) || offsetBytes > 0 || this.dispatches.some(({ buffers }) => uses(buffers, buffer)))
      throw new GpuError(
        "trace: a traced step may write values only to what it has just made. Write inputs before it runs",
      );
    this.constants.set(buffer, new Uint8Array(data.buffer, data.byteOffset, data.byteLength).slice());
  }

  place(source: HasBuffer, target: HasBuffer): Placing {
    if (!virtual.has(source.buffer) || virtual.has(target.buffer) || this.constants.has(source.buffer)) return "copy";
    const offsetBytes = (target.offsetBytes ?? 0) - (source.offsetBytes ?? 0);
    const known = this.placed.get(source.buffer);
    if (known) {
      if (known.buffer !== target.buffer) return "copy";
      return known.offsetBytes === offsetBytes ? "placed" : "detour";
    }
    // Not where a dispatch uses both, or what is placed there already: it would read and write one buffer.
    const isThere = ({ buffer }: HasBuffer): boolean =>
      buffer === target.buffer || this.placed.get(buffer)?.buffer === target.buffer;
    const meet = this.dispatches.some(({ buffers }) => uses(buffers, source.buffer) && buffers.some(isThere));
    const fits = offsetBytes >= 0 && offsetBytes + source.buffer.size <= target.buffer.size;
    if (meet || !fits) return "copy";
    this.placed.set(source.buffer, { buffer: target.buffer, offsetBytes });
    return "placed";
  }
}

/** What is left to do for `Gpu.place`: nothing, a copy, or one by way of a third buffer, as the source lies in the target's. */
export type Placing = "placed" | "copy" | "detour";

const uses = (buffers: readonly HasBuffer[], buffer: GPUBuffer): boolean =>
  buffers.some((bound) => bound.buffer === buffer);

/** What a `Plan` needs of its `Gpu`. */
export interface PlanHost {
  readonly gpu: Gpu;
  readonly slotBytes: number;
  bindGroup(
    pipeline: Pipeline,
    buffers: readonly HasBuffer[],
    uniforms: { readonly buffer: GPUBuffer; readonly offset: number },
    known: Map<string, GPUBindGroup>,
  ): GPUBindGroup;
  /** One pass in one submit, which counts these dispatches by name. */
  encode(dispatches: ReadonlyMap<string, number>, encode: (pass: GPUComputePassEncoder) => void): void;
}

interface Encoded {
  readonly pipeline: GPUComputePipeline;
  readonly group: GPUBindGroup;
  readonly groups: readonly [number, number, number];
}

/** Made by `gpu.trace`. */
export class Plan {
  /** What it dispatches, in order; the buffers are placeholders where the step made them. */
  readonly dispatches: readonly Dispatch[];
  /** Bytes of the workspace it needs. */
  readonly workspaceBytes: number;
  readonly #host: PlanHost;
  readonly #encoded: readonly Encoded[];
  readonly #varying: readonly { readonly fill: Dispatch["fill"]; readonly slot: DataView }[];
  readonly #arena: GPUBuffer;
  readonly #arenaBytes: ArrayBuffer;
  readonly #counts = new Map<string, number>();
  readonly #constants: readonly HasBuffer[];

  /** Use `gpu.trace`. */
  constructor(trace: Trace, workspace: GPUBuffer[], host: PlanHost) {
    const { gpu, slotBytes } = host;
    this.#host = host;
    this.dispatches = trace.dispatches;
    const constants = new Map(
      [...trace.constants].map(([buffer, values]) => {
        const made = { buffer: gpu.allocate(buffer.size, buffer.label) };
        gpu.write(made, values);
        return [buffer, made] as const;
      }),
    );
    this.#constants = [...constants.values()];
    const shared = placeByLiveness(
      lifetimes(trace.dispatches).filter(({ buffer }) => !trace.placed.has(buffer) && !constants.has(buffer)),
    );
    const places = takeFrom(workspace, shared, (size) => gpu.allocate(size, "workspace"));
    this.workspaceBytes = shared.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0);
    const resolve = ({ buffer, offsetBytes = 0 }: HasBuffer): HasBuffer => {
      const placed = trace.placed.get(buffer);
      if (placed) return { buffer: placed.buffer, offsetBytes: placed.offsetBytes + offsetBytes };
      return { buffer: constants.get(buffer)?.buffer ?? places.get(buffer) ?? buffer, offsetBytes };
    };

    // Slots of uniforms: first those that are asked anew in each run, then one for each different content.
    const varies = ({ uniforms }: Dispatch): boolean => Object.values(uniforms).some((u) => typeof u === "function");
    const slotOf = new Map<Dispatch | string, number>();
    for (const dispatch of trace.dispatches) if (varies(dispatch)) slotOf.set(dispatch, slotOf.size);
    const varying = slotOf.size;
    const contents: Uint8Array[] = [];
    const slots = trace.dispatches.map((dispatch) => {
      const { pipeline, fill } = dispatch;
      const own = slotOf.get(dispatch);
      if (own !== undefined || pipeline.uniformBytes === 0) return own ?? 0;
      const content = new DataView(new ArrayBuffer(pipeline.uniformBytes));
      fill(content);
      const bytes = new Uint8Array(content.buffer);
      const key = bytes.join();
      const slot = slotOf.get(key) ?? varying + contents.length;
      if (slot === varying + contents.length) contents.push(bytes);
      slotOf.set(key, slot);
      return slot;
    });
    const arenaBytes = new Uint8Array(Math.max(1, varying + contents.length) * slotBytes);
    contents.forEach((bytes, i) => {
      arenaBytes.set(bytes, (varying + i) * slotBytes);
    });
    this.#arenaBytes = arenaBytes.buffer;
    this.#arena = gpu.device.createBuffer({ label: "plan uniforms", size: arenaBytes.length, usage: UNIFORM_COPY_DST });
    gpu.device.queue.writeBuffer(this.#arena, 0, arenaBytes);
    this.#varying = trace.dispatches.filter(varies).map(({ fill, pipeline }, i) => ({
      fill,
      slot: new DataView(this.#arenaBytes, i * slotBytes, pipeline.uniformBytes),
    }));

    const known = new Map<string, GPUBindGroup>();
    this.#encoded = trace.dispatches.map(({ pipeline, buffers, groups }, i) => {
      const uniforms = { buffer: this.#arena, offset: (slots[i] ?? 0) * slotBytes };
      const group = host.bindGroup(pipeline, buffers.map(resolve), uniforms, known);
      return { pipeline: pipeline.pipeline, group, groups };
    });
    for (const { pipeline } of trace.dispatches)
      this.#counts.set(pipeline.name, (this.#counts.get(pipeline.name) ?? 0) + 1);
  }

  /**
   * Runs the step once with each dispatch in a pass of its own, and gives the milliseconds of each by the device's clock: undefined where it
   * has none (timestamp-query). Slower than `run`, and the same results.
   */
  async profile(): Promise<Float64Array | undefined> {
    const { gpu } = this.#host;
    if (!gpu.features.has("timestamp-query")) {
      this.run();
      return undefined;
    }
    gpu.flush();
    this.#writeVarying();
    const timesMs = new Float64Array(this.#encoded.length);
    const most = Math.min(MOST_TIMED, this.#encoded.length);
    const queries = gpu.device.createQuerySet({ label: "profile", type: "timestamp", count: 2 * most });
    const resolved = gpu.device.createBuffer({ label: "profile", size: 16 * most, usage: QUERY_RESOLVE | COPY_SRC });
    for (let first = 0; first < this.#encoded.length; first += most) {
      const count = Math.min(most, this.#encoded.length - first);
      const encoder = gpu.device.createCommandEncoder();
      for (let i = 0; i < count; i++) {
        const timestampWrites = { querySet: queries, beginningOfPassWriteIndex: 2 * i, endOfPassWriteIndex: 2 * i + 1 };
        const pass = encoder.beginComputePass({ timestampWrites });
        this.#send(pass, first + i, true);
        pass.end();
      }
      encoder.resolveQuerySet(queries, 0, 2 * count, resolved, 0);
      gpu.device.queue.submit([encoder.finish()]);
      const [bytes = new ArrayBuffer(0)] = await gpu.read([{ buffer: resolved, sizeBytes: 16 * count }]);
      const times = new BigUint64Array(bytes);
      for (let i = 0; i < count; i++)
        timesMs[first + i] = Number((times[2 * i + 1] ?? 0n) - (times[2 * i] ?? 0n)) / 1e6;
    }
    queries.destroy();
    resolved.destroy();
    return timesMs;
  }

  /** Sends the whole step to the device: at most one write of uniforms, one pass, one submit. */
  run(): void {
    this.#host.encode(this.#counts, (pass) => {
      this.#writeVarying();
      for (let i = 0; i < this.#encoded.length; i++) this.#send(pass, i);
    });
  }

  #writeVarying(): void {
    const { gpu, slotBytes } = this.#host;
    for (const { fill, slot } of this.#varying) fill(slot);
    if (this.#varying.length > 0)
      gpu.device.queue.writeBuffer(this.#arena, 0, this.#arenaBytes, 0, this.#varying.length * slotBytes);
  }

  #send(pass: GPUComputePassEncoder, i: number, isAlone = false): void {
    const { pipeline, group, groups } = this.#encoded[i] as Encoded;
    if (isAlone || pipeline !== this.#encoded[i - 1]?.pipeline) pass.setPipeline(pipeline);
    if (isAlone || group !== this.#encoded[i - 1]?.group) pass.setBindGroup(0, group);
    // Each argument costs Node's bindings time.
    if (groups[2] > 1) pass.dispatchWorkgroups(groups[0], groups[1], groups[2]);
    else if (groups[1] > 1) pass.dispatchWorkgroups(groups[0], groups[1]);
    else pass.dispatchWorkgroups(groups[0]);
  }

  /** Gives back what is the plan's own; the workspace is whoever's gave it. */
  destroy(): void {
    this.#host.gpu.release(...this.#constants);
    this.#arena.destroy();
  }
}

interface Lifetime {
  readonly buffer: GPUBuffer;
  /** Index of the first dispatch that uses it. */
  readonly first: number;
  last: number;
}

/** When each placeholder is in use. */
function lifetimes(dispatches: readonly Dispatch[]): Lifetime[] {
  const found = new Map<GPUBuffer, Lifetime>();
  dispatches.forEach(({ buffers }, i) => {
    for (const { buffer } of buffers) {
      if (!virtual.has(buffer)) continue;
      const known = found.get(buffer);
      if (known) known.last = i;
      else found.set(buffer, { buffer, first: i, last: i });
    }
  });
  return [...found.values()];
}

interface Shared {
  sizeBytes: number;
  readonly tenants: Lifetime[];
}

/**
 * Which placeholders share memory: largest first, each into the first piece that is free all its life ("greedy by size",
 * arXiv:2001.03288 §4). Whole buffers are shared, not ranges of one: a dispatch may not read and write the same buffer.
 */
function placeByLiveness(lives: readonly Lifetime[]): Shared[] {
  const pieces: Shared[] = [];
  for (const life of lives.toSorted((a, b) => b.buffer.size - a.buffer.size || a.first - b.first)) {
    const free = pieces.find(({ tenants }) => tenants.every((t) => t.last < life.first || life.last < t.first));
    if (free) free.tenants.push(life);
    else pieces.push({ sizeBytes: life.buffer.size, tenants: [life] });
  }
  return pieces;
}

/** Finds a buffer of the workspace for each piece, the smallest that is large enough, and adds those that are missing. */
function takeFrom(
  workspace: GPUBuffer[],
  pieces: readonly Shared[],
  add: (sizeBytes: number) => GPUBuffer,
): Map<GPUBuffer, GPUBuffer> {
  const places = new Map<GPUBuffer, GPUBuffer>();
  const free = workspace.toSorted((a, b) => a.size - b.size);
  for (const { sizeBytes, tenants } of pieces.toSorted((a, b) => b.sizeBytes - a.sizeBytes)) {
    const at = free.findIndex((buffer) => buffer.size >= sizeBytes);
    const taken = free.splice(at, at < 0 ? 0 : 1)[0] ?? add(sizeBytes);
    if (at < 0) workspace.push(taken);
    for (const { buffer } of tenants) places.set(buffer, taken);
  }
  return places;
}

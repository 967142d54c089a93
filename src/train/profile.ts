/** What a step spends its time on, as a table and a trace for Chrome's viewer. */
import type { Dispatch, HasBuffer } from "../gpu/gpu.ts";
import { uniformValue } from "../gpu/kernel.ts";
import { Tensor } from "../tensor/tensor.ts";

/** One dispatch of a step. */
export interface ProfiledDispatch {
  /** Name of the kernel. */
  readonly kernel: string;
  /** By the device's clock; undefined where it has none. */
  readonly timeMs: number | undefined;
  /** Floating-point operations of products and attention, counted from their sizes; 0 for kernels that are bound by memory. */
  readonly flops: number;
  /** Each operand counted once, whole: less than what moves where caches are small, more where only parts are used. */
  readonly bytes: number;
}

/** Puts counts and times of a plan's dispatches together. */
export function profiled(dispatches: readonly Dispatch[], timesMs: Float64Array | undefined): ProfiledDispatch[] {
  return dispatches.map((dispatch, i) => ({
    kernel: dispatch.pipeline.name,
    timeMs: timesMs?.[i],
    flops: flopsOf(dispatch),
    bytes: [...new Map(dispatch.buffers.map((b) => [`${ids(b.buffer)}+${b.offsetBytes ?? 0}`, b])).values()]
      .map((b) => (b instanceof Tensor ? b.sizeBytes : b.buffer.size))
      .reduce((sum, size) => sum + size, 0),
  }));
}

const known = new WeakMap<GPUBuffer, number>();
let last = 0;
function ids(buffer: GPUBuffer): number {
  const id = known.get(buffer) ?? ++last;
  known.set(buffer, id);
  return id;
}

function flopsOf({ pipeline: { name }, uniforms, buffers, groups }: Dispatch): number {
  const value = (id: string): number => uniformValue(uniforms[id] ?? 0);
  if (/^matmul-(tiled|rows|registers|units)$/.test(name)) {
    const batch = groups[2] / Math.max(1, value("splits"));
    return 2 * value("M") * value("N") * (value("K") + value("R")) * batch;
  }
  const perPair = { attention: 4, "attention-backward-q": 6, "attention-backward-kv": 8 }[name];
  const [B = 0, T = 0, H = 0, D = 0] = perPair ? shapeOf(buffers[0]) : [];
  return (perPair ?? 0) * B * H * D * T * (value("L") - T + (T + 1) / 2);
}

const shapeOf = (buffer: HasBuffer | undefined): readonly number[] => (buffer instanceof Tensor ? buffer.shape : []);

/** All dispatches of one kernel. */
export interface KernelProfile {
  readonly kernel: string;
  readonly dispatches: number;
  readonly timeMs: number | undefined;
  readonly flops: number;
  readonly bytes: number;
}

/** Sums by kernel, the longest first; without times, those that move most bytes. */
export function byKernel(dispatches: readonly ProfiledDispatch[]): KernelProfile[] {
  const sums = new Map<string, KernelProfile>();
  for (const { kernel, timeMs, flops, bytes } of dispatches) {
    const sum = sums.get(kernel) ?? { kernel, dispatches: 0, timeMs: timeMs && 0, flops: 0, bytes: 0 };
    sums.set(kernel, {
      kernel,
      dispatches: sum.dispatches + 1,
      timeMs: timeMs === undefined ? undefined : (sum.timeMs ?? 0) + timeMs,
      flops: sum.flops + flops,
      bytes: sum.bytes + bytes,
    });
  }
  return [...sums.values()].sort((a, b) => (b.timeMs ?? b.bytes) - (a.timeMs ?? a.bytes));
}

/** The sums as lines of text. */
export function profileTable(kernels: readonly KernelProfile[]): string {
  const total = kernels.reduce((sum, { timeMs = 0 }) => sum + timeMs, 0);
  const rows = kernels.map(({ kernel, dispatches, timeMs, flops, bytes }) => [
    kernel,
    `${dispatches}`,
    timeMs === undefined ? "" : timeMs.toFixed(3),
    timeMs === undefined ? "" : `${((100 * timeMs) / total).toFixed(1)} %`,
    (flops / 1e9).toFixed(3),
    (bytes / 1e6).toFixed(2),
    timeMs ? (flops / timeMs / 1e6).toFixed(2) : "",
    timeMs ? (bytes / timeMs / 1e6).toFixed(2) : "",
  ]);
  const table = [["kernel", "dispatches", "ms", "share", "GFLOP", "MB", "GFLOP/s", "GB/s"], ...rows];
  const widths = (table[0] ?? []).map((_, c) => Math.max(...table.map((row) => row[c]?.length ?? 0)));
  return table
    .map((row) =>
      row.map((cell, c) => (c === 0 ? cell.padEnd(widths[c] ?? 0) : cell.padStart(widths[c] ?? 0))).join("  "),
    )
    .join("\n");
}

/** For chrome://tracing and Perfetto: dispatches one behind the other; without times, one microsecond each. */
export function chromeTrace(dispatches: readonly ProfiledDispatch[]): string {
  let ts = 0;
  const traceEvents = dispatches.map(({ kernel, timeMs, flops, bytes }) => {
    const dur = timeMs === undefined ? 1 : 1000 * timeMs;
    const event = {
      name: kernel,
      ph: "X",
      ts,
      dur,
      pid: 1,
      tid: 1,
      args: { flops, bytes, timed: timeMs !== undefined },
    };
    ts += dur;
    return event;
  });
  return JSON.stringify({ traceEvents, displayTimeUnit: "ms" });
}

/** Opens the peers where ours runs, on the same adapter. */
import type { Gpu } from "../../src/gpu/gpu.ts";
import { memoryOf } from "./memory.ts";
import type { Peer, PeerHost, PeerSource } from "./peer.ts";

export interface PeerReport {
  readonly name: string;
  /** Empty if it could not be found out. */
  readonly version: string;
  readonly ok: boolean;
  /** Why the peer does not take part. */
  readonly reason?: string;
}

interface OpenPeers {
  readonly peers: readonly Peer[];
  readonly reports: readonly PeerReport[];
  readonly close: () => void;
}

/** Opens each; one that cannot be opened is reported with the reason. `close` takes back what was done to the globals. */
export async function openPeers(gpu: Gpu, sources: readonly PeerSource[]): Promise<OpenPeers> {
  const host: PeerHost = { readRepoFile: (path) => globalThis.readRepoFile(path) };
  const peers: Peer[] = [];
  const reports: PeerReport[] = [];
  if (gpu.isSoftware) keepCompilerQuiet();
  const close = gpu.runtime === "node" ? await lendDawn() : () => {};
  for (const { name, open } of sources)
    try {
      await expectSameAdapter(gpu);
      const peer = countingMemory(await open(host));
      peers.push(peer);
      reports.push({ name, version: peer.version, ok: true });
    } catch (error) {
      reports.push({ name, version: "", ok: false, reason: String(error) });
    }
  return { peers, reports, close };
}

/** The peer, whose cases tell what memory they took. */
function countingMemory(peer: Peer): Peer {
  const device = peer.device?.();
  if (!device) return peer;
  const memory = memoryOf(device);
  return {
    ...peer,
    prepare: async (work) => {
      const before = memory.live;
      let peak: number | undefined;
      memory.restart();
      const prepared = await peer.prepare(work);
      const read: typeof prepared.read = () => {
        peak ??= memory.peak - before; // what reading takes is not the work's
        return prepared.read();
      };
      return { ...prepared, read, peakBytes: () => peak };
    },
  };
}

/** Peers open the adapter themselves; it must be the one that ours is on. */
async function expectSameAdapter(gpu: Gpu): Promise<void> {
  const adapter = await navigator.gpu.requestAdapter({ powerPreference: "high-performance" });
  const text = (info: GPUAdapterInfo | undefined): string =>
    info ? [info.vendor, info.architecture, info.device, info.description].filter(Boolean).join(" · ") : "none";
  if (text(adapter?.info) !== text(gpu.info))
    throw new Error(`peers: the adapter must be ${text(gpu.info)}, got ${text(adapter?.info)}`);
}

/**
 * V8 optimises the WebAssembly of ort-web for minutes on all cores, which are the software adapter's too: 12 ms instead of 2 for
 * a tiny graph. Its first compiler is enough there. A page cannot say so; it would be `--js-flags=--liftoff-only`.
 */
function keepCompilerQuiet(): void {
  if (typeof process === "undefined") return;
  process.getBuiltinModule?.("v8").setFlagsFromString("--liftoff-only");
}

interface Dawn {
  readonly globals: Readonly<Record<string, unknown>>;
  create(options: string[]): GPU;
}

/** Dawn instances, kept for the life of the process: when one is collected the process crashes at its next use. */
const kept: GPU[] = [];

/** Gives Node what peers look for in a browser: `navigator.gpu` and the globals of WebGPU. Returns what takes it back. */
async function lendDawn(): Promise<() => void> {
  const name = "webgpu"; // no browser has it: a bundler must not follow it
  const dawn = (await import(/* @vite-ignore */ name)) as Dawn;
  const gpu = dawn.create([]); // openGpu has named the software driver by now, if that is what it found
  kept.push(gpu);
  const restore = [define(globalThis, dawn.globals)];
  if (globalThis.navigator) restore.push(define(globalThis.navigator, { gpu }));
  else restore.push(define(globalThis, { navigator: { gpu, userAgent: "Node", hardwareConcurrency: 1 } }));

  // Dawn in Node refuses memory that WebAssembly shares with threads, which is where ort-web keeps all of its own.
  const { prototype } = GPUQueue;
  const { writeBuffer } = prototype;
  prototype.writeBuffer = function (this: GPUQueue, buffer, offset, data, ...rest) {
    const unshared = data instanceof Uint8Array && data.buffer instanceof SharedArrayBuffer ? data.slice() : data;
    return writeBuffer.call(this, buffer, offset, unshared as GPUAllowSharedBufferSource, ...rest);
  };
  restore.push(() => {
    prototype.writeBuffer = writeBuffer;
  });

  // Waiting for Dawn does not keep Node's loop alive, and before it ends Node waits for WebAssembly's compiler: a minute.
  const alive = setInterval(() => {}, 1000);
  restore.push(() => clearInterval(alive));
  return () => {
    for (const step of restore) step();
  };
}

/** Defines what is missing, and returns what removes it again. */
function define(target: object, values: Readonly<Record<string, unknown>>): () => void {
  const added = Object.keys(values).filter((key) => !(key in target));
  for (const key of added)
    Object.defineProperty(target, key, { value: values[key], configurable: true, writable: true });
  return () => {
    for (const key of added) Reflect.deleteProperty(target, key);
  };
}

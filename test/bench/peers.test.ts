import { expect, test } from "vitest";
import { type Contest, measure, type Settings } from "../../bench/harness.ts";
import { openPeers } from "../../bench/peers/host.ts";
import { memoryOf } from "../../bench/peers/memory.ts";
import {
  type HostMatrix,
  type LlamaStep,
  llamaResults,
  type Peer,
  type PeerCase,
  type PeerSource,
  parametersOf,
} from "../../bench/peers/peer.ts";
import { summarize } from "../../bench/summary.ts";
import { openGpu } from "../../src/gpu/gpu.ts";
import { sum2 } from "../../src/kernels/axpy.ts";
import { tensor } from "../../src/tensor/tensor.ts";

const opened = openGpu();
const VALUES = Float32Array.from({ length: 100 }, (_, i) => i);
const host = { rows: 1, columns: 100, values: VALUES };

/** x + x, 6 ms by us. */
function addition(clock: { ms: number }): Contest {
  return {
    name: "addition",
    against: "ours",
    setup: (gpu) => {
      const x = tensor(gpu, VALUES, [1, 100]);
      const run = () => {
        clock.ms += 6;
        return { y: sum2(x, x) };
      };
      return {
        inputs: [x],
        cases: [{ name: "ours", flops: 6e6, bytes: 3e6, run, check: (_, element) => 2 * element }],
        work: { op: "add", x: host, z: host },
      };
    },
  };
}

interface Fake {
  readonly disposed: string[];
  readonly clock: { ms: number };
  readonly settings: Settings;
  readonly peer: (name: string, change?: Partial<PeerCase>) => Peer;
}

function fake(): Fake {
  const clock = { ms: 0 };
  const disposed: string[] = [];
  const peer: Fake["peer"] = (name, change) => ({
    name,
    version: "1.0.0",
    prepare: async () => ({
      run: () => {
        clock.ms += 12;
      },
      finish: async () => {},
      read: async () => ({ y: VALUES.map((v) => 2 * v) }),
      dispose: () => void disposed.push(name),
      ...change,
    }),
  });
  return { disposed, clock, settings: { repetitions: 3, minBatchMs: 5, now: () => clock.ms }, peer };
}

test("a peer's right results are timed beside ours, with our costs", async () => {
  const { clock, settings, peer, disposed } = fake();
  const peaks = { fmaGflops: 2, copyGbs: 4 };
  const results = await measure(await opened, addition(clock), settings, [peer("rival")], peaks);
  const all = (value: number) => ({ median: value, p10: value, p90: value });
  const costs = { flops: 6e6, bytes: 3e6, batch: 1, repetitions: 3, limit: "compute" };
  expect(results).toEqual([
    { name: "ours", ...costs, dispatches: 1, ms: all(6), gflops: 1, gbs: 0.5, ratio: all(1), shareOfPeak: 0.5 },
    { name: "rival", peer: "rival", ...costs, ms: all(12), gflops: 0.5, gbs: 0.25, ratio: all(0.5), shareOfPeak: 0.25 },
  ]);
  expect(disposed).toEqual(["rival"]);
});

test("a peer that is wrong, cannot do the work, fails or hangs is reported as such and stops no one", async () => {
  const { clock, settings, peer, disposed } = fake();
  let runs = 0;
  const breaks = (): void => {
    if (++runs > 2) throw new Error("lost the device");
  };
  const peers: Peer[] = [
    peer("wrong", { read: async () => ({ y: new Float32Array(100) }) }),
    { ...peer("unable"), prepare: () => Promise.reject(new Error("has no addition")) },
    peer("breaks", { run: breaks }),
    peer("hangs", { finish: () => new Promise(() => {}) }),
    peer("right"),
  ];
  const results = await measure(await opened, addition(clock), { ...settings, peerPatienceMs: 50 }, peers);
  expect(results).toMatchObject([
    { name: "ours", repetitions: 3 },
    { name: "wrong", peer: "wrong", error: expect.stringMatching(/^wrong: y\[\d+\] must be \d+, got 0$/) },
    { name: "unable", error: "Error: has no addition" },
    { name: "breaks", error: "Error: lost the device" },
    { name: "hangs", error: "Error: no answer within 0.05 s" },
    { name: "right", repetitions: 3 },
  ]);
  expect(disposed).toEqual(["wrong", "breaks", "hangs", "right"]);
});

test("a peer's result of another size or name than ours is wrong", async () => {
  const { clock, settings, peer } = fake();
  const peers = [
    peer("short", { read: async () => ({ y: new Float32Array(99) }) }),
    peer("other", { read: async () => ({ z: VALUES.map((v) => 2 * v) }) }),
  ];
  const [, short, other] = await measure(await opened, addition(clock), settings, peers);
  expect(short).toEqual({ name: "short", peer: "short", error: "short: y must have 100 elements, got 99" });
  expect(other).toEqual({ name: "other", peer: "other", error: "other: y must have 100 elements, got 0" });
});

test("a peer that cannot be opened is reported with the reason, and the globals are put back", async () => {
  const { peer } = fake();
  const before = Object.keys(Object.getOwnPropertyDescriptors(globalThis));
  const sources: PeerSource[] = [
    { name: "absent", open: () => Promise.reject(new Error("is not installed")) },
    { name: "present", open: async () => peer("present") },
  ];
  const { peers, reports, close } = await openPeers(await opened, sources);
  close();
  expect(reports).toEqual([
    { name: "absent", version: "", ok: false, reason: "Error: is not installed" },
    { name: "present", version: "1.0.0", ok: true },
  ]);
  expect(peers.map(({ name }) => name)).toEqual(["present"]);
  expect(Object.keys(Object.getOwnPropertyDescriptors(globalThis))).toEqual(before);
});

test("the summary compares ours with the fastest peer of each contest and takes the geometric mean", () => {
  const timed = (name: string, ms: number, peer?: string) => {
    const spread = { median: ms, p10: ms, p90: ms };
    const rest = { flops: 1, bytes: 1, batch: 1, repetitions: 1, gflops: 1, gbs: 1, ratio: spread };
    return { name, ms: spread, ...rest, ...(peer !== undefined && { peer }) };
  };
  const failed = { name: "c", peer: "c", error: "cannot" };
  const summary = summarize([
    {
      name: "won",
      against: "ours",
      cases: [timed("base", 1), timed("ours", 2), timed("a", 16, "a"), timed("b", 20, "b")],
    },
    { name: "lost", against: "ours", cases: [timed("ours", 4), failed, timed("a", 2, "a")] },
    { name: "alone", against: "ours", cases: [timed("ours", 4), failed] },
    { name: "none", cases: [timed("ours", 4), timed("a", 2, "a")] },
  ]);
  expect(summary).toEqual({
    rows: [
      { contest: "won", ours: "ours", ms: 2, peer: "a", peerMs: 16, ratio: 8 },
      { contest: "lost", ours: "ours", ms: 4, peer: "a", peerMs: 2, ratio: 0.5 },
    ],
    geomean: expect.closeTo(2, 12),
    ahead: 1,
  });
  expect(summarize([])).toEqual({ rows: [], geomean: null, ahead: 0 });
});

test("a device's memory is what was made and not destroyed, and the most there was since it was last asked anew", async () => {
  const { device } = await opened;
  const memory = memoryOf(device);
  const before = memory.live;
  const make = (size: number): GPUBuffer => device.createBuffer({ size, usage: 0x80 });
  const [a, b] = [make(1024), make(512)];
  expect(memory.live - before).toBe(1536);
  a.destroy();
  a.destroy();
  expect([memory.live - before, memory.peak - before]).toEqual([512, 1536]);
  memory.restart();
  expect(memory.peak - before).toBe(512);
  b.destroy();
  expect(memory.live).toBe(before);
  expect(memoryOf(device)).toBe(memory);
});

test("a peer's case says what memory it took until its results were first read, and it is in the report where ours is", async () => {
  const { settings, peer, clock } = fake();
  const gpu = await opened;
  const { device } = gpu;
  const make = (size: number): GPUBuffer => device.createBuffer({ size, usage: 0x80 });
  const held = make(4096); // before: not this case's
  const rival: Peer = { ...peer("rival"), device: () => device };
  const source = {
    ...rival,
    prepare: async (): Promise<PeerCase> => {
      const x = make(256);
      const prepared = await rival.prepare({ op: "add", x: host, z: host });
      return {
        ...prepared,
        run: () => {
          prepared.run();
          make(128).destroy();
        },
        read: async () => {
          make(65_536).destroy();
          return { y: VALUES.map((v) => 2 * v) };
        },
        dispose: () => x.destroy(),
      };
    },
  };
  const { peers, close } = await openPeers(gpu, [{ name: "rival", open: async () => source }]);
  close();
  const contest = addition(clock);
  const counted: Contest = {
    ...contest,
    setup: (on) => {
      const prepared = contest.setup(on);
      return { ...prepared, cases: prepared.cases.map((one) => ({ ...one, peakBytes: 99 })) };
    },
  };
  const results = await measure(gpu, counted, settings, peers);
  expect(results).toMatchObject([
    { name: "ours", peakBytes: 99 },
    { name: "rival", peakBytes: 384 },
  ]);
  const [, uncounted] = await measure(gpu, contest, settings, peers);
  expect(uncounted).not.toHaveProperty("peakBytes");
  held.destroy();
});

test("results of a Llama's step: all of the adapter in one, and gradients in their units", () => {
  const row = (...values: number[]): HostMatrix => ({
    rows: 1,
    columns: values.length,
    values: new Float32Array(values),
  });
  const adapter = new Map([["q", { A: row(1, 2), B: row(3) }]]);
  const work = { adapter, gradients: new Map([["B of q", 4]]) } as unknown as LlamaStep;
  expect(parametersOf(work).map(([name]) => name)).toEqual(["A of q", "B of q"]);
  const [loss, norm, A, B] = [5, 6, 7, 8].map((value) => new Float32Array([value])) as [
    Float32Array,
    ...Float32Array[],
  ];
  const gradients = new Map([
    ["A of q", new Float32Array(2)],
    ["B of q", new Float32Array([2])],
  ]);
  expect(llamaResults(work, loss, norm as Float32Array, [A, B] as Float32Array[], gradients)).toEqual({
    loss,
    "grad norm": norm,
    adapter: new Float32Array([7, 8]),
    "B of q": new Float32Array([0.5]),
  });
});

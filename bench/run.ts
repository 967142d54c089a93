/** Runs the probes and the contests and returns the report; tells as it goes. Portable, like the harness. */
import { type Gpu, openGpu } from "../src/gpu/gpu.ts";
import { contests } from "./cases/index.ts";
import { type CaseReport, type Contest, measure, type Peaks, type Settings, syncCost } from "./harness.ts";
import { openPeers, type PeerReport } from "./peers/host.ts";
import { PEERS } from "./peers/index.ts";
import type { Peer, PeerSource } from "./peers/peer.ts";
import { peaksOf, probes } from "./probes/probes.ts";
import { measureReplay, type ReplayReport } from "./probes/replay.ts";
import { type Summary, summarize } from "./summary.ts";

export type { CaseReport, Peaks, Spread } from "./harness.ts";
export type { PeerReport } from "./peers/host.ts";
export type { ReplayReport } from "./probes/replay.ts";
export type { Summary } from "./summary.ts";

export interface BenchOptions {
  /** Small sizes, few and short repetitions: shows that everything works, not how fast it is. */
  readonly quick: boolean;
  /** All sizes, also where the adapter is a CPU; hardware gets them anyhow. */
  readonly full: boolean;
  /** Whether the peers take part. */
  readonly peers: boolean;
  /** Only contests whose name contains one of these; all if there are none. */
  readonly only: readonly string[];
}

/** What `runBenchmarks` tells while it works, in this order; "contest" and then "result" once per contest. */
export type Progress =
  | { readonly kind: "start"; readonly header: ReportHeader; readonly repetitions: number; readonly contests: number }
  /** The peers are open, or it is known why not. */
  | { readonly kind: "peers"; readonly peers: readonly PeerReport[] }
  /** The probes have run; so have those contests that `result` told of before. */
  | { readonly kind: "peaks"; readonly peaks: Peaks }
  | { readonly kind: "replay"; readonly replay: ReplayReport }
  /** A contest begins: `index` of `contests`, from 0. */
  | { readonly kind: "contest"; readonly name: string; readonly index: number }
  | { readonly kind: "result"; readonly report: ContestReport }
  | { readonly kind: "summary"; readonly summary: Summary };

export interface ContestReport {
  readonly name: string;
  /** "matmul", "transformer", "lora-forward", "lora-backward", "lora-step", "bandwidth", … */
  readonly group: string;
  readonly sizes: Readonly<Record<string, number | string>>;
  /** Ours first, the baseline first of all, then one per peer. Empty if the contest failed. */
  readonly cases: readonly CaseReport[];
  /** Which of our cases the peers' are compared with, where peers take part. */
  readonly against?: string;
  /** What went wrong with us; nothing of such a contest is timed. */
  readonly error?: string;
  /** Why this device cannot run it. */
  readonly skipped?: string;
}

export interface ReportHeader {
  readonly date: string;
  readonly runtime: string;
  readonly adapter: {
    readonly vendor: string;
    readonly architecture: string;
    readonly device: string;
    readonly description: string;
    readonly isSoftware: boolean;
  };
  readonly options: BenchOptions;
  /** Milliseconds of waiting for an idle device; part of each repetition. */
  readonly syncMs: number;
  readonly minBatchMs: number;
}

export interface Report extends ReportHeader {
  /** False if a contest failed or none was found. What a peer cannot do or does wrong does not count. */
  readonly ok: boolean;
  /** Null if the probes failed. */
  readonly peaks: Peaks | null;
  /** What a replayed training step costs the host. Absent in reports made before it was measured. */
  readonly replay?: ReplayReport;
  /** Empty if none was asked for. */
  readonly peers: readonly PeerReport[];
  /** The probes first. */
  readonly contests: readonly ContestReport[];
  readonly summary: Summary;
}

/** What `bench/results/*.json` holds. */
export interface SavedReport extends Report {
  readonly command: string;
  /** With `-dirty` if files differ from it. */
  readonly commit: string;
}

const FLAGS = ["--quick", "--full", "--peers", "--no-peers"];

/** Flags and names, in any order. Throws on any other option. */
export function readOptions(args: readonly string[]): BenchOptions {
  const unknown = args.find((arg) => arg.startsWith("-") && !FLAGS.includes(arg));
  if (unknown) throw new Error(`bench: options are ${FLAGS.join(", ")}, --json FILE and --in RUNTIME, got ${unknown}`);
  const has = (flag: string): boolean => args.includes(flag);
  for (const [a, b] of [
    ["--quick", "--full"],
    ["--peers", "--no-peers"],
  ] as const)
    if (has(a) && has(b)) throw new Error(`bench: ${a} and ${b} exclude each other`);
  return {
    quick: has("--quick"),
    full: has("--full"),
    peers: has("--peers") || !(has("--quick") || has("--no-peers")),
    only: args.filter((arg) => !arg.startsWith("-")),
  };
}

/**
 * Measures on the best adapter there is. Peers need `globalThis.readRepoFile` (see `scripts/portable.ts`).
 *
 * Throws only if no device can be had; everything else is in the report.
 */
export async function runBenchmarks(
  options: BenchOptions,
  onProgress: (event: Progress) => void = () => {},
  sources: readonly PeerSource[] = PEERS,
): Promise<Report> {
  const gpu = await openGpu();
  const now = (): number => performance.now();
  const syncMs = await syncCost(gpu, now);
  const settings = settingsFor(options, gpu, syncMs, now);
  const { vendor, architecture, device, description } = gpu.info;
  const header: ReportHeader = {
    date: new Date().toISOString(),
    runtime: runtimeName(),
    adapter: { vendor, architecture, device, description, isSoftware: gpu.isSoftware },
    options,
    syncMs,
    minBatchMs: settings.minBatchMs,
  };
  const { only, quick } = options;
  const maxBytes = Math.min(gpu.limits.maxBufferSize, gpu.limits.maxStorageBufferBindingSize);
  const all = contests({ ...options, isSoftware: gpu.isSoftware });
  const chosen = all.filter(({ name }) => only.length === 0 || only.some((part) => name.includes(part)));
  const { fmaPeak, copyBandwidth } = probes({ quick, isSoftware: gpu.isSoftware, maxBytes });
  onProgress({ kind: "start", header, repetitions: settings.repetitions, contests: 2 + chosen.length });

  const opened = options.peers ? await openPeers(gpu, sources) : undefined;
  if (opened) onProgress({ kind: "peers", peers: opened.reports });
  const reports: ContestReport[] = [];
  let peaks: Peaks | null = null;
  const run = async (contest: Contest, on = gpu): Promise<readonly CaseReport[]> => {
    onProgress({ kind: "contest", name: contest.name, index: reports.length });
    const report = await runContest(on, contest, settings, opened?.peers ?? [], peaks);
    reports.push(report);
    onProgress({ kind: "result", report });
    return report.cases;
  };
  const [fmaCases, copyCases] = [await run(fmaPeak), await run(copyBandwidth)];
  if (fmaCases.length > 0 && copyCases.length > 0) {
    peaks = peaksOf(fmaCases, copyCases);
    onProgress({ kind: "peaks", peaks });
  }
  const replay = await measureReplay(gpu);
  onProgress({ kind: "replay", replay });
  const withUnits = chosen.some((contest) => contest.matrixUnits) ? await openGpu({ matrixUnits: true }) : undefined;
  for (const contest of chosen) {
    const on = (contest.matrixUnits && withUnits) || gpu;
    const skipped =
      contest.largestBytes <= maxBytes
        ? contest.unmet?.(on)
        : `${contest.largestBytes} bytes in one buffer, this device allows ${maxBytes}`;
    if (skipped === undefined) await run(contest, on);
    else {
      onProgress({ kind: "contest", name: contest.name, index: reports.length });
      const report = { ...headOf(contest), cases: [], skipped };
      reports.push(report);
      onProgress({ kind: "result", report });
    }
  }
  withUnits?.destroy();
  opened?.close();
  gpu.destroy();
  const summary = summarize(reports);
  onProgress({ kind: "summary", summary });
  const ok = chosen.length > 0 && reports.every(({ error }) => error === undefined);
  return { ok, ...header, peaks, replay, peers: opened?.reports ?? [], contests: reports, summary };
}

function settingsFor({ quick }: BenchOptions, gpu: Gpu, syncMs: number, now: () => number): Settings {
  return {
    repetitions: quick ? 3 : 15,
    // Where waiting is slow (Deno sleeps 10 ms) longer batches keep it a small part of each repetition.
    minBatchMs: Math.max(quick ? 5 : 20, (quick ? 2 : 20) * syncMs),
    maxCaseMs: gpu.isSoftware ? 3000 : 10_000,
    peerPatienceMs: 180_000,
    now,
    ...(gpu.isSoftware && typeof process !== "undefined" && { cpuNow }),
  };
}

function cpuNow(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1000;
}

const headOf = ({ name, group = "other", sizes = {}, against }: Contest): Omit<ContestReport, "cases"> => ({
  name,
  group,
  sizes,
  ...(against !== undefined && { against }),
});

async function runContest(
  gpu: Gpu,
  contest: Contest,
  settings: Settings,
  peers: readonly Peer[],
  peaks: Peaks | null,
): Promise<ContestReport> {
  try {
    return { ...headOf(contest), cases: await measure(gpu, contest, settings, peers, peaks ?? undefined) };
  } catch (error) {
    return { ...headOf(contest), cases: [], error: String(error) };
  }
}

function runtimeName(): string {
  const { Deno: deno } = globalThis as { Deno?: { version: { deno: string } } };
  if (deno) return `Deno ${deno.version.deno}`;
  if (typeof process === "undefined") return navigator.userAgent;
  return `Node ${process.versions.node}`;
}

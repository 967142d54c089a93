/** What bench/gpu.ts makes of the benchmarks as they run, so that nothing measured is lost, and of PyTorch's times. */
import { type CaseResult, roofline, type Spread } from "./harness.ts";
import type { CaseReport, ContestReport, Peaks, PeerReport, Progress, Report, ReportHeader } from "./run.ts";
import { summarize } from "./summary.ts";

/** The report as far as it has come, over several runs of the benchmarks. */
export class SoFar {
  #header: ReportHeader | undefined;
  #peaks: Peaks | null = null;
  #peers: readonly PeerReport[] = [];
  readonly #contests = new Map<string, ContestReport>();
  readonly #victims = new Set<string>();
  #isBroken = false;

  /** What was measured first stays: its shares are of the peaks that were measured with it. */
  take(event: Progress): void {
    if (event.kind === "start") {
      this.#header ??= event.header;
      this.#isBroken = false;
    } else if (event.kind === "peaks") this.#peaks ??= event.peaks;
    else if (event.kind === "peers") this.#peers = event.peers;
    else if (event.kind === "result") this.#takeResult(event.report);
  }

  #takeResult(contest: ContestReport): void {
    const { name, error } = contest;
    const isVictim = this.#isBroken && error !== undefined;
    this.#isBroken ||= error?.startsWith("GpuError") ?? false;
    if (this.#contests.get(name)?.cases.length) return;
    if (isVictim) this.#victims.add(name);
    else this.#victims.delete(name);
    this.#contests.set(name, contest);
  }

  /** Undefined before there is a device. */
  get report(): Report | undefined {
    const contests = [...this.#contests.values()];
    const ok = contests.some(({ group }) => group !== "probe") && contests.every(({ error }) => error === undefined);
    const [peaks, peers, summary] = [this.#peaks, this.#peers, summarize(contests)];
    return this.#header && { ...this.#header, ok, peaks, peers, contests, summary };
  }

  /**
   * Names of the contests that failed on a device on which another had failed before. A device that is lost or out of order fails
   * all that follows: the first is the culprit, the others deserve another device.
   */
  get victims(): string[] {
    return [...this.#victims];
  }
}

interface TorchShape {
  readonly layout: string;
  readonly M: number;
  readonly N: number;
  readonly K: number;
}

/** What bench/torch.py prints. */
export interface TorchReport {
  readonly version: string;
  readonly device: string;
  readonly cases: readonly TorchCase[];
}

type TorchCase = { readonly dtype: "f32" | "bf16"; readonly shape: TorchShape } & (
  | Pick<CaseResult, "flops" | "bytes" | "batch" | "repetitions" | "ms" | "gflops" | "gbs">
  | { readonly error: string }
);

const keyOf = ({ layout, M, N, K }: TorchShape): string => `${layout} ${M} ${N} ${K}`;

/** The plain products of a report, which PyTorch can do as well. */
export function torchShapes({ contests }: Pick<Report, "contests">): TorchShape[] {
  return contests.filter(isProduct).map(shapeOf);
}

const isProduct = ({ group, cases }: ContestReport): boolean =>
  (group === "matmul" || group === "transformer") && cases.length > 0;

function shapeOf({ sizes: { layout, M, N, K } }: ContestReport): TorchShape {
  return { layout: String(layout), M: Number(M), N: Number(N), K: Number(K) };
}

/**
 * The report with PyTorch's times as further rows of its products, or with the reason why there are none. They are no part of the
 * summary: that is about WebGPU on one device.
 */
export function withTorch(report: Report, torch: TorchReport | string): Report {
  if (typeof torch === "string")
    return { ...report, peers: [...report.peers, { name: "torch", version: "", ok: false, reason: torch }] };
  const version = `${torch.version} on ${torch.device}`;
  const contests = report.contests.map((contest) => {
    if (!isProduct(contest)) return contest;
    const own = torch.cases.filter(({ shape }) => keyOf(shape) === keyOf(shapeOf(contest)));
    const rows = own.map((one) => torchRow(one, contest.cases[0], report.peaks));
    return { ...contest, cases: [...contest.cases, ...rows] };
  });
  return { ...report, contests, peers: [...report.peers, { name: "torch", version, ok: true }] };
}

function torchRow(one: TorchCase, baseline: CaseReport | undefined, peaks: Peaks | null): CaseReport {
  const head = { name: `torch ${one.dtype}`, peer: "torch" };
  if ("error" in one) return { ...head, error: one.error };
  const { shape: _, dtype, ...times } = one;
  const base = baseline && "ms" in baseline ? baseline.ms.median : Number.NaN;
  const { median, p10, p90 } = times.ms;
  const ratio: Spread = { median: base / median, p10: base / p90, p90: base / p10 };
  // The probes know nothing of matrix units.
  return { ...head, ...times, ratio, ...(peaks && dtype === "f32" && roofline(times.gflops, times.gbs, peaks)) };
}

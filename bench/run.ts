/** Runs the contests, prints a table as it goes and returns the report. Portable, like the harness. */
import { openGpu } from "../src/gpu/gpu.ts";
import { contests } from "./cases.ts";
import { type CaseResult, measure, type Settings, type Spread, syncCost } from "./harness.ts";

export interface BenchOptions {
  /** Small sizes, few and short repetitions: shows that everything works, not how fast it is. */
  readonly quick: boolean;
  /** Only contests whose name contains one of these; all if there are none. */
  readonly only: readonly string[];
}

export type ContestReport = { readonly name: string } & (
  | { readonly cases: readonly CaseResult[] }
  | { readonly error: string }
);

export interface Report {
  /** False if a contest failed or none was found. */
  readonly ok: boolean;
  readonly date: string;
  readonly runtime: string;
  readonly adapter: {
    readonly vendor: string;
    readonly architecture: string;
    readonly device: string;
    readonly description: string;
    readonly isSoftware: boolean;
  };
  readonly quick: boolean;
  /** Milliseconds of waiting for an idle device; part of each repetition. */
  readonly syncMs: number;
  readonly minBatchMs: number;
  readonly contests: readonly ContestReport[];
}

/** `--quick` and names, in any order. Throws on any other option. */
export function readOptions(args: readonly string[]): BenchOptions {
  const unknown = args.find((arg) => arg.startsWith("-") && arg !== "--quick");
  if (unknown) throw new Error(`bench: options are --quick, --json FILE and --in RUNTIME, got ${unknown}`);
  return { quick: args.includes("--quick"), only: args.filter((arg) => arg !== "--quick") };
}

export async function runBenchmarks({ quick, only }: BenchOptions): Promise<Report> {
  const gpu = await openGpu();
  const now = (): number => performance.now();
  const { vendor, architecture, device, description } = gpu.info;
  const adapter = { vendor, architecture, device, description, isSoftware: gpu.isSoftware };
  const syncMs = await syncCost(gpu, now);
  // Where waiting is slow (Deno sleeps 10 ms) longer batches keep it a small part of each repetition.
  const minBatchMs = Math.max(quick ? 5 : 20, (quick ? 2 : 20) * syncMs);
  const settings: Settings = { repetitions: quick ? 3 : 15, minBatchMs, now };
  const runtime = runtimeName();
  console.log(
    `${runtime}\n${[vendor, architecture, description].filter(Boolean).join(" · ")}${gpu.isSoftware ? " (software)" : ""}`,
  );
  console.log(
    `${settings.repetitions} repetitions of at least ${minBatchMs.toFixed(0)} ms; waiting costs ${syncMs.toFixed(2)} ms`,
  );

  const reports: ContestReport[] = [];
  for (const contest of contests(quick)) {
    if (only.length > 0 && !only.some((part) => contest.name.includes(part))) continue;
    console.log(`\n${contest.name}`);
    try {
      const cases = await measure(gpu, contest, settings);
      for (const line of table(cases)) console.log(line);
      reports.push({ name: contest.name, cases });
    } catch (error) {
      console.log(`  ${String(error)}`);
      reports.push({ name: contest.name, error: String(error) });
    }
  }
  gpu.destroy();
  const ok = reports.length > 0 && reports.every((report) => "cases" in report);
  return { ok, date: new Date().toISOString(), runtime, adapter, quick, syncMs, minBatchMs, contests: reports };
}

function runtimeName(): string {
  const { Deno: deno } = globalThis as { Deno?: { version: { deno: string } } };
  if (deno) return `Deno ${deno.version.deno}`;
  if (typeof process === "undefined") return navigator.userAgent;
  return `Node ${process.versions.node}`;
}

/** Three digits, or all before the point. */
const short = (value: number): string => (value < 1000 ? value.toPrecision(3) : value.toFixed(0));

function table(cases: readonly CaseResult[]): string[] {
  const range = ({ p10, p90 }: Spread): string => `[${short(p10)}–${short(p90)}]`;
  const head = ["", "ms", "p10–p90", "MFLOP", "GFLOP/s", "GB/s", "dispatches", "ratio", "p10–p90"];
  const rows = cases.map(({ name, flops, dispatches, ms, gflops, gbs, ratio }) => [
    name,
    short(ms.median),
    range(ms),
    (flops / 1e6).toFixed(1),
    short(gflops),
    short(gbs),
    `${dispatches}`,
    ratio.median.toFixed(2),
    range(ratio),
  ]);
  const widths = head.map((_, column) => Math.max(...[head, ...rows].map((row) => row[column]?.length ?? 0)));
  return [head, ...rows].map((row) => {
    const cells = row.map((cell, i) => (i === 0 ? cell.padEnd(widths[i] ?? 0) : cell.padStart(widths[i] ?? 0)));
    return `  ${cells.join("  ")}`;
  });
}

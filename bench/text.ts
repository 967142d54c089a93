/** Progress and results as lines for a terminal. */
import type { CaseReport, Progress, Spread, Summary } from "./run.ts";

export function lines(event: Progress): string[] {
  switch (event.kind) {
    case "start": {
      const { runtime, adapter, minBatchMs, syncMs } = event.header;
      const name = [adapter.vendor, adapter.architecture, adapter.description].filter(Boolean).join(" · ");
      const waiting = `waiting costs ${syncMs.toFixed(2)} ms`;
      return [
        `${runtime}\n${name}${adapter.isSoftware ? " (software)" : ""}`,
        `${event.contests} contests, up to ${event.repetitions} repetitions of at least ${minBatchMs.toFixed(0)} ms; ${waiting}`,
      ];
    }
    case "peers":
      return event.peers.map(({ name, version, ok, reason }) => `peer ${name} ${ok ? version : `is out: ${reason}`}`);
    case "contest":
      return [`\n${event.name}`];
    case "result": {
      const { cases, error, skipped } = event.report;
      if (error !== undefined) return [`  ${error}`];
      return skipped === undefined ? table(cases) : [`  skipped: ${skipped}`];
    }
    case "peaks": {
      const { fmaGflops, copyGbs } = event.peaks;
      return [`\npeaks of this device: ${short(fmaGflops)} GFLOP/s, ${short(copyGbs)} GB/s`];
    }
    case "replay": {
      const { hostUs, dispatches, objectsCreated, submits, readbacks, peakOverPlan } = event.replay;
      return [
        `host time per dispatch: ${hostUs.replayed.toFixed(2)} µs replayed, ${hostUs.eager.toFixed(2)} µs encoded anew`,
        `a replayed training step: ${dispatches} dispatches, ${submits} submit, ${objectsCreated} GPU objects, ${readbacks} readbacks; peak over plan ${peakOverPlan.toFixed(4)}`,
      ];
    }
    case "summary":
      return summaryLines(event.summary);
  }
}

function summaryLines({ rows, geomean, ahead }: Summary): string[] {
  if (geomean === null) return [];
  const head = ["ours against the fastest peer", "ms", "peer", "ms", "ratio"];
  const body = rows.map(({ contest, ms, peer, peerMs, ratio }) => [
    contest,
    short(ms),
    peer,
    short(peerMs),
    ratio.toFixed(2),
  ]);
  return [
    "",
    ...aligned([head, ...body]),
    `  ahead in ${ahead} of ${rows.length}; geometric mean of the ratios ${geomean.toFixed(2)}`,
  ];
}

function table(cases: readonly CaseReport[]): string[] {
  const range = ({ p10, p90 }: Spread): string => `[${short(p10)}–${short(p90)}]`;
  const counted = cases.some((one) => "peakBytes" in one);
  const head = ["", "ms", "p10–p90", "GFLOP/s", "GB/s", "of peak", "dispatches", "ratio", "p10–p90"];
  const inCpuTime = cases.some((one) => "cpu" in one);
  if (inCpuTime) head.push("CPU ratio", "p10–p90");
  if (counted) head.push("MB at most");
  const rows = cases.map((one) => {
    if ("error" in one) return [one.name, `  ${one.error}`];
    const { name, dispatches, ms, gflops, gbs, ratio, cpu, limit, shareOfPeak } = one;
    const share = shareOfPeak === undefined ? "" : `${(100 * shareOfPeak).toFixed(0)} % ${limit}`;
    const times = [short(ms.median), range(ms), short(gflops), short(gbs)];
    const inCpu = inCpuTime ? [cpu?.ratio.median.toFixed(2) ?? "", cpu ? range(cpu.ratio) : ""] : [];
    const memory = counted ? [one.peakBytes === undefined ? "" : (one.peakBytes / 1e6).toFixed(1)] : [];
    return [name, ...times, share, `${dispatches ?? ""}`, ratio.median.toFixed(2), range(ratio), ...inCpu, ...memory];
  });
  return aligned([head, ...rows]);
}

/** Columns padded to one width: the first to the left, the others to the right. A row of two cells ends as it is. */
function aligned(rows: readonly (readonly string[])[]): string[] {
  const [head = []] = rows;
  const full = rows.filter(({ length }) => length === head.length);
  const widths = head.map((_, i) => Math.max(...(i === 0 ? rows : full).map((row) => row[i]?.length ?? 0)));
  return rows.map((row) => {
    const pad = (cell: string, i: number): string =>
      i === 0 ? cell.padEnd(widths[0] ?? 0) : row.length === head.length ? cell.padStart(widths[i] ?? 0) : cell;
    return `  ${row.map(pad).join("  ")}`;
  });
}

/** Three digits, or all before the point. */
const short = (value: number): string => (value < 1000 ? value.toPrecision(3) : value.toFixed(0));

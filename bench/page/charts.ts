/** The plots of a report, as SVG text; the same in the page and in the file of `npm run bench:report`. */
import * as Plot from "@observablehq/plot";
import type { CaseResult } from "../harness.ts";
import type { ContestReport, Report } from "../run.ts";
import { isTimed, short } from "./tables.ts";

export interface Chart {
  readonly title: string;
  readonly note: string;
  /** In pixels. */
  readonly width: number;
  readonly markup: string;
}

/** What is plotted: the report, or as much of it as is there. */
export type Plotted = Pick<Report, "contests" | "peaks" | "summary">;

/** All plots for which there are numbers. What was not measured is not in them; the tables say why. */
export function charts(report: Plotted, document: Document): Chart[] {
  const found = [
    ...rates(report),
    ...loraOverhead(report),
    ...weightFormats(report),
    ...roofline(report),
    ...ratios(report),
  ];
  return found.map(({ title, note, width, plot }) => {
    const options = { document, width, style: { fontSize: "11px" } };
    const drawn = Plot.plot({ ...options, ...plot });
    const image = drawn.matches("svg") ? drawn : drawn.querySelector("svg[aria-label]");
    image?.setAttribute("role", "img"); // to a screen reader it is its label; the tables have the numbers
    return { title, note, width, markup: drawn.outerHTML };
  });
}

interface Drawn {
  readonly title: string;
  readonly note: string;
  readonly width: number;
  readonly plot: Plot.PlotOptions;
}

const WIDTH = 370;
const WIDE = 860;

/** Ours is blue everywhere, and each peer has its own colour, readable on white and on black. */
const OURS = "#3b82f6";
const COLORS: Readonly<Record<string, string>> = {
  "jax-js": "#f59e0b",
  tfjs: "#10b981",
  "ort-web": "#ec4899",
  torch: "#8b5cf6",
  "torch f32": "#8b5cf6",
  "torch bf16": "#a78bfa",
};
const OTHERS = ["#94a3b8", "#06b6d4", "#f97316", "#84cc16", "#ef4444", "#d946ef", "#64748b"];

function colors(names: Iterable<string>, ours?: string): { domain: string[]; range: string[] } {
  const domain = [...new Set(names)];
  let others = 0;
  const range = domain.map((name) =>
    name === ours ? OURS : (COLORS[name] ?? OTHERS[others++ % OTHERS.length] ?? "currentColor"),
  );
  return { domain, range };
}

const group = (contests: readonly ContestReport[], name: string): ContestReport[] =>
  contests.filter((contest) => contest.group === name && contest.cases.some(isTimed));

function by<T>(items: readonly T[], key: (item: T) => string): [string, T[]][] {
  const groups = new Map<string, T[]>();
  for (const item of items) groups.set(key(item), [...(groups.get(key(item)) ?? []), item]);
  return [...groups];
}

const timed = (contest: ContestReport): { one: CaseResult; contest: ContestReport }[] =>
  contest.cases.filter(isTimed).map((one) => ({ one, contest }));

const told = ({ one, contest }: { one: CaseResult; contest: ContestReport }): string =>
  `${contest.name}\n${one.name}: ${short(one.ms.median)} ms, ${short(one.gflops)} GFLOP/s, ${short(one.gbs)} GB/s`;

/** Without half precision, which is other work and would dwarf the rest: the tables have it. */
const timedInF32 = (contest: ContestReport): Bar[] => timed(contest).filter(({ one }) => !/16\b/.test(one.name));

type Bar = ReturnType<typeof timed>[number];

interface Bars {
  readonly title: string;
  readonly found: readonly ContestReport[];
  /** What distinguishes the contests of one plot. */
  readonly facet: (contest: ContestReport) => string;
  readonly rate: "gflops" | "gbs";
  readonly width?: number;
}

/** A facet per contest, a bar per case. */
function bars({ title, found, facet, rate, width = WIDTH }: Bars, { peaks }: Plotted): Drawn {
  const unit = rate === "gflops" ? "GFLOP/s" : "GB/s";
  const peak = peaks && `${short(rate === "gflops" ? peaks.fmaGflops : peaks.copyGbs)} ${unit}`;
  const data = found.flatMap(timedInF32);
  const scale = colors(
    data.map(({ one }) => one.name),
    found[0]?.against ?? found[0]?.cases.at(-1)?.name,
  );
  // The rate at another time than the median.
  const at = ({ one }: Bar, ms: number): number => (one[rate] * one.ms.median) / ms;
  const fx = ({ contest }: Bar): string => facet(contest);
  const x = ({ one }: Bar): string => one.name;
  return {
    title,
    note: `${unit} at the median; thin lines run from the 10th to the 90th percentile.${peak ? ` Measured peak: ${peak}.` : ""}`,
    width,
    plot: {
      height: 260,
      marginLeft: 60,
      ariaLabel: `${title}, ${unit}`,
      color: { ...scale, legend: true },
      fx: { label: null, domain: found.map(facet) },
      x: { axis: null, domain: scale.domain },
      y: { grid: true, label: unit },
      marks: [
        Plot.barY(data, { fx, x, y: ({ one }) => one[rate], fill: x, title: told }),
        Plot.ruleX(data, { fx, x, y1: (bar) => at(bar, bar.one.ms.p90), y2: (bar) => at(bar, bar.one.ms.p10) }),
        Plot.ruleY([0]),
      ],
    },
  };
}

function rates(report: Plotted): Drawn[] {
  const all = report.contests;
  const size = ({ sizes: { M, N, K } }: ContestReport): string => (M === N && N === K ? `${M}³` : `${M}×${N}×${K}`);
  const text = (value: string | number | undefined): string => `${value ?? ""}`;
  return [
    ...by(group(all, "matmul"), size).map(
      ([name, found]): Bars => ({
        title: `Matrix product ${name}`,
        found,
        facet: ({ sizes }) => text(sizes.layout),
        rate: "gflops",
      }),
    ),
    ...by(group(all, "transformer"), ({ sizes }) => text(sizes.M)).map(
      ([M, found]): Bars => ({
        title: `Linear layers, ${M} ${M === "1" ? "row" : "rows"}`,
        found,
        facet: ({ sizes: { K, N } }) => `${K}→${N}`,
        rate: "gflops",
        width: Math.max(WIDTH, 60 + 90 * found.length),
      }),
    ),
    ...["matmul ladder", "LoRA ladder"].flatMap((name) =>
      group(all, name).map((contest): Bars => ({ title: contest.name, found: [contest], facet: size, rate: "gflops" })),
    ),
    ...by(group(all, "bandwidth"), ({ name }) => name.replace(/ \d.*/, "")).map(
      ([name, found]): Bars => ({
        title: `Bandwidth: ${name}`,
        found,
        facet: ({ sizes: { rows, columns } }) => `${rows}×${columns}`,
        rate: "gbs",
      }),
    ),
  ].map((one) => bars(one, report));
}

const LORA_GROUPS: Readonly<Record<string, string>> = {
  "lora-forward": "LoRA forward over the base product",
  "lora-backward": "LoRA backward over dX alone",
  "lora-step": "LoRA training step over training W",
};

/** Time over the baseline's, against the rank. */
function loraOverhead({ contests }: Plotted): Drawn[] {
  return Object.entries(LORA_GROUPS).flatMap(([name, heading]) =>
    by(group(contests, name), ({ sizes: { M, N, K } }) => `M=${M} N=${N} K=${K}`).map(([shape, found]) => {
      const points = found
        .flatMap(timed)
        .filter(({ one, contest }) => one.name !== contest.cases[0]?.name && Number.isFinite(one.ratio.median));
      const at = ({ contest }: Bar): number => Number(contest.sizes.r);
      const over = ({ one }: Bar): number => 1 / one.ratio.median;
      const ranks = [...new Set(points.map(at))].sort((a, b) => a - b);
      const baseline = found[0]?.cases[0]?.name ?? "";
      return {
        title: heading,
        note: `${shape}. Time over that of “${baseline}”, the dashed line.`,
        width: WIDTH,
        plot: {
          height: 260,
          marginLeft: 60,
          ariaLabel: `${heading}, ${shape}, by rank`,
          color: {
            ...colors(
              points.map(({ one }) => one.name),
              found[0]?.against ?? points[0]?.one.name,
            ),
            legend: true,
          },
          x: { type: "point", label: "rank r", domain: ranks },
          y: { grid: true, label: "time over baseline", type: "log", tickFormat: ".2~f", ticks: 6 },
          marks: [
            Plot.ruleY([1], { strokeDasharray: "4 3" }),
            Plot.line(points, { x: at, y: over, stroke: ({ one }) => one.name, z: ({ one }) => one.name }),
            Plot.dot(points, {
              x: at,
              y: over,
              fill: ({ one }) => one.name,
              title: (point) => `${told(point)}\n${over(point).toFixed(3)} of the baseline's time`,
            }),
          ],
        },
      };
    }),
  );
}

/** Time over that of f16 weights in the same contest. */
function weightFormats({ contests }: Plotted): Drawn[] {
  const found = group(contests, "weights");
  const data = found.flatMap((contest) => {
    const f16 = contest.cases.filter(isTimed).find(({ name }) => /^f16\b/.test(name));
    return f16 ? timed(contest).map((bar) => ({ ...bar, over: bar.one.ms.median / f16.ms.median })) : [];
  });
  if (data.length === 0) return [];
  const shape = ({ contest: { sizes } }: (typeof data)[number]): string => `M=${sizes.M} N=${sizes.N} K=${sizes.K}`;
  const scale = colors(data.map(({ one }) => one.name));
  return [
    {
      title: "Weight formats",
      note: "Time over that of f16 weights; below 1 is faster.",
      width: WIDTH,
      plot: {
        marginLeft: 60,
        ariaLabel: "Time by weight format over f16",
        color: scale,
        fy: { label: null, axis: null },
        y: { label: null, domain: scale.domain },
        x: { grid: true, label: "time over f16" },
        marks: [
          Plot.barX(data, {
            fy: shape,
            y: ({ one }) => one.name,
            x: "over",
            fill: ({ one }) => one.name,
            title: (bar) => `${told(bar)}\n${bar.over.toFixed(2)} of f16`,
          }),
          Plot.ruleX([1], { strokeDasharray: "4 3" }),
          Plot.axisFy({ frameAnchor: "top-left", label: null, dy: -4 }),
        ],
      },
    },
  ];
}

/** Operations per byte against operations per second, under the measured roof.                        Williams et al. 2009 */
function roofline({ contests, peaks }: Plotted): Drawn[] {
  const points = contests
    .filter((contest) => contest.group !== "probe")
    .flatMap(timedInF32)
    .filter(({ one }) => one.flops > 0 && one.bytes > 0);
  if (points.length === 0 || !peaks) return [];
  const intensity = ({ one }: Bar): number => one.flops / one.bytes;
  const who = ({ one }: Bar): string => one.peer ?? "lowrank";
  const ridge = peaks.fmaGflops / peaks.copyGbs;
  const all = points.map(intensity);
  const [from, to] = [Math.min(ridge / 4, ...all) / 1.3, Math.max(ridge * 4, ...all) * 1.3];
  const roof = [from, ridge, to].map((x) => ({ x, y: Math.min(peaks.fmaGflops, x * peaks.copyGbs) }));
  return [
    {
      title: "Roofline",
      note: `The roof is what this device was measured to do: ${short(peaks.copyGbs)} GB/s in a copy, ${short(peaks.fmaGflops)} GFLOP/s in multiply-adds. A point above it was fed by a cache. Work without multiply-adds is not in it.`,
      width: WIDE,
      plot: {
        height: 420,
        marginLeft: 60,
        marginRight: 30,
        ariaLabel: "Roofline: GFLOP/s by operations per byte",
        color: { ...colors(["lowrank", ...points.map(who)], "lowrank"), legend: true },
        x: { type: "log", label: "operations per byte", domain: [from, to], tickFormat: "~g" },
        y: { type: "log", label: "GFLOP/s", grid: true, tickFormat: "~g" },
        marks: [
          Plot.line(roof, { x: "x", y: "y", strokeWidth: 2 }),
          Plot.dot(points, {
            x: intensity,
            y: ({ one }) => one.gflops,
            stroke: who,
            fill: who,
            fillOpacity: 0.35,
            title: (point) => `${told(point)}\n${intensity(point).toPrecision(3)} operations per byte`,
          }),
        ],
      },
    },
  ];
}

/** Every row of the summary as a dot. */
function ratios({ summary: { rows, geomean } }: Plotted): Drawn[] {
  if (rows.length === 0) return [];
  const all = [1, ...rows.map(({ ratio }) => ratio)];
  const domain = [Math.min(...all) / 1.2, Math.max(...all) * 1.2];
  return [
    {
      title: "Ours against the best peer",
      note: `A dot per contest: the best peer's time over ours. Right of the dashed line we are ahead${geomean === null ? "" : `; the solid line is the geometric mean, ${short(geomean)}`}.`,
      width: WIDE,
      plot: {
        height: 70 + 2.5 * rows.length,
        ariaLabel: "The best peer's time over ours, by contest",
        color: { ...colors(rows.map(({ peer }) => peer)), legend: true },
        x: { type: "log", label: "best peer's time over ours", grid: true, tickFormat: "~g", domain },
        marks: [
          Plot.ruleX([1], { strokeDasharray: "4 3" }),
          ...(geomean === null ? [] : [Plot.ruleX([geomean], { stroke: OURS, strokeWidth: 2 })]),
          Plot.dot(
            rows,
            Plot.dodgeY("middle", {
              x: "ratio",
              fill: "peer",
              r: 5,
              title: ({ contest, ratio, peer }) => `${contest}\n${short(ratio)}× the best peer, ${peer}`,
            }),
          ),
        ],
      },
    },
  ];
}

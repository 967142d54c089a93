/** A sweep as one HTML page that needs no network and no script: a plot in parallel coordinates, and a table. */
import type { SearchPoint } from "../train/search.ts";
import { html } from "./report-page.ts";
import { number } from "./session.ts";
import type { SweepConfig } from "./sweep-config.ts";
import { byValue, type FinishedTrial } from "./sweep-files.ts";

const [WIDTH, HEIGHT, MARGIN, TOP] = [960, 360, 80, 40];

/** Texts and numbers along an upright line. */
interface Axis {
  readonly name: string;
  /** From 0, below, to 1. */
  readonly place: (value: unknown) => number;
  readonly ticks: readonly { readonly at: number; readonly label: string }[];
}

/** The page. A trial that has no value is in the table alone. */
export function sweepPage(
  { model, space }: Pick<SweepConfig, "model" | "space">,
  trials: readonly FinishedTrial[],
): string {
  const sorted = byValue(trials);
  const settings = Object.keys(space);
  const title = `Sweep of ${model}`;
  const cells = sweepTable(settings, sorted);
  const row = (tag: string, texts: readonly string[]): string =>
    `<tr>${texts.map((text) => `<${tag}>${html(text)}</${tag}>`).join("")}</tr>`;
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>${html(title)}</title>
<style>
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui;max-width:1080px;margin:2em auto;padding:0 1em}
svg{width:100%;font:12px system-ui}svg text{fill:currentColor;text-anchor:middle}svg path{fill:none;stroke-width:2;opacity:.8}
svg path:hover{stroke-width:5;opacity:1}svg line{stroke:currentColor;opacity:.4}
table{border-collapse:collapse}th,td{text-align:right;padding:.1em 1em .1em 0;font-variant-numeric:tabular-nums}
</style>
<h1>${html(title)}</h1>
${plot(
  space,
  sorted.filter(({ value }) => Number.isFinite(value)),
)}
<table>
${row("th", cells[0] ?? [])}
${cells
  .slice(1)
  .map((texts) => row("td", texts))
  .join("\n")}
</table>
</html>
`;
}

/** Names, then a line for each trial. */
export function sweepTable(settings: readonly string[], trials: readonly FinishedTrial[]): string[][] {
  const lines = trials.map(({ trial, point, value, losses, stopped, seconds }) => [
    String(trial),
    Number.isFinite(value) ? value.toFixed(4) : "none",
    ...settings.map((name) => shown(point[name])),
    String(losses.length),
    stopped ? "early" : "",
    number(seconds, 1),
  ]);
  return [["trial", "value", ...settings, "evaluations", "ended", "seconds"], ...lines];
}

const shown = (value: unknown): string =>
  typeof value === "number" ? String(Number(value.toPrecision(4))) : String(value);

/** Each trial a line through its settings to its value, from blue, the lowest, to orange (Okabe and Ito). */
function plot(space: SweepConfig["space"], trials: readonly FinishedTrial[]): string {
  if (trials.length === 0) return "<p>No trial has a value.</p>";
  const axes = [
    ...Object.entries(space).map(([name, dimension]) =>
      "values" in dimension ? choices(name, dimension.values) : range(name, dimension),
    ),
    range("value", {
      min: Math.min(...trials.map(({ value }) => value)),
      max: Math.max(...trials.map(({ value }) => value)),
    }),
  ];
  const x = (i: number): number => MARGIN + (i * (WIDTH - 2 * MARGIN)) / (axes.length - 1);
  const y = (place: number): number => HEIGHT - TOP - place * (HEIGHT - 2 * TOP);
  const line = ({ trial, point, value }: FinishedTrial): string => {
    const values: SearchPoint = { ...point, value };
    const at = axes.map(({ name, place }, i) => `${x(i).toFixed(1)},${y(place(values[name])).toFixed(1)}`);
    const colour = mixed(axes.at(-1)?.place(value) ?? 0);
    return `<path d="M${at.join("L")}" stroke="${colour}"><title>trial ${trial}: ${value.toFixed(4)}</title></path>`;
  };
  const upright = ({ name, ticks }: Axis, i: number): string =>
    [
      `<line x1="${x(i)}" x2="${x(i)}" y1="${y(0)}" y2="${y(1)}"/><text x="${x(i)}" y="${TOP / 2}">${html(name)}</text>`,
      ...ticks.map(({ at, label }) => `<text x="${x(i)}" y="${y(at) + (at < 0.5 ? 16 : -4)}">${html(label)}</text>`),
    ].join("");
  return `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="settings and value of each trial">
${axes.map(upright).join("\n")}
${trials.toReversed().map(line).join("\n")}
</svg>`;
}

function choices(name: string, values: readonly unknown[]): Axis {
  const place = (value: unknown): number => (values.length > 1 ? values.indexOf(value) / (values.length - 1) : 0.5);
  return { name, place, ticks: values.map((value) => ({ at: place(value), label: shown(value) })) };
}

function range(
  name: string,
  { min, max, log }: { readonly min: number; readonly max: number; readonly log?: boolean },
): Axis {
  const scale = (value: number): number => (log ? Math.log(value) : value);
  const place = (value: unknown): number =>
    max > min ? (scale(Number(value)) - scale(min)) / (scale(max) - scale(min)) : 0.5;
  return { name, place, ticks: [...new Set([min, max])].map((end) => ({ at: place(end), label: shown(end) })) };
}

function mixed(share: number): string {
  const [low, high] = [
    [0, 114, 178],
    [213, 94, 0],
  ] as const;
  return `rgb(${low.map((part, i) => Math.round(part + share * ((high[i] ?? 0) - part))).join(" ")})`;
}

/** A training run as one HTML page that needs no network: `report.html` beside the adapter. Curves are drawn by uPlot, which is put into the page. */
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import type { RatePoint } from "../train/find-learning-rate.ts";

/** A row of a table: what it is and what it says. */
export type Fact = readonly [name: string, value: string];

export interface RunReport {
  readonly title: string;
  readonly facts: readonly Fact[];
  /** Of each step, the fields that are numbers; `step` is one of them. */
  readonly metrics: readonly Readonly<Record<string, unknown>>[];
  /** Smoothed losses of steps at ever higher learning rates. */
  readonly rates?: readonly RatePoint[] | undefined;
  /** Of each evaluation, likewise. */
  readonly validation: readonly Readonly<Record<string, unknown>>[];
  /** Frobenius norm of s·B·A of each adapted module. */
  readonly norms: readonly { readonly module: string; readonly norm: number }[];
  /** What the model made of a prompt after a step. */
  readonly samples: readonly { readonly step: number; readonly prompt: string; readonly text: string }[];
  /** More tables by their headings. */
  readonly tables: Readonly<Record<string, readonly Fact[]>>;
  /** Longer texts by their headings, such as the profile or the configuration. */
  readonly texts: Readonly<Record<string, string>>;
}

interface Curve {
  readonly label: string;
  readonly unit?: string;
  /** Steps and values; null where there is none. */
  readonly steps: readonly number[];
  readonly values: readonly (number | null)[];
}

interface Chart {
  readonly title: string;
  /** In place of the step, on a logarithmic axis. */
  readonly x?: string;
  readonly curves: readonly Curve[];
}

/** The page. Nothing in it is fetched. */
export async function reportPage(report: RunReport): Promise<string> {
  const charts = chartsOf(report);
  const [script, style] = await plotter();
  const json = JSON.stringify(charts).replaceAll("<", "\\u003c");
  return `<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>${html(report.title)}</title>
<style>${style}${STYLE}</style>
<h1>${html(report.title)}</h1>
${table(report.facts)}
<div id="charts">${charts.map(({ title }) => `<figure><figcaption>${html(title)}</figcaption></figure>`).join("")}</div>
<noscript><p>The curves need JavaScript. Their numbers are in metrics.jsonl.</p></noscript>
${section("Norm of the update, by module", normBars(report.norms))}
${section("Samples", report.samples.map(sample).join("\n"))}
${Object.entries(report.tables)
  .map(([heading, facts]) => section(heading, facts.length > 0 ? table(facts) : ""))
  .join("\n")}
${Object.entries(report.texts)
  .map(([heading, text]) => section(heading, text === "" ? "" : `<pre>${html(text)}</pre>`))
  .join("\n")}
<script>${LANGUAGE}${script}</script>
<script>const charts = ${json};
${DRAW}</script>
</html>
`;
}

const STYLE = `
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui;max-width:1080px;margin:2em auto;padding:0 1em}
#charts{margin:1.5em 0;display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1em}
figure{margin:0}figcaption{font-weight:600}
table{border-collapse:collapse}th{text-align:left;font-weight:400;opacity:.7;padding-right:1.5em;vertical-align:top}
pre{overflow:auto;padding:1em;background:#8881;white-space:pre-wrap}
.bar{display:grid;grid-template-columns:24em 1fr 5em;gap:.5em;font:12px ui-monospace,monospace}
.bar i{background:#3b82f6;height:.8em;align-self:center}
.u-legend{font-size:12px}`;

/** Chromium's language in the POSIX locale is "en-US@posix", which no number can be formatted in: uPlot would throw. */
const LANGUAGE = `
try { new Intl.NumberFormat(navigator.language) } catch { Object.defineProperty(navigator, "language", { value: "en" }) }
`;

/** Draws each chart into its figure, as wide as that is. Colours that are told apart by most people with a colour vision deficiency (Okabe and Ito). */
const DRAW = `
const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"];
const ink = getComputedStyle(document.body).color;
document.querySelectorAll("#charts figure").forEach((figure, i) => {
  const { curves, x } = charts[i];
  const steps = [...new Set(curves.flatMap((curve) => curve.steps))].sort((a, b) => a - b);
  const data = curves.map((curve) => {
    const values = new Map(curve.steps.map((step, at) => [step, curve.values[at]]));
    return steps.map((step) => values.get(step) ?? undefined);
  });
  const axis = { stroke: ink, grid: { stroke: "#8883" }, ticks: { stroke: "#8883" } };
  new uPlot({
    width: figure.clientWidth, height: 260, scales: { x: { time: false, distr: x ? 3 : 1 } }, axes: [axis, { ...axis, size: 70 }],
    series: [{ label: x ?? "step" }, ...curves.map(({ label, steps: own }, at) => ({
      label, stroke: colours[at], width: 1.5, spanGaps: true, points: { show: own.length < 60 },
    }))],
  }, [steps, ...data], figure);
});`;

function chartsOf({ metrics, validation, rates = [] }: RunReport): Chart[] {
  const sweep = {
    label: "smoothed",
    steps: rates.map((point) => point.learningRate),
    values: rates.map(({ loss }) => loss),
  };
  const curve = (label: string, rows: RunReport["metrics"], key: string): Curve[] => {
    const known = rows.filter((row) => typeof row.step === "number" && key in row);
    const values = known.map((row) => (Number.isFinite(row[key]) ? (row[key] as number) : null));
    return known.length > 0 ? [{ label, steps: known.map(({ step }) => step as number), values }] : [];
  };
  const charts: Chart[] = [
    { title: "Loss", curves: [...curve("training", metrics, "loss"), ...curve("validation", validation, "loss")] },
    { title: "Learning rate", curves: curve("learning rate", metrics, "learning_rate") },
    { title: "Gradient norm", curves: curve("gradient norm", metrics, "grad_norm") },
    { title: "Tokens per second", curves: curve("tokens per second", metrics, "tokens_per_second") },
    { title: "Accuracy", curves: curve("validation", validation, "accuracy") },
  ];
  if (rates.length > 0) charts.push({ title: "Loss over learning rates", x: "learning rate", curves: [sweep] });
  return charts.filter(({ curves }) => curves.length > 0);
}

/** uPlot as a script, and its style. */
function plotter(): Promise<[script: string, style: string]> {
  const { resolve } = createRequire(import.meta.url);
  const read = (file: string): Promise<string> => readFile(resolve(`uplot/dist/${file}`), "utf8");
  return Promise.all([read("uPlot.iife.min.js"), read("uPlot.min.css")]);
}

export const html = (text: string): string => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

const section = (heading: string, content: string): string =>
  content === "" ? "" : `<h2>${html(heading)}</h2>\n${content}`;

const table = (facts: readonly Fact[]): string =>
  `<table>${facts.map(([name, value]) => `<tr><th>${html(name)}</th><td>${html(value)}</td></tr>`).join("\n")}</table>`;

function normBars(norms: RunReport["norms"]): string {
  const most = Math.max(...norms.map(({ norm }) => norm)) || 1;
  const bar = ({ module, norm }: RunReport["norms"][number]): string =>
    `<div class="bar"><span>${html(module)}</span><i style="width:${((100 * norm) / most).toFixed(1)}%"></i><span>${norm.toPrecision(3)}</span></div>`;
  return norms.map(bar).join("\n");
}

const sample = ({ step, prompt, text }: RunReport["samples"][number]): string =>
  `<h3>After step ${step}</h3><pre><b>${html(prompt)}</b>${html(text)}</pre>`;

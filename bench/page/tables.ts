/** The tables of a report, the same in the page and in the file of `npm run bench:report`. */
import type { Tuning } from "../../src/gpu/tuner.ts";
import type { CaseReport, CaseResult, Peaks, Spread } from "../harness.ts";
import type { ContestReport, PeerReport, ReplayReport, ReportHeader } from "../run.ts";
import type { Summary } from "../summary.ts";
import { type Html, html } from "./html.ts";

export const isTimed = (one: CaseReport): one is CaseResult => "ms" in one;

/** Three digits, or all before the point; "–" for what is not a number (JSON has null for NaN). */
export function short(value: number | null | undefined): string {
  if (typeof value !== "number" || !Number.isFinite(value)) return "–";
  return value < 999.5 ? value.toPrecision(3) : value.toFixed(0);
}

const range = ({ p10, p90 }: Spread): string => `${short(p10)} – ${short(p90)}`;
const times = (value: number | null): string => (short(value) === "–" ? "–" : `${short(value)}×`);
const percent = (share: number): string => `${short(100 * share)} %`;

/** The device and the conditions. `more` are further pairs of a name and a text. */
export function headerList(header: ReportHeader, more: readonly (readonly [string, string | Html])[] = []): Html {
  const { quick, full, peers, only } = header.options;
  const sizes = quick ? "quick: shows that everything works, not how fast it is" : full ? "all" : "default";
  const pairs: readonly (readonly [string, string | Html])[] = [
    ["Runtime", header.runtime],
    ["Adapter", adapterName(header)],
    ...(header.adapter.isSoftware ? [["", "A software adapter: says nothing about any GPU"] as const] : []),
    ["Date", header.date],
    ["Sizes", sizes],
    ["Peers", peers ? "asked for" : "not asked for"],
    ...(only.length > 0 ? [["Only", only.join(", ")] as const] : []),
    [
      "Waiting for the device",
      `${short(header.syncMs)} ms; a repetition lasts at least ${short(header.minBatchMs)} ms`,
    ],
    ...more,
  ];
  return html`<dl class="header">${pairs.map(([name, text]) => html`<dt>${name}</dt><dd>${text}</dd>`)}</dl>`;
}

export function adapterName({ adapter }: Pick<ReportHeader, "adapter">): string {
  const { vendor, architecture, device, description, isSoftware } = adapter;
  const name = [vendor, architecture, device, description].filter(Boolean).join(" · ") || "unnamed";
  return isSoftware ? `${name} (software)` : name;
}

export function peaksText(peaks: Peaks | null): string {
  if (!peaks) return "not measured: the probes failed";
  return `${short(peaks.fmaGflops)} GFLOP/s in f32 multiply-adds, ${short(peaks.copyGbs)} GB/s in a copy`;
}

export const replayText = ({
  hostUs,
  dispatches,
  submits,
  objectsCreated,
  readbacks,
  peakOverPlan,
}: ReplayReport): string =>
  `${hostUs.replayed.toFixed(2)} µs of host time per dispatch, ${hostUs.eager.toFixed(2)} encoded anew; a training step of ${dispatches} dispatches is ${submits} submit, makes ${objectsCreated} GPU objects, reads ${readbacks} times; peak over plan ${peakOverPlan.toFixed(4)}`;

export function peersTable(peers: readonly PeerReport[]): Html {
  const rows = peers.map(
    ({ name, version, ok, reason }) =>
      html`<tr><th scope="row">${name}</th><td>${version || "–"}</td><td>${ok ? "takes part" : `not measured: ${reason ?? "no reason given"}`}</td></tr>`,
  );
  return scrolled(
    html`<table class="text"><caption>Peers</caption><thead><tr><th scope="col">peer</th><th scope="col">version</th><th scope="col">status</th></tr></thead><tbody>${rows}</tbody></table>`,
  );
}

const GROUPS: Readonly<Record<string, string>> = {
  probe: "Probes of the peaks",
  matmul: "Square matrix products",
  transformer: "Linear layers of transformers",
  weights: "Weight formats",
  half: "Half precision",
  "lora-forward": "LoRA, forward",
  "lora-backward": "LoRA, backward",
  "lora-step": "LoRA, forward and backward",
  "mixed-batch": "Rows with adapters of their own",
  "paged-attention": "Attention over keys in pages",
  "mixed-places": "More adapters than places",
  "llama-step": "A training step of LoRA",
  "llama-full-step": "A training step of all weights, and of LoRA",
  "llama-dora-step": "A training step of LoRA, and of DoRA",
  "llama-nf4-step": "A training step on weights in f16, and in NF4",
  "lanes-step": "A training step of several adapters, one after the other and in one batch",
  bandwidth: "Elementwise and reductions",
};

const COLUMNS = ["ms", "p10 – p90", "GFLOP/s", "GB/s", "share of peak", "dispatches", "over baseline", "p10 – p90"];

/** The table of a group of contests; `bodies` come from `contestBody`. */
export function groupTable(group: string, bodies: readonly Html[]): Html {
  return scrolled(
    html`<table data-group="${group}"><caption>${GROUPS[group] ?? group}</caption><thead><tr><th scope="col">case</th>${COLUMNS.map((name) => html`<th scope="col">${name}</th>`)}<th scope="col">ours over it</th></tr></thead>${bodies}</table>`,
  );
}

export function contestBody(contest: ContestReport): Html {
  const span = COLUMNS.length + 2;
  const ours = contest.cases.filter(isTimed).find(({ name }) => name === contest.against);
  const rows = contest.cases.map((one) => caseRow(one, ours));
  const reason = contest.error ?? contest.skipped;
  const failure = reason === undefined ? [] : [html`<tr>${notMeasured(reason, span)}</tr>`];
  return html`<tbody><tr><th scope="rowgroup" colspan="${span}">${contest.name}</th></tr>${rows}${failure}</tbody>`;
}

function caseRow(one: CaseReport, ours: CaseResult | undefined): Html {
  const head = html`<th scope="row">${one.name}</th>`;
  if (!isTimed(one)) return html`<tr class="peer">${head}${notMeasured(one.error, COLUMNS.length + 1)}</tr>`;
  const { ms, gflops, gbs, limit, shareOfPeak, dispatches, ratio, peer, flops } = one;
  const cells = [
    short(ms.median),
    range(ms),
    flops > 0 ? short(gflops) : "–",
    short(gbs),
    shareOfPeak === undefined ? "–" : `${percent(shareOfPeak)} ${limit ?? ""}`,
    dispatches === undefined ? "–" : `${dispatches}`,
    times(ratio.median),
    range(ratio),
    peer !== undefined && ours ? times(ms.median / ours.ms.median) : "",
  ];
  return html`<tr class="${one === ours ? "ours" : peer === undefined ? "own" : "peer"}">${head}${cells.map((cell) => html`<td>${cell}</td>`)}</tr>`;
}

const notMeasured = (reason: string, span: number): Html =>
  html`<td class="reason" colspan="${span}">not measured: ${reason}</td>`;

export function summaryTable({ rows, ahead, geomean }: Summary): Html {
  if (rows.length === 0) return html`<p>Ours against the peers: not measured, no peer gave a right result.</p>`;
  const body = rows.map(
    ({ contest, ours, ms, peer, peerMs, ratio }) =>
      html`<tr class="${ratio > 1 ? "ahead" : "behind"}"><th scope="row">${contest}</th><td>${ours}</td><td>${short(ms)}</td><td>${peer}</td><td>${short(peerMs)}</td><td>${times(ratio)}</td></tr>`,
  );
  const head = ["contest", "ours", "ms", "best peer", "its ms", "ours over it"];
  return html`<p>Ahead of the best peer in ${ahead} of ${rows.length} rows; geometric mean ${times(geomean)}.</p>${scrolled(
    html`<table><caption>Ours against the best peer</caption><thead><tr>${head.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead><tbody>${body}</tbody></table>`,
  )}`;
}

/** Default against tuned plans: the first candidate of a tuning is the default. */
export function tuningsTable(tunings: readonly Tuning[]): Html {
  const rows = tunings.map(({ key, chosen, timesMs }) => {
    const [first = "", ms = Number.NaN] = Object.entries(timesMs)[0] ?? [];
    const best = timesMs[chosen] ?? Number.NaN;
    return html`<tr><th scope="row">${key}</th><td>${first}</td><td>${short(ms)}</td><td>${chosen}</td><td>${short(best)}</td><td>${times(ms / best)}</td></tr>`;
  });
  const head = ["class of shapes", "default plan", "ms", "tuned plan", "ms", "tuned over default"];
  return scrolled(
    html`<table><caption>Plans</caption><thead><tr>${head.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead><tbody>${rows}</tbody></table>`,
  );
}

/** Wide tables scroll on their own; a box that scrolls must be reachable by keyboard. */
const scrolled = (table: Html): Html => html`<div class="scroll" tabindex="0">${table}</div>`;

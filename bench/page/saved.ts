/** Saved reports as one HTML document that needs nothing from outside. */
import type { Tuning } from "../../src/gpu/tuner.ts";
import type { ContestReport, SavedReport } from "../run.ts";
import { charts, type Plotted } from "./charts.ts";
import { Html, html } from "./html.ts";
import {
  adapterName,
  contestBody,
  groupTable,
  headerList,
  peaksText,
  peersTable,
  replayText,
  summaryTable,
  tuningsTable,
} from "./tables.ts";

/** A report and the file it came from. `bench/gpu.ts` adds what the tuner found. */
export interface Source {
  readonly file: string;
  readonly report: SavedReport & { readonly tunings?: readonly Tuning[] };
}

/** A section per report. `document` makes the plots: a browser's, or a stand-in for one. */
export function savedReports(sources: readonly Source[], document: Document, style: string): string {
  const title = "lowrank: benchmarks";
  const links = sources.map(
    ({ report }, i) => html`<li><a href="#report-${i}">${adapterName(report)}, ${report.runtime}</a></li>`,
  );
  return html`<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${title}</title>
<style>${new Html(style)}</style>
</head>
<body>
<main>
<h1>${title}</h1>
<p>Medians of repetitions in which all cases of a contest took turns. What is measured and how: bench/README.md.</p>
<nav aria-label="Reports"><ul>${links}</ul></nav>
${sources.map((source, i) => section(source, i, document))}
</main>
</body>
</html>
`.text;
}

function section({ file, report }: Source, i: number, document: Document): Html {
  const more = [
    ["Peaks", peaksText(report.peaks)],
    ...(report.replay ? [["Replayed steps", replayText(report.replay)] as const] : []),
    ["Command", html`<code>${report.command}</code>`],
    ["Commit", html`<code>${report.commit}</code>`],
    ["File", html`<code>${file}</code>`],
    ...(report.ok ? [] : [["Failed", "A contest failed or none was found: see the tables"] as const]),
  ] as const;
  const { peers, summary, tunings = [] } = report;
  return html`<section id="report-${i}" aria-labelledby="heading-${i}">
<h2 id="heading-${i}">${adapterName(report)}, ${report.runtime}</h2>
${headerList(report, more)}
${peers.length > 0 ? peersTable(peers) : []}
${figures(report, document)}
${report.options.peers ? summaryTable(summary) : []}
<h3>All contests</h3>
${byGroup(report.contests).map(([group, contests]) => groupTable(group, contests.map(contestBody)))}
${tunings.length > 0 ? tuningsTable(tunings) : []}
</section>`;
}

/** All plots, each with its heading and what it shows. */
export function figures(report: Plotted, document: Document): Html {
  const found = charts(report, document).map(
    ({ title, note, width, markup }) =>
      html`<figure class="chart" style="width: ${width}px"><figcaption><strong>${title}</strong> ${note}</figcaption>${new Html(markup)}</figure>`,
  );
  return html`<div class="charts">${found}</div>`;
}

function byGroup(contests: readonly ContestReport[]): [string, ContestReport[]][] {
  const groups = new Map<string, ContestReport[]>();
  for (const contest of contests) groups.set(contest.group, [...(groups.get(contest.group) ?? []), contest]);
  return [...groups];
}

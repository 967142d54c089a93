// The benchmarks as a page that a person opens. scripts/bench-page.ts builds and serves it.
import { type ContestReport, type Progress, type ReportHeader, runBenchmarks, type SavedReport } from "../run.ts";
import type { Html } from "./html.ts";
import { figures } from "./saved.ts";
import { adapterName, contestBody, groupTable, headerList, peaksText, peersTable, summaryTable } from "./tables.ts";

/** What was built; put in by esbuild. */
declare const COMMIT: string;

function element<T extends HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`page: no element #${id}`);
  return found as T;
}

const form = element<HTMLFormElement>("form");
const choices = element<HTMLFieldSetElement>("choices");
const bar = element<HTMLProgressElement>("bar");
const status = element("status");
const keep = element("keep");
const [head, peers, summary, plots, tables] = [
  element("head"),
  element("peers"),
  element("summary"),
  element("plots"),
  element("tables"),
];

let saved: SavedReport | undefined;

globalThis.readRepoFile = async (path) => {
  const response = await fetch(new URL(path, document.baseURI));
  if (!response.ok) throw new Error(`${path}: HTTP ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
};

form.addEventListener("submit", (event) => {
  event.preventDefault();
  void run();
});
element("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(json());
    status.textContent = "Copied.";
  } catch (error) {
    status.textContent = `Not copied: ${String(error)}. Use “Download JSON”.`;
  }
});
element("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([json()], { type: "application/json" }));
  link.download = `page-${saved ? adapterName(saved).replace(/\W+/g, "-").replace(/^-|-$/g, "") : "none"}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
});
takeParameters();
void findAdapter();

function json(): string {
  return `${JSON.stringify(saved, undefined, 2)}\n`;
}

/** `?size=quick&peers&only=NAME` fills in the form. */
function takeParameters(): void {
  const parameters = new URLSearchParams(location.search);
  const size = parameters.get("size");
  for (const radio of form.querySelectorAll<HTMLInputElement>("[name=size]")) radio.checked ||= radio.value === size;
  for (const box of form.querySelectorAll<HTMLInputElement>("[name=peers]")) box.checked = parameters.has("peers");
  for (const text of form.querySelectorAll<HTMLInputElement>("[name=only]")) text.value = parameters.get("only") ?? "";
}

async function findAdapter(): Promise<void> {
  const line = element("adapter");
  const adapter = await navigator.gpu?.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) {
    line.className = "failure";
    line.textContent = whatIsMissing();
    return;
  }
  const { vendor, architecture, device, description } = adapter.info;
  line.textContent = `GPU: ${[vendor, architecture, device, description].filter(Boolean).join(" · ") || "unnamed"}`;
  choices.disabled = false;
}

function whatIsMissing(): string {
  if (!isSecureContext)
    return `Browsers give WebGPU to https pages and to localhost only; this page is ${location.origin}. Open it from there.`;
  if (!navigator.gpu)
    return "This browser has no WebGPU. Use Chrome or Edge 121 or later; on Linux start it with --enable-unsafe-webgpu --enable-features=Vulkan.";
  return "This browser has WebGPU but gives no adapter. Turn on graphics acceleration in its settings, update the graphics driver, and see what chrome://gpu says of WebGPU.";
}

async function run(): Promise<void> {
  const chosen = new FormData(form);
  const only = String(chosen.get("only") ?? "").trim();
  const options = {
    quick: chosen.get("size") === "quick",
    full: chosen.get("size") === "full",
    peers: chosen.has("peers"),
    only: only === "" ? [] : [only],
  };
  choices.disabled = true;
  keep.hidden = true;
  for (const part of [head, peers, summary, plots, tables]) part.replaceChildren();
  try {
    const report = await runBenchmarks(options, show);
    saved = { command: location.href, commit: COMMIT, ...report };
    // Not before the end, so that nothing is drawn while something is measured.
    put(plots, figures(report, document));
    keep.hidden = false;
    status.textContent = report.ok ? "Done." : "Done, but a contest failed or none has that name: see below.";
  } catch (error) {
    status.textContent = String(error);
  }
  bar.hidden = true;
  choices.disabled = false;
}

let header: ReportHeader | undefined;

function show(event: Progress): void {
  if (event.kind === "start") {
    header = event.header;
    bar.hidden = false;
    bar.value = 0;
    bar.max = event.contests;
    put(head, headerList(header));
  } else if (event.kind === "contest") {
    bar.value = event.index;
    status.textContent = `${event.index + 1} of ${bar.max}: ${event.name}`;
  } else if (event.kind === "peers") put(peers, peersTable(event.peers));
  else if (event.kind === "peaks" && header) put(head, headerList(header, [["Peaks", peaksText(event.peaks)]]));
  else if (event.kind === "result") addContest(event.report);
  else if (event.kind === "summary" && event.summary.rows.length > 0) put(summary, summaryTable(event.summary));
}

function addContest(contest: ContestReport): void {
  const body = contestBody(contest);
  const table = tables.querySelector(`table[data-group="${CSS.escape(contest.group)}"]`);
  if (table) table.insertAdjacentHTML("beforeend", body.text);
  else tables.insertAdjacentHTML("beforeend", groupTable(contest.group, [body]).text);
}

const put = (part: HTMLElement, content: Html): void => {
  part.innerHTML = content.text;
};

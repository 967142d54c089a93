import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseHTML } from "linkedom";
import { expect, test } from "vitest";
import { SoFar, type TorchReport, torchShapes, withTorch } from "../../bench/gpu-report.ts";
import type { CaseResult } from "../../bench/harness.ts";
import { charts } from "../../bench/page/charts.ts";
import { html } from "../../bench/page/html.ts";
import { type Source, savedReports } from "../../bench/page/saved.ts";
import { short } from "../../bench/page/tables.ts";
import type { ContestReport, Progress } from "../../bench/run.ts";
import { summarize } from "../../bench/summary.ts";

const NASTY = `<img src=x onerror="alert('1')">&`;
const NASTY_ESCAPED = "&lt;img src=x onerror=&quot;alert(&#39;1&#39;)&quot;&gt;&amp;";

function timed(name: string, ms: number, more: Partial<CaseResult> = {}): CaseResult {
  const [flops, bytes] = [2e9, 1e7];
  return {
    name,
    flops,
    bytes,
    batch: 1,
    repetitions: 15,
    ms: { median: ms, p10: ms * 0.9, p90: ms * 1.2 },
    gflops: flops / ms / 1e6,
    gbs: bytes / ms / 1e6,
    ratio: { median: 1, p10: 1, p90: 1 },
    ...more,
  };
}

function report(contests: readonly ContestReport[]): Source["report"] {
  return {
    ok: true,
    command: "npm run bench -- --json a",
    commit: "abc",
    date: "2026-01-02T03:04:05.678Z",
    runtime: "Node 20",
    adapter: { vendor: "v", architecture: "a", device: "", description: NASTY, isSoftware: true },
    options: { quick: false, full: false, peers: true, only: [] },
    syncMs: 0.1,
    minBatchMs: 20,
    peaks: { fmaGflops: 1000, copyGbs: 100 },
    peers: [
      { name: "tfjs", version: "4", ok: true },
      { name: "jax-js", version: "", ok: false, reason: NASTY },
    ],
    contests,
    summary: summarize(contests),
  };
}

const MATMUL: ContestReport = {
  name: "matmul nt 1000³",
  group: "matmul",
  sizes: { layout: "nt", M: 1000, N: 1000, K: 1000 },
  against: "lowrank",
  cases: [
    timed("lowrank", 2, { dispatches: 1, limit: "compute", shareOfPeak: 0.75 }),
    timed("tfjs", 5, { peer: "tfjs", ratio: { median: 0.4, p10: 0.39, p90: 0.41 } }),
    { name: "ort-web", peer: "ort-web", error: NASTY },
  ],
};

const lora = (r: number, over: number): ContestReport => ({
  name: `LoRA r=${r}`,
  group: "lora-forward",
  sizes: { M: 1, N: 2, K: 3, r },
  against: "LoRA",
  cases: [timed("base", 2), timed("LoRA", 2 * over, { ratio: { median: 1 / over, p10: 1 / over, p90: 1 / over } })],
});

const { document } = parseHTML("<html></html>");
const page = (contests: readonly ContestReport[]) => {
  const text = savedReports([{ file: "bench/results/a.json", report: report(contests) }], document, "");
  return { text, page: parseHTML(text).document };
};
const cells = (row: Element | undefined): string[] => [...(row?.children ?? [])].map((cell) => cell.textContent ?? "");

test("html escapes what is put in, but not html itself or lists of it", () => {
  expect(html`<p title="${NASTY}">${[html`<b>${1}</b>`, html`<i>${"<"}</i>`]}</p>`.text).toBe(
    `<p title="${NASTY_ESCAPED}"><b>1</b><i>&lt;</i></p>`,
  );
});

test("short keeps three digits, or all before the point, and has a dash for what is not a number", () => {
  expect([0.0012345, 1.5, 999.9, 12345.6, Number.NaN, null, undefined].map(short)).toEqual([
    "0.00123",
    "1.50",
    "1000",
    "12346",
    "–",
    "–",
    "–",
  ]);
});

test("a saved report tells the device, the conditions and the peaks", () => {
  const { page: shown } = page([MATMUL]);
  const list = [...shown.querySelectorAll("dl.header > *")].map((part) => part.textContent);
  const pairs = Object.fromEntries(list.flatMap((text, i) => (i % 2 === 0 ? [[text, list[i + 1]]] : [])));
  expect(pairs).toMatchObject({
    Runtime: "Node 20",
    Adapter: `v · a · ${NASTY} (software)`,
    Date: "2026-01-02T03:04:05.678Z",
    Sizes: "default",
    Peaks: "1000 GFLOP/s in f32 multiply-adds, 100 GB/s in a copy",
    Command: "npm run bench -- --json a",
    Commit: "abc",
    File: "bench/results/a.json",
  });
});

test("a case is a row with its median, spread, rates, share of peak, ratio and what ours is over it", () => {
  const { page: shown } = page([MATMUL]);
  const rows = [...shown.querySelectorAll("table[data-group=matmul] tbody tr")];
  expect(rows.map(cells)).toEqual([
    ["matmul nt 1000³"],
    ["lowrank", "2.00", "1.80 – 2.40", "1000", "5.00", "75.0 % compute", "1", "1.00×", "1.00 – 1.00", ""],
    ["tfjs", "5.00", "4.50 – 6.00", "400", "2.00", "–", "–", "0.400×", "0.390 – 0.410", "2.50×"],
    ["ort-web", `not measured: ${NASTY}`],
  ]);
  const summary = [...shown.querySelectorAll("table")].find((table) =>
    /best peer/.test(table.querySelector("caption")?.textContent ?? ""),
  );
  expect(cells(summary?.querySelector("tbody tr") ?? undefined)).toEqual([
    "matmul nt 1000³",
    "lowrank",
    "2.00",
    "tfjs",
    "5.00",
    "2.50×",
  ]);
});

test("what was not measured says why, and is in no plot", () => {
  const skipped = { ...MATMUL, cases: [], skipped: "too large" };
  const failed = { ...MATMUL, cases: [], error: "wrong y" };
  const { page: shown } = page([skipped, failed]);
  const reasons = [...shown.querySelectorAll("td.reason")].map((cell) => cell.textContent);
  expect(reasons).toEqual(["not measured: too large", "not measured: wrong y"]);
  expect(shown.querySelectorAll(".chart").length).toBe(0);
  expect(shown.querySelector("section")?.textContent).toContain("not measured, no peer gave a right result");
});

test("no text of a report becomes markup, and the page asks for nothing from outside", () => {
  const { text, page: shown } = page([{ ...MATMUL, name: NASTY }, lora(4, 1.1)]);
  expect(text).not.toContain("<img");
  expect(shown.querySelectorAll("img, script, link, iframe").length).toBe(0);
  expect(text).not.toMatch(/(?:src|href)\s*=\s*"(?!#)|url\(|@import/);
});

test("bars of a size are as high as the rates, one facet per layout", () => {
  const [bars] = charts(report([MATMUL, { ...MATMUL, sizes: { ...MATMUL.sizes, layout: "nn" } }]), document);
  expect(bars?.title).toBe("Matrix product 1000³");
  const drawn = parseHTML(`<html><body>${bars?.markup}</body></html>`).document;
  const heights = [...drawn.querySelectorAll("[aria-label=bar] rect")].map((bar) => Number(bar.getAttribute("height")));
  expect(heights.length).toBe(4);
  expect(heights[0]).toBeGreaterThan(100);
  expect((heights[0] ?? 0) / (heights[1] ?? 0)).toBeCloseTo(2.5, 5);
  expect(drawn.querySelector("[aria-label=bar] rect title")?.textContent).toBe(
    "matmul nt 1000³\nlowrank: 2.00 ms, 1000 GFLOP/s, 5.00 GB/s",
  );
});

test("LoRA's overhead is drawn over the rank, half precision is left out, the roof is the measured one", () => {
  const half = { ...MATMUL, cases: [...MATMUL.cases, timed("torch bf16", 0.01, { peer: "torch" })] };
  const found = charts(report([half, lora(16, 1.02), lora(4, 1.01)]), document);
  expect(found.map(({ title }) => title)).toEqual([
    "Matrix product 1000³",
    "LoRA forward over the base product",
    "Roofline",
    "Ours against the best peer",
  ]);
  expect(found.map(({ markup }) => markup.includes("torch bf16"))).toEqual([false, false, false, true]);
  const points = [...(found[1]?.markup ?? "").matchAll(/(\S+) of the baseline's time/g)].map(([, over]) => over);
  expect(points).toEqual(["1.020", "1.010"]);
  expect(found[2]?.note).toContain("100 GB/s in a copy, 1000 GFLOP/s");
});

test("without peaks there is no roofline, and a missing ratio (null in JSON) is a dash and no point", () => {
  const nothing = { median: null, p10: null, p90: null } as unknown as CaseResult["ratio"];
  const [base, low] = lora(4, 1.5).cases as [CaseResult, CaseResult];
  const contest = { ...lora(4, 1.5), cases: [base, { ...low, ratio: nothing }] };
  const found = charts({ ...report([contest]), peaks: null }, document);
  expect(found.map(({ title }) => title)).toEqual(["LoRA forward over the base product"]);
  expect(found[0]?.markup).not.toContain("<circle");
  const { page: shown } = page([contest]);
  expect(cells([...shown.querySelectorAll("table[data-group=lora-forward] tbody tr")].at(-1)).slice(7)).toEqual([
    "–",
    "– – –",
    "",
  ]);
});

test("weight formats are drawn against f16 of the same contest", () => {
  const weights = (cases: readonly CaseResult[]): ContestReport => ({
    name: "weights",
    group: "weights",
    sizes: { M: 1, N: 2, K: 3 },
    cases,
  });
  const [drawn] = charts(report([weights([timed("f16", 4), timed("nf4", 1)])]), document);
  expect(drawn?.title).toBe("Weight formats");
  expect(drawn?.markup).toContain("0.25 of f16");
  const titles = charts(report([weights([timed("f32", 4)])]), document).map(({ title }) => title);
  expect(titles).toEqual(["Roofline"]);
});

test("bench:report makes a page of a directory, and says what is wrong with it otherwise", () => {
  const directory = mkdtempSync(join(tmpdir(), "lowrank-report-"));
  const out = join(directory, "made/report.html");
  const run = () => {
    const args = ["--import", "tsx", "bench/report.ts", "--in", directory, "--out", out];
    const { status, stdout, stderr } = spawnSync(process.execPath, args, { encoding: "utf8" });
    return { status, stdout, stderr };
  };
  expect(run()).toEqual({
    status: 1,
    stdout: "",
    stderr: `bench:report: ${directory} must hold reports, got no .json file. Make one: npm run bench -- --json NAME.json\n`,
  });
  writeFileSync(join(directory, "b.json"), "[1");
  expect(run().stderr).toBe(
    `bench:report: ${join(directory, "b.json")} must be a report of npm run bench -- --json, got something else\n`,
  );
  writeFileSync(join(directory, "b.json"), JSON.stringify(report([MATMUL])));
  writeFileSync(join(directory, "a.json"), JSON.stringify(report([lora(4, 1.1)])));
  expect(run()).toEqual({ status: 0, stdout: `${out}: 2 reports\n`, stderr: "" });
  const shown = parseHTML(readFileSync(out, "utf8")).document;
  expect([...shown.querySelectorAll("section")].map((part) => part.id)).toEqual(["report-0", "report-1"]);
  expect(shown.querySelector("#report-0 table[data-group=lora-forward]")).not.toBeNull();
});

test("PyTorch's times become rows of the products they belong to, and of nothing else", () => {
  const before = report([MATMUL, lora(4, 1.1), { ...MATMUL, name: "failed", cases: [], error: "wrong" }]);
  expect(torchShapes(before)).toEqual([{ layout: "nt", M: 1000, N: 1000, K: 1000 }]);
  const shape = { layout: "nt", M: 1000, N: 1000, K: 1000 };
  const { name: _, ratio: __, ...times } = timed("", 0.5);
  const torch: TorchReport = {
    version: "2.9",
    device: "H100",
    cases: [
      { dtype: "f32", shape, ...times },
      { dtype: "bf16", shape, error: "OutOfMemoryError: none left" },
      { dtype: "f32", shape: { ...shape, layout: "nn" }, ...times },
    ],
  };
  const after = withTorch(before, torch);
  expect(after.contests[0]?.cases.slice(3)).toEqual([
    {
      ...times,
      name: "torch f32",
      peer: "torch",
      ratio: { median: 4, p10: 2 / 0.6, p90: 2 / 0.45 },
      limit: "compute",
      shareOfPeak: 4,
    },
    { name: "torch bf16", peer: "torch", error: "OutOfMemoryError: none left" },
  ]);
  expect(after.contests.slice(1)).toEqual(before.contests.slice(1));
  expect(after.peers.at(-1)).toEqual({ name: "torch", version: "2.9 on H100", ok: true });
  expect(after.summary).toEqual(before.summary);
  expect(withTorch(before, "no torch").peers.at(-1)).toEqual({
    name: "torch",
    version: "",
    ok: false,
    reason: "no torch",
  });
});

test("a report over several devices keeps what was measured and knows who fell with another", () => {
  const soFar = new SoFar();
  const { contests: _, ...header } = report([]);
  const start: Progress = { kind: "start", header, repetitions: 3, contests: 5 };
  const result = (name: string, error?: string): Progress => ({
    kind: "result",
    report: { ...MATMUL, name, ...(error !== undefined && { error, cases: [] }) },
  });
  const state = () => soFar.report?.contests.map(({ name, error }) => `${name}: ${error ?? "measured"}`);
  expect(soFar.report).toBeUndefined();
  soFar.take(start);
  for (const event of [
    result("a"),
    result("wrong", "WrongResultError: y"),
    result("culprit", "GpuError: lost"),
    result("b", "GpuError: lost"),
    result("c", "GpuError: lost"),
  ])
    soFar.take(event);
  expect(soFar.victims).toEqual(["b", "c"]);
  expect(soFar.report?.ok).toBe(false);

  soFar.take(start);
  for (const event of [result("a", "GpuError: late"), result("b"), result("c", "GpuError: late")]) soFar.take(event);
  expect(soFar.victims).toEqual(["c"]);
  soFar.take(start);
  soFar.take(result("c", "GpuError: its own"));
  expect(soFar.victims).toEqual([]);
  expect(state()).toEqual([
    "a: measured",
    "wrong: WrongResultError: y",
    "culprit: GpuError: lost",
    "b: measured",
    "c: GpuError: its own",
  ]);
});

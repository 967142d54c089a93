// The whole benchmark on a bare Linux machine with an NVIDIA GPU: tunes, measures ours, and PyTorch where it is.
//   ../shared/gpu/pack bench/gpu.ts, then there, from the root of the repository:
//   bash .gpu/run [--quick] [--out DIR] [--toggles A,B] [--python PATH] [--torch-device cpu] [--commit SHA] [NAME]...
import { spawnSync } from "node:child_process";
import { mkdirSync, mkdtempSync, renameSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { type Gpu, openGpu } from "../src/gpu/gpu.ts";
import type { Tuning } from "../src/gpu/tuner.ts";
import { contests } from "./cases/index.ts";
import { SoFar, type TorchReport, torchShapes, withTorch } from "./gpu-report.ts";
import { commit } from "./page/commit.ts";
import { type BenchOptions, type Report, readOptions, runBenchmarks, type SavedReport } from "./run.ts";
import { lines } from "./text.ts";

/** f16 on NVIDIA, and the features that Chrome keeps behind a flag. */
const TOGGLES = "vulkan_enable_f16_on_nvidia,allow_unsafe_apis";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    quick: { type: "boolean", default: false },
    out: { type: "string", default: process.env.OUT ?? "bench/results" },
    toggles: { type: "string", default: TOGGLES },
    python: { type: "string", default: "python3" },
    "torch-device": { type: "string", default: "cuda" },
    commit: { type: "string" },
  },
});
const options = readOptions(["--no-peers", ...(values.quick ? ["--quick"] : []), ...positionals]);
process.env.LOWRANK_ADAPTER ??= "hardware";
// Plans are found anew, whatever an earlier run found, unless a place for them is named.
process.env.LOWRANK_CACHE ??= mkdtempSync(join(tmpdir(), "lowrank-tune-"));
if (process.env.LOWRANK_ADAPTER !== "software") await useDawn(values.toggles);

const soFar = new SoFar();
const tunings = await tune();
await measure();
const report = soFar.report;
if (!report) throw new Error("bench/gpu: nothing was measured");
const complete = withTorch(report, torch(report));
save(complete);
for (const contest of complete.contests)
  if (contest.cases.some((one) => one.peer === "torch"))
    for (const line of [`\n${contest.name}`, ...lines({ kind: "result", report: contest })]) console.log(line);
for (const { name, ok, reason } of complete.peers) if (!ok) console.log(`\n${name}: not measured: ${reason}`);
console.log(`\nplans\n${tunings.map((tuning) => planLine(tuning)).join("\n")}\n\n${save(complete)}`);
process.exit(complete.ok ? 0 : 1);

/** Makes Dawn with these toggles what openGpu finds. It must live as long as the process, as navigator.gpu does. */
async function useDawn(toggles: string): Promise<void> {
  const name = "webgpu"; // stays outside the bundle
  const dawn = (await import(name)) as { create(options: string[]): GPU };
  const gpu = dawn.create(toggles === "" ? [] : [`enable-dawn-features=${toggles}`]);
  const adapter = await gpu.requestAdapter({ powerPreference: "high-performance" });
  if (!adapter) {
    console.error(
      "bench/gpu: no GPU was found, so nothing on one is measured. Needs an NVIDIA driver with Vulkan; to try it without: LOWRANK_ADAPTER=software and --quick",
    );
    process.exit(1);
  }
  const { vendor, description } = adapter.info;
  if (vendor !== "nvidia") console.log(`bench/gpu: this is no NVIDIA GPU but ${description || vendor || "unnamed"}`);
  if (globalThis.navigator) Object.defineProperty(globalThis.navigator, "gpu", { value: gpu });
  else Object.defineProperty(globalThis, "navigator", { value: { gpu, userAgent: "Node" } });
}

/** Has the tuner time the plans of everything that will be measured. What fails keeps its default plan. */
async function tune(): Promise<Tuning[]> {
  let gpu = await openGpu();
  const found: Tuning[] = [];
  for (const contest of chosen(options, gpu)) {
    try {
      const { inputs, cases } = contest.setup(gpu);
      const run = (): void => {
        for (const one of cases) one.run();
      };
      await gpu.tuner.tune(run, (tuning) => {
        found.push(tuning);
        console.log(`tuned ${planLine(tuning)}`);
      });
      gpu.release(...inputs);
    } catch (error) {
      console.log(`not tuned: ${contest.name}: ${String(error)}`);
      gpu.destroy();
      gpu = await openGpu();
    }
  }
  gpu.destroy();
  return found;
}

function chosen({ only, ...scope }: BenchOptions, gpu: Gpu): ReturnType<typeof contests> {
  const maxBytes = Math.min(gpu.limits.maxBufferSize, gpu.limits.maxStorageBufferBindingSize);
  return contests({ ...scope, isSoftware: gpu.isSoftware })
    .filter(({ name }) => only.length === 0 || only.some((part) => name.includes(part)))
    .filter(({ largestBytes, matrixUnits, unmet }) => largestBytes <= maxBytes && !matrixUnits && !unmet?.(gpu));
}

/** Saves after each contest. What failed because an earlier contest broke the device gets another device. */
async function measure(): Promise<void> {
  let { only } = options;
  for (let before = Number.POSITIVE_INFINITY; ; ) {
    await runBenchmarks(
      { ...options, only },
      (event) => {
        soFar.take(event);
        for (const line of lines(event)) console.log(line);
        if (event.kind === "result" && soFar.report) save(soFar.report);
      },
      [],
    );
    only = soFar.victims;
    if (only.length === 0 || only.length >= before) return;
    console.log(`\nonce more, on a new device, what failed after something else had: ${only.join("; ")}`);
    before = only.length;
  }
}

/** PyTorch's times for the same products, or why there are none. */
function torch(measured: Report): TorchReport | string {
  const args = ["bench/torch.py", "--device", values["torch-device"], "--shapes", "-"];
  const { status, stdout, stderr, error } = spawnSync(values.python, [...args, ...(values.quick ? ["--quick"] : [])], {
    input: JSON.stringify(torchShapes(measured)),
    encoding: "utf8",
    maxBuffer: 2 ** 26,
  });
  if (status !== 0)
    return String(error ?? (stderr.trim().split("\n").at(-1) || `${values.python} ended with ${status}`));
  return JSON.parse(stdout) as TorchReport;
}

/** Writes the report whole or not at all, and returns the file's name. */
function save(measured: Report): string {
  const { description, device, architecture, vendor } = measured.adapter;
  const adapter = (description || device || architecture || vendor || "unnamed")
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "-");
  const file = join(values.out, `gpu-${adapter.replace(/^-|-$/g, "")}.json`);
  const command = ["bash .gpu/run", ...process.argv.slice(2)].join(" ");
  const saved: SavedReport & { tunings: readonly Tuning[] } = {
    command,
    commit: values.commit ?? commit(),
    ...measured,
    tunings,
  };
  mkdirSync(values.out, { recursive: true });
  writeFileSync(`${file}.part`, `${JSON.stringify(saved, undefined, 2)}\n`);
  renameSync(`${file}.part`, file);
  return file;
}

function planLine({ key, chosen: best, timesMs }: Tuning): string {
  const [first = "", ms = Number.NaN] = Object.entries(timesMs)[0] ?? [];
  const bestMs = timesMs[best] ?? Number.NaN;
  return `${key}: default ${first} ${ms.toPrecision(3)} ms, tuned ${best} ${bestMs.toPrecision(3)} ms, ${(ms / bestMs).toFixed(2)}×`;
}

// node --import tsx --import ./scripts/wgsl.mjs bench/main.ts [--quick] [--json FILE] [--in deno|chrome] [NAME]...
import { execFileSync, spawn } from "node:child_process";
import { mkdirSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { type Report, readOptions, runBenchmarks } from "./run.ts";

const RUNNERS: Readonly<Record<string, string>> = {
  deno: "scripts/run-in-deno.ts",
  chrome: "scripts/run-in-chromium.ts",
};

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { quick: { type: "boolean" }, json: { type: "string" }, in: { type: "string" } },
});
const args = [...(values.quick ? ["--quick"] : []), ...positionals];
const report = values.in === undefined ? await runBenchmarks(readOptions(args)) : await runElsewhere(values.in);
if (values.json !== undefined) {
  const file = basename(values.json) === values.json ? join("bench/results", values.json) : values.json;
  const command = ["npm run bench --", ...process.argv.slice(2).map((arg) => (/\s/.test(arg) ? `"${arg}"` : arg))].join(
    " ",
  );
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, `${JSON.stringify({ command, commit: commit(), ...report }, undefined, 2)}\n`);
  console.log(`\n${file}`);
}
process.exitCode = report.ok ? 0 : 1;

/** Runs portable.ts in another runtime; its last line is the report, what comes before is passed on. */
async function runElsewhere(where: string): Promise<Report> {
  const runner = RUNNERS[where];
  if (runner === undefined) throw new Error(`bench: --in must be ${Object.keys(RUNNERS).join(" or ")}, got ${where}`);
  const child = spawn(process.execPath, ["--import", "tsx", runner, "bench/portable.ts", ...args], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  let last: Report | undefined;
  for await (const line of createInterface({ input: child.stdout })) {
    if (line.startsWith('{"ok":')) last = JSON.parse(line) as Report;
    else console.log(line);
  }
  if (!last?.contests) throw new Error(`bench: ${where} ended without a report`);
  return last;
}

/** The commit that was measured, marked if files differ from it. */
function commit(): string {
  const git = (...command: string[]): string =>
    execFileSync("git", command, { encoding: "utf8", stdio: "pipe" }).trim();
  try {
    return (
      git("rev-parse", "HEAD") +
      (git("status", "--porcelain", "--", "src", "bench", ":!bench/results") === "" ? "" : "-dirty")
    );
  } catch {
    return "unknown";
  }
}

// npm run bench:report [-- --in DIR] [-- --out FILE]: every report of bench/results/ as one page with tables and plots.
import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { parseArgs } from "node:util";
import { parseHTML } from "linkedom";
import { type Source, savedReports } from "./page/saved.ts";

const { values } = parseArgs({
  options: {
    in: { type: "string", default: "bench/results" },
    out: { type: "string", default: "out/bench-report.html" },
  },
});
try {
  const sources = readSources(values.in);
  const style = readFileSync(new URL("page/style.css", import.meta.url), "utf8");
  mkdirSync(dirname(values.out), { recursive: true });
  writeFileSync(values.out, savedReports(sources, parseHTML("<html></html>").document, style));
  console.log(`${values.out}: ${sources.length} ${sources.length === 1 ? "report" : "reports"}`);
} catch (error) {
  console.error(error instanceof Error ? error.message : String(error));
  process.exitCode = 1;
}

function readSources(directory: string): Source[] {
  const files = readdirSync(directory).filter((name) => name.endsWith(".json"));
  if (files.length === 0)
    throw new Error(
      `bench:report: ${directory} must hold reports, got no .json file. Make one: npm run bench -- --json NAME.json`,
    );
  return files.toSorted().map((name) => {
    const file = join(directory, name);
    const report = parse(readFileSync(file, "utf8")) as Source["report"] | undefined;
    if (!(report?.runtime && report.adapter && report.options && Array.isArray(report.contests) && report.summary))
      throw new Error(`bench:report: ${file} must be a report of npm run bench -- --json, got something else`);
    return { file, report };
  });
}

function parse(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

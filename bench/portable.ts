// The benchmarks in a page or in Deno: see scripts/portable.ts. main.ts starts this and keeps the report.
import { readOptions, runBenchmarks } from "./run.ts";

try {
  finish(JSON.stringify(await runBenchmarks(readOptions(scriptArgs))));
} catch (error) {
  console.error(String(error));
  finish(JSON.stringify({ ok: false, error: String(error) }));
}

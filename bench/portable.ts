// The benchmarks in a page or in Deno: see scripts/portable.ts. main.ts starts this and keeps the report.
import { readOptions, runBenchmarks } from "./run.ts";
import { lines } from "./text.ts";

try {
  const report = await runBenchmarks(readOptions(scriptArgs), (event) => {
    for (const line of lines(event)) console.log(line);
  });
  finish(JSON.stringify(report));
} catch (error) {
  console.error(String(error));
  finish(JSON.stringify({ ok: false, error: String(error) }));
}

// npm run same-numbers: the products of portable.ts in Node, Deno and Chromium, all on the software adapter: each must be right, and of
// equal bits in all three.
import { spawn } from "node:child_process";
import { createInterface } from "node:readline";
import type { KernelReport } from "./portable.ts";

const RUNNERS = { Deno: "scripts/run-in-deno.ts", Chromium: "scripts/run-in-chromium.ts" };

process.env.LOWRANK_ADAPTER = "software";
const reports = new Map<string, KernelReport>();
reports.set("Node", await here());
for (const [name, runner] of Object.entries(RUNNERS)) reports.set(name, await elsewhere(runner));

let ok = true;
for (const [name, report] of reports) {
  ok &&= report.ok;
  const { outcomes = {}, worst, adapter, complaints = [] } = report;
  console.log(
    `${name} on ${adapter}: ${Object.keys(outcomes).length} products, off by ${worst?.toExponential(1)} at most`,
  );
  for (const line of complaints) console.log(`  ${line}`);
  if (!report.ok && complaints.length === 0) console.log(`  ${JSON.stringify(report)}`);
}
const names = [...new Set([...reports.values()].flatMap(({ outcomes = {} }) => Object.keys(outcomes)))];
let equal = 0;
for (const product of names) {
  // A runtime that does not offer a feature of the adapter does not run the products that need it.
  const hashes = [...reports].flatMap(([name, { outcomes = {} }]) => {
    const found = outcomes[product];
    return found ? [{ name, hash: found.hash }] : [];
  });
  if (new Set(hashes.map(({ hash }) => hash)).size === 1) equal++;
  else {
    ok = false;
    console.log(`  ${product}: ${hashes.map(({ name, hash }) => `${name} ${hash}`).join(", ")}`);
  }
}
console.log(`${equal} of ${names.length} products have the same bits in ${[...reports.keys()].join(", ")}`);
process.exit(ok ? 0 : 1);

async function here(): Promise<KernelReport> {
  globalThis.scriptArgs = ["numbers"];
  return new Promise((resolve, reject) => {
    globalThis.finish = (json) => resolve(JSON.parse(json) as KernelReport);
    import("./portable.ts").catch(reject);
  });
}

/** Runs portable.ts in another runtime; its last line is the report, what comes before is passed on. */
async function elsewhere(runner: string): Promise<KernelReport> {
  const child = spawn(process.execPath, ["--import", "tsx", runner, "test/kernels/portable.ts", "numbers"], {
    stdio: ["ignore", "pipe", "inherit"],
  });
  let last: KernelReport | undefined;
  for await (const line of createInterface({ input: child.stdout })) {
    if (line.startsWith('{"ok":')) last = JSON.parse(line) as KernelReport;
    else console.log(line);
  }
  if (!last) throw new Error(`same-numbers: ${runner} ended without a report`);
  return last;
}

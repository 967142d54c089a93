// node --import tsx --import ./scripts/wgsl.mjs bench/main.ts [--quick | --full] [--peers | --no-peers] [--json FILE]
//   [--in deno|chrome] [NAME]...
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { parseArgs } from "node:util";
import { commit } from "./page/commit.ts";
import { PEER_MODULES } from "./peers/peer.ts";
import { type Report, readOptions, runBenchmarks, type SavedReport } from "./run.ts";
import { lines } from "./text.ts";

const RUNNERS: Readonly<Record<string, string>> = {
  deno: "scripts/run-in-deno.ts",
  chrome: "scripts/run-in-chromium.ts",
};

const flag = { type: "boolean" } as const;
const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: {
    quick: flag,
    full: flag,
    peers: flag,
    "no-peers": flag,
    json: { type: "string" },
    in: { type: "string" },
  },
});
const flags = (["quick", "full", "peers", "no-peers"] as const).filter((name) => values[name]);
const args = [...flags.map((name) => `--${name}`), ...positionals];
const options = readOptions(args);
if (options.peers) installPeers();
const report = values.in === undefined ? await runHere() : await runElsewhere(values.in);
if (values.json !== undefined) {
  const name = values.json.endsWith(".json") ? values.json : `${values.json}.json`;
  const file = basename(name) === name ? join("bench/results", name) : name;
  const command = ["npm run bench --", ...process.argv.slice(2).map((arg) => (/\s/.test(arg) ? `"${arg}"` : arg))].join(
    " ",
  );
  const saved: SavedReport = { command, commit: commit(), ...report };
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, `${JSON.stringify(saved, undefined, 2)}\n`);
  console.log(`\n${file}`);
}
process.exit(report.ok ? 0 : 1); // at once: Node would wait for WebAssembly's compiler, which a peer keeps busy

function runHere(): Promise<Report> {
  globalThis.readRepoFile = async (path) => new Uint8Array(readFileSync(path));
  return runBenchmarks(options, (event) => {
    for (const line of lines(event)) console.log(line);
  });
}

/** Fetches the peers' packages at their first use. Without them every peer is reported as missing. */
function installPeers(): void {
  if (existsSync(`${PEER_MODULES}/.package-lock.json`)) return; // npm writes it last
  console.log("npm ci --prefix bench/peers");
  const install = ["ci", "--prefix", "bench/peers", "--ignore-scripts", "--no-audit", "--no-fund"];
  const { status, error } = spawnSync("npm", install, {
    stdio: ["ignore", "ignore", "inherit"],
    shell: process.platform === "win32",
  });
  if (status !== 0) console.error(`bench: the peers could not be installed (${error ?? `npm ended with ${status}`})`);
}

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

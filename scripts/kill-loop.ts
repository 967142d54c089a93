// Kills a training run with SIGKILL many times and goes on with --resume, then compares it with one that was not killed.
//   node --import tsx --import ./scripts/wgsl.mjs scripts/kill-loop.ts [--kills 40] [--steps 60] [--seed 1]
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { killLoop } from "../test/cli/kill.ts";

const text = (preset: string) => ({ type: "string", default: preset }) as const;
const { values } = parseArgs({ options: { kills: text("40"), steps: text("60"), seed: text("1") } });
const home = await mkdtemp(join(tmpdir(), "lowrank-kill-loop-"));
const report = await killLoop({
  home,
  kills: Number(values.kills),
  steps: Number(values.steps),
  seed: Number(values.seed),
  onKill: (line) => console.log(line),
});
console.log(
  `${report.kills} kills, ${report.inWrites} of them while a checkpoint was being written, ${report.compared} runs compared: ${report.wrong.length === 0 ? "nothing wrong" : "WRONG"}`,
);
for (const line of report.wrong) console.log(line);
await rm(home, { recursive: true });
if (report.wrong.length > 0) process.exitCode = 1;

// Counts code lines per room (blank and comment lines are free) and fails past a budget. After tinygrad's sz.py.
import { readdirSync, readFileSync } from "node:fs";

const ENGINE = ["gpu", "io", "tensor", "kernels", "autograd", "nn", "lora"];
const ENGINE_BUDGET = 14_300;
const BUDGET = 29_500;

const rooms = new Map<string, number>();
for (const file of readdirSync("src", { recursive: true, encoding: "utf8" })) {
  if (!/\.(ts|wgsl)$/.test(file)) continue;
  const code = readFileSync(`src/${file}`, "utf8")
    .split("\n")
    .filter((line) => !/^\s*(\/\/|\/?\*|$)/.test(line)).length;
  const [first = "", ...rest] = file.split(/[\\/]/);
  const room = rest.length > 0 ? first : "(root)";
  rooms.set(room, (rooms.get(room) ?? 0) + code);
}

const sum = (counts: Iterable<number>): number => [...counts].reduce((a, b) => a + b, 0);
const engine = sum(ENGINE.map((room) => rooms.get(room) ?? 0));
const total = sum(rooms.values());
for (const [room, lines] of [...rooms].sort((a, b) => b[1] - a[1])) console.log(`${room.padEnd(12)}${lines}`);
console.log(`${"engine".padEnd(12)}${engine} of ${ENGINE_BUDGET}  (${ENGINE.join(" + ")})`);
console.log(`${"total".padEnd(12)}${total} of ${BUDGET}`);
if (engine > ENGINE_BUDGET || total > BUDGET) {
  console.error("sz: past the budget. Make something simpler, or raise the budget with a reason in CHANGELOG.md");
  process.exit(1);
}

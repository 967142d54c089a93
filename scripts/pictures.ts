// Trains on the demo's model and data by the command line and pictures it: docs/terminal.svg is what the terminal showed, without what Dawn says by itself, docs/report.png
// the beginning of its report.html.
//   node --import tsx --import ./scripts/wgsl.mjs scripts/pictures.ts
import { spawn } from "node:child_process";
import { mkdirSync, readFileSync, rmSync, statSync, writeFileSync } from "node:fs";
import { listen, openPage } from "./chromium.ts";

const OUT = "out/pirate";
const COMMAND = [
  ["train", "--model", "demo/base", "--data", "demo/data/pirate-train.jsonl"],
  ["--valid-data", "demo/data/pirate-valid.jsonl", "--valid-every", "12"],
  ["--out", OUT, "--rank", "8", "--alpha", "16", "--batch-size", "6", "--steps", "36"],
  ["--learning-rate", "0.01", "--schedule", "cosine"],
  ["--sample-prompt", "Once there was a little fox named Mia."],
];
const COLUMNS = 116;
/** Control sequences, or else single characters. */
const CONTROL = new RegExp(`${String.fromCharCode(27)}\\[[\\d;]*[A-Za-z]|[^]`, "gu");
/** What Dawn says by itself where it finds no Vulkan: it names places on the machine that built it. */
const OF_DAWN = /^Warning: Couldn't load Vulkan.*\n.*\n\n/gm;
const LARGEST_BYTES = 150e3;

rmSync(OUT, { recursive: true, force: true });
const shown = await run(COMMAND.flat());
mkdirSync("docs", { recursive: true });
writeFileSync("docs/terminal.svg", terminalSvg([...commandLines(), ...screenOf(shown.replace(OF_DAWN, ""))]));
writeFileSync("docs/report.png", await screenshot(`${OUT}/report.html`));
for (const file of ["docs/terminal.svg", "docs/report.png"]) {
  const { size } = statSync(file);
  console.log(`${file}: ${size} bytes`);
  if (size > LARGEST_BYTES) throw new Error(`pictures: ${file} must have at most ${LARGEST_BYTES} bytes, got ${size}`);
}
process.exit();

/** What the command writes where it takes both of its outputs for a terminal. */
async function run(args: readonly string[]): Promise<string> {
  const terminal = "data:text/javascript,process.stderr.isTTY = process.stdout.isTTY = true;";
  const hooks = ["--import", "tsx", "--import", "./scripts/wgsl.mjs", "--import", terminal];
  const child = spawn(process.execPath, [...hooks, "src/cli/main.ts", ...args], { stdio: ["ignore", "pipe", "pipe"] });
  let text = "";
  for (const stream of [child.stdout, child.stderr])
    stream.setEncoding("utf8").on("data", (piece: string) => {
      text += piece;
      process.stdout.write(piece);
    });
  const code = await new Promise((resolve) => child.once("close", resolve));
  if (code !== 0) throw new Error(`pictures: the command must end with 0, got ${code}`);
  return text;
}

/** As a person types it, a line for each of its parts. */
function commandLines(): string[] {
  const word = (text: string): string => (text.includes(" ") ? `"${text}"` : text);
  const lines = COMMAND.map((part) => part.map(word).join(" "));
  return lines.map((line, i) => `${i === 0 ? "$ lowrank " : "    "}${line}${i < lines.length - 1 ? " \\" : ""}`);
}

/** The lines on a terminal of so many columns after this output. Knows of control sequences those that the program writes. */
function screenOf(output: string): string[] {
  const lines: string[][] = [[]];
  let column = 0;
  for (const [token] of output.matchAll(CONTROL)) {
    const line = lines.at(-1) ?? [];
    if (token === "\r") column = 0;
    else if (token === "\x1b[K") line.length = column;
    else if (token.startsWith("\x1b"))
      throw new Error(`pictures: no such control sequence, got ${JSON.stringify(token)}`);
    else {
      if (token === "\n" || column === COLUMNS) {
        lines.push([]);
        column = 0;
      }
      if (token !== "\n") (lines.at(-1) ?? [])[column++] = token;
    }
  }
  return lines
    .map((line) => Array.from(line, (letter) => letter ?? " ").join(""))
    .filter((line, i, all) => line !== "" || i < all.length - 1);
}

function terminalSvg(lines: readonly string[]): string {
  const [width, height, left, top] = [8.4, 19, 18, 46];
  const escaped = (text: string): string => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const texts = lines.map((line, i) => {
    const y = top + 14 + i * height;
    const kind = /^(\$| {4}--)/.test(line) ? ' class="typed"' : "";
    return line.trim() === ""
      ? ""
      : `<text x="${left}" y="${y}" textLength="${([...line].length * width).toFixed(1)}"${kind}>${escaped(line)}</text>\n`;
  });
  const [w, h] = [Math.ceil(2 * left + COLUMNS * width), top + lines.length * height + left];
  const dots = ["#ff5f57", "#febc2e", "#28c840"].map(
    (fill, i) => `<circle cx="${left + 6 + 20 * i}" cy="20" r="6" fill="${fill}"/>`,
  );
  return `<svg xmlns="http://www.w3.org/2000/svg" width="${w}" height="${h}" viewBox="0 0 ${w} ${h}">
<title>lowrank train in a terminal</title>
<style>text{font:14px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;white-space:pre;fill:#d8dee9}.typed{fill:#8fd6a9}</style>
<rect width="${w}" height="${h}" rx="8" fill="#1b1f27"/>
${dots.join("")}
${texts.join("")}</svg>
`;
}

/** The upper part of a page. */
async function screenshot(file: string): Promise<Buffer> {
  const { origin, close } = await listen((_request, response) => {
    response.writeHead(200, { "content-type": "text/html" }).end(readFileSync(file));
  });
  const { browser, page } = await openPage(origin);
  try {
    await page.setViewportSize({ width: 1000, height: 1080 });
    await page.reload();
    return await page.screenshot();
  } finally {
    await browser.close();
    close();
  }
}

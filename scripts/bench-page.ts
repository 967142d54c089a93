// The benchmarks as a page: npm run bench:page [-- --port N] serves it to this machine, -- --build DIR writes it to be hosted.
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, extname, join, relative } from "node:path";
import { parseArgs } from "node:util";
import { build } from "esbuild";
import { commit } from "../bench/page/commit.ts";
import { PEER_MODULES } from "../bench/peers/peer.ts";
import { listen } from "./chromium.ts";

const PEER_WASM = "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm";
const TYPES: Readonly<Record<string, string>> = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".css": "text/css",
  ".json": "application/json",
  ".wasm": "application/wasm",
};

const { values } = parseArgs({ options: { build: { type: "string" }, port: { type: "string", default: "0" } } });
const files = await pageFiles();
if (values.build === undefined) {
  const { origin } = await listen((request, response) => {
    const path = new URL(request.url ?? "/", "http://localhost").pathname.slice(1) || "index.html";
    const bytes = files.get(path);
    if (!bytes) return void response.writeHead(404).end();
    response.writeHead(200, { "content-type": TYPES[extname(path)] ?? "application/octet-stream" }).end(bytes());
  }, Number(values.port));
  console.log(`${origin}\nOpen it in Chrome or Edge. Ctrl+C ends it.`);
} else {
  for (const [path, bytes] of files) {
    const file = join(values.build, path);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, bytes());
  }
  console.log(`${values.build}: put it on a web server; browsers give WebGPU to https and localhost only`);
}

/** All files by their path in the page. The peers are chunks of their own, which it loads only when asked for them. */
async function pageFiles(): Promise<Map<string, () => Uint8Array>> {
  const hasPeers = existsSync(`${PEER_MODULES}/.package-lock.json`); // npm writes it last
  if (!hasPeers) console.log("Without peers: npm ci --prefix bench/peers --ignore-scripts fetches them");
  const outdir = "out/bench-page"; // nothing is written there
  const { outputFiles } = await build({
    entryPoints: ["bench/page/main.ts"],
    outdir,
    write: false,
    bundle: true,
    splitting: true,
    minify: true,
    chunkNames: "chunks/[name]-[hash]",
    format: "esm",
    target: "es2022",
    platform: "browser",
    external: ["node:*"],
    loader: { ".wgsl": "text" },
    define: { COMMIT: JSON.stringify(commit()) },
    logLevel: "warning",
  });
  const found = new Map(outputFiles.map(({ path, contents }) => [relative(outdir, path), () => contents]));
  for (const name of ["index.html", "style.css"]) found.set(name, () => readFileSync(join("bench/page", name)));
  if (hasPeers) for (const name of peersRead()) found.set(name, () => readFileSync(name));
  return found;
}

/** What peers read while they open: their versions, and what ort-web runs. */
function peersRead(): string[] {
  const { dependencies } = JSON.parse(readFileSync("bench/peers/package.json", "utf8")) as {
    dependencies: Record<string, string>;
  };
  const names = [...Object.keys(dependencies).map((name) => `${name}/package.json`), PEER_WASM];
  return names.map((name) => `${PEER_MODULES}/${name}`);
}

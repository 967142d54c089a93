// Runs a TypeScript file of this repository in headless Chromium: tsx scripts/run-in-chromium.ts SCRIPT.ts [args]. See
// portable.ts. The browser is CHROMIUM_PATH, else that of @sparticuz/chromium (Linux x64), else an installed Chrome.
import { existsSync, readFileSync, renameSync, statSync, writeFileSync } from "node:fs";
import { createServer, type RequestListener } from "node:http";
import { createRequire } from "node:module";
import type { AddressInfo } from "node:net";
import { dirname, join, normalize } from "node:path";
import { brotliDecompressSync } from "node:zlib";
import { type Browser, chromium, type LaunchOptions, type Page } from "playwright-core";
import { unpackArchive } from "../src/gpu/software.ts";
import { adapterWish, bundle, parseRun } from "./portable.ts";

const FLAGS = ["--headless=new", "--no-sandbox", "--enable-unsafe-webgpu", "--disable-gpu-watchdog"];
const QUIET = ["--disable-background-networking"];
const ADAPTER_FLAGS = {
  hardware: process.platform === "linux" ? ["--enable-features=Vulkan", "--ignore-gpu-blocklist"] : [],
  software: ["--use-webgpu-adapter=swiftshader"],
};

const run = parseRun("run-in-chromium", process.argv.slice(2));
const script = await bundle(run.script, "browser");
const server = createServer(serve());
await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
const origin = `http://127.0.0.1:${(server.address() as AddressInfo).port}/`;
const { browser, page } = await openPage();
try {
  const json = await new Promise<string>((resolve, reject) => {
    page.on("console", (message) => console[message.type() === "error" ? "error" : "log"](message.text()));
    page.on("pageerror", (error) => reject(error));
    page.on("crash", () => reject(new Error("run-in-chromium: the page crashed")));
    browser.on("disconnected", () =>
      reject(new Error("run-in-chromium: the browser ended before finish() was called")),
    );
    void page
      .exposeFunction("finish", resolve)
      .then(() => page.addScriptTag({ url: "/.script.js", type: "module" }))
      .catch(reject);
  });
  console.log(json);
  process.exitCode = (JSON.parse(json) as { ok?: boolean }).ok ? 0 : 1;
} finally {
  await browser.close();
  server.close();
  server.closeAllConnections();
}

/** A page in a browser that has a WebGPU adapter: hardware if there is one, else software. */
async function openPage(): Promise<{ browser: Browser; page: Page }> {
  const wish = adapterWish();
  const found = browserOptions();
  for (const adapter of wish === "auto" ? (["hardware", "software"] as const) : [wish]) {
    const opened = await chromium.launch({ ...found, args: [...FLAGS, ...QUIET, ...ADAPTER_FLAGS[adapter]] });
    const tab = await opened.newPage();
    await tab.goto(origin);
    if (await tab.evaluate(async () => Boolean(await navigator.gpu?.requestAdapter())))
      return { browser: opened, page: tab };
    await opened.close();
  }
  server.close();
  throw new Error(`run-in-chromium: no WebGPU adapter (LOWRANK_ADAPTER is ${wish})`);
}

function browserOptions(): LaunchOptions {
  const path = process.env.CHROMIUM_PATH;
  if (path) return { executablePath: path };
  if (process.platform !== "linux" || process.arch !== "x64") return { channel: "chrome" };
  // The package's own libraries stand in for those that a machine without a desktop lacks.
  const libraries = join(unpackArchive("al2023.tar.br"), "lib");
  const swiftshader = unpackArchive("swiftshader.tar.br");
  const executablePath = join(swiftshader, "chromium");
  if (!existsSync(executablePath)) {
    const packed = join(
      dirname(createRequire(import.meta.url).resolve("@sparticuz/chromium")),
      "../../bin/chromium.br",
    );
    writeFileSync(`${executablePath}.${process.pid}`, brotliDecompressSync(readFileSync(packed)), { mode: 0o755 });
    renameSync(`${executablePath}.${process.pid}`, executablePath);
  }
  const LD_LIBRARY_PATH = [libraries, process.env.LD_LIBRARY_PATH].filter(Boolean).join(":");
  return { executablePath, env: { ...(process.env as Record<string, string>), LD_LIBRARY_PATH } };
}

/** The page, the script and, read only, the files of the repository and of the mounts, with byte ranges. */
function serve(): RequestListener {
  const html = `<!doctype html><meta charset="utf-8"><title>lowrank</title><script>
globalThis.scriptArgs = ${JSON.stringify(run.args).replaceAll("<", "\\u003c")};
globalThis.readRepoFile = async (path) => {
  const response = await fetch("/" + path.replace(/^\\//, ""));
  if (!response.ok) throw new Error(path + ": HTTP " + response.status);
  return new Uint8Array(await response.arrayBuffer());
};
</script>`;
  return (request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url ?? "/", origin).pathname));
    const answer = (type: string, body: string | Buffer): void => {
      response.writeHead(200, { "content-type": type }).end(body);
    };
    if (path === "/") return answer("text/html", html);
    if (path === "/.script.js") return answer("text/javascript", script);
    const [, name = "", rest = ""] = path.split(/^\/([^/]+)\//);
    const mount = run.mounts.get(name);
    const file = mount === undefined ? `.${path}` : join(mount, rest);
    if (!statSync(file, { throwIfNoEntry: false })?.isFile()) return void response.writeHead(404).end();
    const bytes = readFileSync(file);
    const [, from, to] = /^bytes=(\d+)-(\d*)$/.exec(request.headers.range ?? "") ?? [];
    if (from === undefined) return answer("application/octet-stream", bytes);
    const end = Math.min(to ? Number(to) + 1 : bytes.length, bytes.length);
    const headers = { "content-range": `bytes ${from}-${end - 1}/${bytes.length}` };
    response.writeHead(206, headers).end(bytes.subarray(Number(from), end));
  };
}

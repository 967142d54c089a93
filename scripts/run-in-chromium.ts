// Runs a TypeScript file of this repository in headless Chromium: tsx scripts/run-in-chromium.ts [--host HOST.ts] SCRIPT.ts [args].
// See portable.ts, and chromium.ts for which browser that is. HOST.ts stays in Node: what its `host(page)` returns, functions by
// name, the script finds on `globalThis`, as asynchronous ones.
import { readFileSync, statSync } from "node:fs";
import type { RequestListener } from "node:http";
import { join, normalize, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import type { Page } from "playwright-core";
import { listen, openPage } from "./chromium.ts";
import { bundle, parseRun } from "./portable.ts";

/** What a HOST.ts exports as `host`. */
export type Host = (page: Page) => Readonly<Record<string, (...args: never[]) => unknown>>;

const argv = process.argv.slice(2);
const [, hostFile] = argv[0] === "--host" ? argv.splice(0, 2) : [];
const run = parseRun("run-in-chromium", argv);
const script = await bundle(run.script, "browser");
const { origin, close } = await listen(serve());
const { browser, page } = await openPage(origin).catch((error) => {
  close();
  throw error;
});
try {
  if (hostFile !== undefined) {
    const { host } = (await import(pathToFileURL(resolve(hostFile)).href)) as { host: Host };
    for (const [name, call] of Object.entries(host(page))) await page.exposeFunction(name, call);
  }
  const json = await new Promise<string>((finished, reject) => {
    page.on("console", (message) => console[message.type() === "error" ? "error" : "log"](message.text()));
    page.on("pageerror", (error) => reject(error));
    page.on("crash", () => reject(new Error("run-in-chromium: the page crashed")));
    browser.on("disconnected", () =>
      reject(new Error("run-in-chromium: the browser ended before finish() was called")),
    );
    void page
      .exposeFunction("finish", finished)
      .then(() => page.addScriptTag({ url: "/.script.js", type: "module" }))
      .catch(reject);
  });
  console.log(json);
  process.exitCode = (JSON.parse(json) as { ok?: boolean }).ok ? 0 : 1;
} finally {
  await browser.close();
  close();
}
process.exit(); // a host may have left a server open

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
    const path = normalize(decodeURIComponent(new URL(request.url ?? "/", "http://localhost").pathname));
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

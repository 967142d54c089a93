// A Chromium with WebGPU: CHROMIUM_PATH, else that of @sparticuz/chromium (Linux x64), else an installed Chrome.
import { existsSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { createServer, type RequestListener } from "node:http";
import { createRequire } from "node:module";
import type { AddressInfo } from "node:net";
import { dirname, join } from "node:path";
import { brotliDecompressSync } from "node:zlib";
import { type Browser, chromium, type LaunchOptions, type Page } from "playwright-core";
import { unpackArchive } from "../src/gpu/software.ts";
import { adapterWish } from "./portable.ts";

const FLAGS = ["--headless=new", "--no-sandbox", "--enable-unsafe-webgpu", "--disable-gpu-watchdog"];
const QUIET = ["--disable-background-networking"];
const ADAPTER_FLAGS = {
  hardware: process.platform === "linux" ? ["--enable-features=Vulkan", "--ignore-gpu-blocklist"] : [],
  // V8 would keep optimising wasm in the background and take cores from the adapter.
  software: ["--use-webgpu-adapter=swiftshader", "--js-flags=--liftoff-only"],
};

/** Serves this machine alone, at `origin`, on a free port unless one is given. */
export async function listen(handler: RequestListener, port = 0): Promise<{ origin: string; close: () => void }> {
  const server = createServer(handler);
  await new Promise<void>((resolve, reject) => server.once("error", reject).listen(port, "127.0.0.1", resolve));
  const close = (): void => {
    server.close();
    server.closeAllConnections();
  };
  return { origin: `http://127.0.0.1:${(server.address() as AddressInfo).port}/`, close };
}

/** A page in a browser that has a WebGPU adapter: hardware if there is one, else software. */
export async function openPage(origin: string): Promise<{ browser: Browser; page: Page }> {
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
  throw new Error(`chromium: no WebGPU adapter (LOWRANK_ADAPTER is ${wish})`);
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

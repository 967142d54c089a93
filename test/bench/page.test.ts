import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import type { Browser, Page } from "playwright-core";
import { afterAll, beforeAll, expect, test } from "vitest";
import type { SavedReport } from "../../bench/run.ts";
import { openPage } from "../../scripts/chromium.ts";

const server = spawn(process.execPath, ["--import", "tsx", "scripts/bench-page.ts"], {
  stdio: ["ignore", "pipe", "inherit"],
});
let browser: Browser;
let page: Page;
let origin = "";
const problems: string[] = [];

beforeAll(async () => {
  for await (const line of createInterface({ input: server.stdout })) {
    origin = /^http:\/\/127\.0\.0\.1:\d+\/$/.exec(line)?.[0] ?? "";
    if (origin) break;
  }
  ({ browser, page } = await openPage(origin));
  page.on("console", (message) => {
    if (["error", "warning"].includes(message.type())) problems.push(message.text());
  });
  page.on("pageerror", (error) => problems.push(String(error)));
});

afterAll(async () => {
  await browser?.close();
  if (server.exitCode === null && server.kill()) await once(server, "exit");
});

test("a quick run fills the table as it goes, draws the plots and gives the report as JSON", async () => {
  const asked: string[] = [];
  page.on("request", (request) => asked.push(new URL(request.url()).pathname));
  await page.goto(`${origin}?size=quick&only=matmul nt`);
  expect(await page.locator("[name=only]").inputValue()).toBe("matmul nt");
  expect(await page.locator("[name=size]:checked").inputValue()).toBe("quick");
  await page.locator("#adapter", { hasText: "GPU: " }).waitFor();
  // By keyboard alone, from the field that stands before the button.
  await page.locator("[name=only]").focus();
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");

  const probe = page.locator("table[data-group=probe] tbody", { hasText: "probe FMA peak" });
  await probe.waitFor();
  expect(await page.locator("#keep").isVisible()).toBe(false);
  await page.locator("#keep").waitFor({ timeout: 100_000 });

  expect(await page.locator("#status").textContent()).toBe("Done.");
  expect(await page.locator("table[data-group=matmul] tbody th[scope=row]").allTextContents()).toEqual(["lowrank"]);
  expect(await page.locator("table[data-group=matmul] tbody td").first().textContent()).toMatch(/^[\d.]+$/);
  expect(await page.locator(".chart svg [aria-label=bar] rect").count()).toBe(1);

  const [download] = await Promise.all([page.waitForEvent("download"), page.locator("#download").click()]);
  expect(download.suggestedFilename()).toMatch(/^page-[\w-]+\.json$/);
  const report = JSON.parse(readFileSync(await download.path(), "utf8")) as SavedReport;
  expect(Object.keys(report).sort()).toEqual([
    "adapter",
    "command",
    "commit",
    "contests",
    "date",
    "minBatchMs",
    "ok",
    "options",
    "peaks",
    "peers",
    "replay",
    "runtime",
    "summary",
    "syncMs",
  ]);
  expect(report).toMatchObject({
    ok: true,
    command: `${origin}?size=quick&only=matmul%20nt`,
    options: { quick: true, full: false, peers: false, only: ["matmul nt"] },
    peers: [],
    summary: { rows: [], geomean: null, ahead: 0 },
  });
  expect(report.commit).toMatch(/^[0-9a-f]{40}(-dirty)?$/);
  expect(report.contests.map(({ group }) => group)).toEqual(["probe", "probe", "matmul"]);
  expect(report.contests[2]?.cases[0]).toMatchObject({ name: "lowrank", repetitions: 3, flops: 2 * 128 ** 3 });

  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  await page.locator("#copy").click();
  await page.locator("#status", { hasText: "Copied." }).waitFor();
  expect(JSON.parse(await page.evaluate(() => navigator.clipboard.readText()))).toEqual(report);

  // No peer: all that is split off for both sides is what the bundler adds.
  expect(asked.filter((path) => /chunks|peers/.test(path)).length).toBeLessThanOrEqual(1);
  expect(problems).toEqual([]);
});

test("a name that no contest has is told, and another run can follow", async () => {
  await page.goto(`${origin}?size=quick&only=nothing of the kind`);
  await page.getByRole("button", { name: "Run" }).click();
  await page.locator("#status", { hasText: "Done, but a contest failed or none has that name" }).waitFor();
  expect(await page.getByRole("button", { name: "Run" }).isEnabled()).toBe(true);
  expect(problems).toEqual([]);
});

test.each([
  ["undefined", "This browser has no WebGPU. Use Chrome or Edge 121 or later"],
  ["{ requestAdapter: async () => null }", "This browser has WebGPU but gives no adapter."],
])("where navigator.gpu is %s the page says what to do", async (gpu, message) => {
  const tab = await browser.newPage();
  await tab.addInitScript(`Object.defineProperty(navigator, "gpu", { value: ${gpu} })`);
  await tab.goto(origin);
  await tab.locator("#adapter.failure").waitFor();
  expect(await tab.locator("#adapter").textContent()).toContain(message);
  expect(await tab.getByRole("button", { name: "Run" }).isDisabled()).toBe(true);
  await tab.close();
});

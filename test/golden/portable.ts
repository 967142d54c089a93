// The golden run in Deno and Chromium: npm run golden:deno, npm run golden:chrome. In Node it is a test.
import { openGpu } from "../../src/index.ts";
import { goldenRun } from "./run.ts";

try {
  const gpu = await openGpu();
  console.log(
    `golden run on ${gpu.runtime}, ${gpu.info.description || gpu.info.vendor}${gpu.isSoftware ? " (software)" : ""}`,
  );
  const result = await goldenRun(gpu, (path) => globalThis.readRepoFile(`/shared/${path}`));
  globalThis.finish(JSON.stringify(result));
} catch (error) {
  globalThis.finish(JSON.stringify({ ok: false, error: String(error), stack: (error as Error).stack }));
}

import { readFile } from "node:fs/promises";
import { expect, test } from "vitest";
import { openGpu } from "../../src/gpu/gpu.ts";
import { hasShared, shared } from "../shared.ts";
import { goldenRun } from "./run.ts";

test.skipIf(!hasShared)("20 steps of LoRA on stories260K equal PEFT and PyTorch (needs ../shared)", async () => {
  const gpu = await openGpu();
  const { checks } = await goldenRun(gpu, (path) => readFile(shared(path)));
  for (const { what, worst, allowed } of checks) expect(worst <= allowed, `${what}: ${worst} > ${allowed}`).toBe(true);
  gpu.destroy();
});

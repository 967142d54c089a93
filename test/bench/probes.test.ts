import { expect, test } from "vitest";
import { measure } from "../../bench/harness.ts";
import { peaksOf, probes } from "../../bench/probes/probes.ts";
import { openGpu } from "../../src/gpu/gpu.ts";

test("both probes compute what they say and their best rates are the peaks", async () => {
  const gpu = await openGpu();
  const { fmaPeak, copyBandwidth } = probes({ isSoftware: true, quick: true, maxBytes: 100_000 });
  const settings = { repetitions: 1, minBatchMs: 0, now: () => performance.now() };
  const fmaCases = await measure(gpu, fmaPeak, settings);
  const copyCases = await measure(gpu, copyBandwidth, settings);
  const rates = [...fmaCases, ...copyCases].flatMap((one) => ("error" in one ? [] : [Math.max(one.gflops, one.gbs)]));
  expect(rates).toHaveLength(9);
  const peaks = peaksOf(fmaCases, copyCases);
  expect(peaks).toEqual({ fmaGflops: Math.max(...rates.slice(0, 6)), copyGbs: Math.max(...rates.slice(6)) });
  expect(copyBandwidth.sizes).toEqual({ bytes: 100_000 });
});

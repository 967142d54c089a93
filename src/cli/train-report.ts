/** What a training run says and leaves behind at its end. */
import { join } from "node:path";
import type { Gpu } from "../gpu/gpu.ts";
import type { LoraAdapter } from "../lora/adapter.ts";
import { writeFileAtomic } from "../node.ts";
import { byKernel, chromeTrace, type ProfiledDispatch, profileTable } from "../train/profile.ts";
import { profilePage } from "../train/profile-page.ts";
import type { StepMetrics } from "../train/step-metrics.ts";
import { evaluatedLine, fixed } from "./progress.ts";
import type { Fact } from "./report-page.ts";
import { bytes, deviceName, duration, number, result, say } from "./session.ts";

export interface Outcome {
  readonly steps: number;
  readonly loss_first: number | null;
  readonly loss_last: number | null;
  /** Over the rows that were not trained on, after the last step. */
  readonly loss_valid: number | null;
  readonly accuracy_valid?: number;
  /** Of pairs: see `PreferenceEvaluation`. */
  readonly margin_valid?: number;
  readonly out: string;
  readonly interrupted: boolean;
  readonly rows: number;
  readonly truncated: number;
  readonly dropped: number;
  /** Of the data, once through. */
  readonly tokens: number;
  readonly trainable_parameters: number;
  readonly peak_bytes: number;
  readonly planned_bytes?: number;
  /** Steps whose loss or gradient was not finite. */
  readonly skipped_steps: number;
  readonly seconds: number;
}

interface RunCourse {
  readonly adapter: LoraAdapter;
  readonly trainable: number;
  /** Of this process. */
  readonly seconds: number;
  readonly device: string;
}

/** What a run was and came to, for its documents. */
export function runFacts({ adapter, trainable, seconds, device }: RunCourse, metrics: readonly StepMetrics[]): Fact[] {
  const [first, last] = [metrics[0], metrics.at(-1)];
  const { r, alpha } = adapter.config;
  const loss = (of: StepMetrics | undefined): string => fixed(of?.loss);
  const validation = metrics.findLast((step) => step.validation)?.validation;
  return [
    ["rank, alpha", `${r}, ${alpha}`],
    ["modules", number(adapter.pairs.size + adapter.tables.size)],
    ["trained parameters", number(trainable)],
    ["steps", number(last?.step ?? 0)],
    ["training loss", `${loss(first)} → ${loss(last)}`],
    ...(validation ? [["validation", evaluatedLine(validation)] as const] : []),
    ["time", duration(seconds)],
    ["device", device],
  ];
}

/** The outcome as a line for people or as JSON. */
export function report(gpu: Gpu, json: boolean, outcome: Outcome): void {
  if (json) {
    result(JSON.stringify({ ...outcome, device: deviceName(gpu.info), software: gpu.isSoftware }));
    return;
  }
  const { steps, loss_first, loss_last, loss_valid, seconds, peak_bytes } = outcome;
  const held = loss_valid === null ? "" : ` (${loss_valid.toFixed(4)} on rows not trained on)`;
  const course = `loss ${fixed(loss_first)} → ${fixed(loss_last)}${held}`;
  result(`${number(steps)} steps in ${number(seconds, 1)} s, ${course}, at most ${bytes(peak_bytes)} of GPU memory`);
}

/** The profile of a step as text, page and trace. */
export async function writeProfile(profile: readonly ProfiledDispatch[], out: string, device: string): Promise<void> {
  const kernels = byKernel(profile);
  const table = profileTable(kernels);
  await writeFileAtomic(join(out, "profile.txt"), `${table}\n`);
  await writeFileAtomic(join(out, "profile.trace.json"), chromeTrace(profile));
  await writeFileAtomic(join(out, "profile.html"), profilePage(kernels, `A training step on ${device}`));
  say(`${table}\nthe profile is in ${join(out, "profile.txt")}, .html and .trace.json`);
}

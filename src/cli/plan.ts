import { totalmem } from "node:os";
import { Command, Option } from "commander";
import { GpuError } from "../gpu/errors.ts";
import type { Gpu } from "../gpu/gpu.ts";
import type { LoraAdapter } from "../lora/adapter.ts";
import { attachLora } from "../lora/attach.ts";
import type { LoraConfig } from "../lora/config.ts";
import { planEva } from "../lora/init-eva.ts";
import { planLoraGa } from "../lora/init-lora-ga.ts";
import { freezeA } from "../lora/lora-fa.ts";
import { SharedBase } from "../lora/shared-base.ts";
import type { CausalModel } from "../models/causal.ts";
import { emptyModel } from "../models/load.ts";
import { bitsPerWeight, type WeightFormat } from "../models/weights.ts";
import { diskDirectory, loadPeftFrom } from "../node.ts";
import { planGeneration } from "../serve/generate.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, type Tensor } from "../tensor/tensor.ts";
import { calibrationBatches } from "../train/calibration.ts";
import type { Row } from "../train/data.ts";
import { type MemoryPlan, type PlanOptions, planTraining } from "../train/plan.ts";
import { preferenceTask } from "../train/preference.ts";
import { languageTask } from "../train/task.ts";
import {
  jsonOption,
  keepsTwice,
  type LoraArguments,
  loraOptions,
  maxLengthOption,
  modelOption,
  plannedConfig,
  preferenceOption,
  quantizeOption,
  revisionOption,
  stepOptions,
  trainedFormat,
} from "./options.ts";
import { located } from "./places.ts";
import { bitsLine, bytes, deviceName, number, openReader, result, withGpu } from "./session.ts";

/** What the memory of a run depends on. */
export interface RunSize {
  /** How the weights of linear layers are kept. */
  readonly weights: WeightFormat;
  /** Whether the adapter begins with a part of the base. */
  readonly takesFromBase?: boolean;
  /** Whether B is trained alone. */
  readonly loraFa?: boolean;
  readonly batchSize: number;
  readonly maxLength: number;
  readonly gradAccumulation: number;
  readonly checkpointing: boolean;
  /** Whether rows are packed. */
  readonly packing?: boolean;
  /** See `PlanOptions`. */
  readonly evaluation?: PlanOptions["evaluation"];
  /** Whether rows are pairs of answers, of which one is preferred. */
  readonly preference?: boolean;
  /** See `LanguageSettings`. */
  readonly neftuneAlpha?: number | undefined;
  /** Of the longest prompt that samples continue. */
  readonly samples?: { readonly promptLength: number; readonly maxTokens: number } | undefined;
  /** What an adapter that starts by the data looks at. */
  readonly calibration?: { readonly rows: readonly Row[]; readonly batches: number } | undefined;
}

interface PlanArguments extends Omit<RunSize, "maxLength" | "weights" | "preference">, LoraArguments {
  readonly preference?: "dpo";
  readonly model: string;
  readonly revision?: string;
  readonly quantize?: "int8" | "nf4";
  readonly maxLength?: number;
  readonly budget?: number;
  readonly json?: boolean;
}

const EXAMPLES = `
Examples:
  $ lowrank plan --model models/base --batch-size 4 --max-length 1024
  $ lowrank plan --model models/base --preference dpo --max-length 512
  $ lowrank plan --model models/base --rank 64 --budget 8GiB --checkpointing --json

Nothing is loaded but config.json. The exit status is 1 where the run does not fit.`;

export function planCommand(): Command {
  const command = new Command("plan")
    .description("say what a training run would take of the GPU's memory, and whether it fits")
    .addOption(modelOption())
    .addOption(revisionOption())
    .addOption(quantizeOption())
    .addOption(maxLengthOption("plan"))
    .addOption(preferenceOption());
  for (const option of [...loraOptions("plan"), ...stepOptions("plan"), budgetOption("plan"), jsonOption()])
    command.addOption(option);
  return command.addHelpText("after", EXAMPLES).action(run);
}

export const budgetOption = (command: string): Option =>
  new Option("--budget <size>", "GPU memory that may be used, such as 8GiB, 500MiB or a number of bytes").argParser(
    (text) => {
      const [, count = "", unit = ""] = /^(\d+(?:\.\d+)?) ?(KiB|MiB|GiB|)$/.exec(text) ?? [];
      if (count === "")
        throw new ShapeError(`${command}: --budget must be a size such as 8GiB, 500MiB or 1000000, got ${text}`);
      return Math.floor(Number(count) * 1024 ** ["", "KiB", "MiB", "GiB"].indexOf(unit));
    },
  );

/** The memory that a run may use: what was asked for; on a software adapter what the machine has; else nobody can tell. */
export const budgetOf = (gpu: Gpu, asked: number | undefined): number | undefined =>
  asked ?? (gpu.isSoftware ? totalmem() : undefined);

interface RunPlan extends MemoryPlan {
  /** Of the base. */
  readonly bits: ReturnType<typeof bitsPerWeight>;
}

/** Plans a run of this model; `adapter` is the settings of a new one, or the directory of one to go on from. */
async function planOf(gpu: Gpu, model: string, adapter: LoraConfig | string, size: RunSize): Promise<RunPlan> {
  let bits = { linears: Number.NaN, all: Number.NaN };
  const plan = await planTraining(
    gpu,
    async (dry) => {
      const unfilled = await emptyModel(dry, diskDirectory(model), { weights: size.weights });
      bits = bitsPerWeight(unfilled);
      unfilled.checkpointing = size.checkpointing;
      const batches = calibration(unfilled, size);
      if (batches.length > 0 && !size.takesFromBase && typeof adapter !== "string")
        planEva(unfilled, adapter, batches, 1);
      const attached =
        typeof adapter === "string" ? await loadPeftFrom(unfilled, adapter) : attachLora(unfilled, adapter);
      if (batches.length > 0 && size.takesFromBase) planLoraGa(attached, batches);
      for (const batch of batches) batch.destroy();
      if (size.takesFromBase) attached.start(zeros(attached), true);
      const pairs = size.preference ? preferenceTask(unfilled) : undefined;
      pairs?.evaluation?.(pairs.largest(size.batchSize, size.maxLength)); // the reference
      const { samples } = size;
      const sample = () => samples && planGeneration(unfilled, samples.promptLength, samples.maxTokens);
      if (!size.evaluation) sample(); // when the steps are over
      const learned = {
        model: unfilled,
        task: pairs ?? languageTask(unfilled, size, size.packing),
        adapter: attached,
        ...(size.evaluation && { between: sample }),
      };
      if (!size.loraFa) return { ...learned, parameters: attached.parameters };
      return { ...learned, parameters: freezeA(attached), projections: squares(attached) };
    },
    size,
  );
  return { ...plan, bits };
}

/** The batches that the start looks at, cut to the size that is planned. */
const calibration = (model: CausalModel, { calibration: by, batchSize, maxLength }: RunSize) => {
  if (!by) return [];
  const cut = by.rows.map(({ inputIds, labels, ...row }) => ({
    ...{ ...row, inputIds: inputIds.slice(0, maxLength), labels: labels.slice(0, maxLength) },
  }));
  return calibrationBatches(model, cut, { batchSize, batches: by.batches });
};

/** Whether these adapters can be trained in one batch, and fit. */
export async function fitTogether(
  gpu: Gpu,
  model: string,
  adapters: readonly LoraConfig[],
  size: Pick<RunSize, "weights" | "batchSize" | "maxLength" | "packing" | "evaluation">,
  budget: number,
): Promise<boolean> {
  try {
    const { peak } = await planTraining(
      gpu,
      async (dry) => {
        const unfilled = await emptyModel(dry, diskDirectory(model), { weights: size.weights });
        return { model: unfilled, shared: new SharedBase(adapters.map((config) => attachLora(unfilled, config))) };
      },
      size,
    );
    return peak <= budget;
  } catch (error) {
    if (error instanceof GpuError || error instanceof ShapeError) return false;
    throw error;
  }
}

const zeros = ({ pairs }: LoraAdapter): Map<string, Record<"A" | "B", Float32Array>> =>
  new Map([...pairs].map(([name, { A, B }]) => [name, { A: new Float32Array(A.size), B: new Float32Array(B.size) }]));

/** A matrix [r,r] for each B. */
const squares = ({ pairs }: LoraAdapter): Map<Tensor, Tensor> =>
  new Map([...pairs.values()].map(({ A, B }) => [B, empty(A.gpu, [A.shape[0] ?? 0, A.shape[0] ?? 0], "plan")]));

/** The plan of a run if it fits. Throws GpuError, with what would make it fit, if it does not. */
export async function demandFit(
  gpu: Gpu,
  model: string,
  adapter: LoraConfig | string,
  size: RunSize,
  asked: number | undefined,
): Promise<RunPlan> {
  const budget = budgetOf(gpu, asked) ?? Number.POSITIVE_INFINITY;
  const tried = await attempt(gpu, model, adapter, size);
  if (typeof tried !== "string" && tried.peak <= budget) return tried;
  const what =
    typeof tried === "string"
      ? tried
      : `plan: a run must fit into ${bytes(budget)} of GPU memory, got ${bytes(tried.peak)}: ${parts(tried)}`;
  const way = await wayOut(gpu, model, adapter, size, budget);
  throw new GpuError(`${what}. ${way}`);
}

async function attempt(
  gpu: Gpu,
  model: string,
  adapter: LoraConfig | string,
  size: RunSize,
): Promise<RunPlan | string> {
  try {
    return await planOf(gpu, model, adapter, size);
  } catch (error) {
    if (error instanceof GpuError) return error.message.replace(/\. Use .*$/, "");
    throw error;
  }
}

/** The first of ever smaller runs that fits: checkpointing, then fewer rows, then shorter ones. */
async function wayOut(
  gpu: Gpu,
  model: string,
  adapter: LoraConfig | string,
  size: RunSize,
  budget: number,
): Promise<string> {
  let smaller: RunSize = { ...size, checkpointing: true };
  for (;;) {
    const tried = await attempt(gpu, model, adapter, smaller);
    if (typeof tried !== "string" && tried.peak <= budget) {
      const changes = [
        ...(size.checkpointing ? [] : ["--checkpointing"]),
        ...(smaller.batchSize < size.batchSize ? [`--batch-size ${smaller.batchSize}`] : []),
        ...(smaller.maxLength < size.maxLength ? [`--max-length ${smaller.maxLength}`] : []),
      ];
      return `Use ${changes.join(" ")}, which takes ${bytes(tried.peak)}`;
    }
    if (smaller.batchSize > 1) smaller = { ...smaller, batchSize: Math.floor(smaller.batchSize / 2) };
    else if (smaller.maxLength > 32) smaller = { ...smaller, maxLength: Math.floor(smaller.maxLength / 2) };
    else return "Use a smaller model or another device: no batch is small enough";
  }
}

const parts = ({ weights, trained, gradients, optimizer, activations }: MemoryPlan): string =>
  `weights ${bytes(weights)}, adapter ${bytes(trained)}, gradients ${bytes(gradients)}, optimizer ${bytes(optimizer)}, activations ${bytes(activations)}`;

async function run(given: PlanArguments): Promise<void> {
  const options = await located(given, false);
  const { batchSize, gradAccumulation, checkpointing = false } = options;
  const { config } = await openReader(options.model);
  const maxLength = options.maxLength ?? Math.min(512, config.contextLength);
  const size = {
    ...{ batchSize, maxLength, gradAccumulation, checkpointing },
    takesFromBase: keepsTwice(options),
    loraFa: options.loraFa ?? false,
    weights: trainedFormat(options),
    preference: options.preference !== undefined,
  };
  const adapter = plannedConfig(options);
  await withGpu(async (gpu) => {
    const budget = budgetOf(gpu, options.budget);
    const { weights: weight_format, ...sizes } = size;
    const about = { ...sizes, weight_format, device: deviceName(gpu.info) };
    const tried = await attempt(gpu, options.model, adapter, size);
    if (typeof tried === "string") {
      const advice = await wayOut(gpu, options.model, adapter, size, budget ?? Number.POSITIVE_INFINITY);
      process.exitCode = 1;
      const said = { ...about, budget: budget ?? null, fits: false, reason: tried, advice };
      result(options.json ? JSON.stringify(said) : `cannot be: ${tried}. ${advice}`);
      return;
    }
    const { bits, ...plan } = tried;
    const fits = budget === undefined ? null : plan.peak <= budget;
    const advice = fits === false ? await wayOut(gpu, options.model, adapter, size, budget ?? 0) : null;
    if (fits === false) process.exitCode = 1;
    if (options.json) {
      result(JSON.stringify({ ...about, ...plan, bits_per_weight: bits, budget: budget ?? null, fits, advice }));
      return;
    }
    const lines = {
      weights: plan.weights,
      adapter: plan.trained,
      gradients: plan.gradients,
      optimizer: plan.optimizer,
      activations: plan.activations,
      other: plan.rest,
      peak: plan.peak,
    };
    for (const [name, count] of Object.entries(lines)) result(`${name.padEnd(12)} ${bytes(count).padStart(12)}`);
    result(bitsLine(bits));
    result(
      `${number(plan.dispatches)} dispatches a step of ${number((size.preference ? 2 : 1) * batchSize * maxLength)} tokens`,
    );
    if (budget === undefined)
      result("WebGPU does not tell how much memory a device has: give --budget to know whether this fits");
    else result(fits ? `fits into ${bytes(budget)}` : `does not fit into ${bytes(budget)}. ${advice}`);
  });
}

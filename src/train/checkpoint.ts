/** The state of a training run as one file: what a run that was cut off goes on from. */
import type { Directory } from "../io/bytes.ts";
import { decodeFloats } from "../io/dtype.ts";
import { FormatError } from "../io/errors.ts";
import { isObject, parseJsonObject } from "../io/json.ts";
import { encodeSafetensors, openSafetensors, type TensorToWrite } from "../io/safetensors.ts";
import type { AdamWState } from "./adamw.ts";
import type { TrainingStepState } from "./step.ts";
import type { BestSoFar } from "./validation.ts";

/**
 * A run between two steps. With the same options it goes on from here bit for bit: batches, learning rates and dropout masks follow from
 * their numbers, so no generator has a state of its own.
 */
export interface TrainingState extends TrainingStepState {
  /** Of the evaluations so far, where there were any. */
  readonly best?: BestSoFar | undefined;
  /** Rows so far, where they are a stream. */
  readonly rowCount?: number | undefined;
}

const KINDS = ["p", "m", "v"] as const;
/** Of the layout of the file. */
const FORMAT = 1;

/** The state as a safetensors file: parameters and moments of the i-th run as `i.p`, `i.m`, `i.v`, the rest as JSON in its metadata. */
export function encodeState({
  optimizer,
  batchCount,
  badSteps,
  best,
  rowCount,
}: TrainingState): AsyncIterable<Uint8Array> {
  const tensors = optimizer.runs.flatMap((run, i) => KINDS.map((kind) => floats(`${i}.${kind}`, run[kind])));
  const counts = { step: optimizer.stepCount, batches: batchCount, bad_steps: badSteps, rows: rowCount };
  const rest = { format: FORMAT, ...counts, best };
  return encodeSafetensors(tensors, { training: JSON.stringify(rest) });
}

function floats(name: string, values: Float32Array): TensorToWrite {
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  return { name, dtype: "F32", shape: [values.length], sizeBytes: values.byteLength, data: async () => bytes };
}

/** Reads what `encodeState` wrote. Throws FormatError where the file is missing or is not a whole state. */
export async function decodeState(directory: Directory, file: string): Promise<TrainingState> {
  const name = `${directory.name}/${file}`;
  const source = await directory.open(file);
  if (!source) throw new FormatError(`${name}: must be a training state, got nothing there`);
  const { metadata, tensors, read } = await openSafetensors(source, name);
  const { format, step, batches, bad_steps, rows, best } = parseJsonObject(metadata.get("training") ?? "{}", name);
  if (format !== FORMAT)
    throw new FormatError(`${name}: must be a training state of format ${FORMAT}, got ${JSON.stringify(format)}`);
  const areThere = isCount(step) && isCount(batches) && isCount(bad_steps);
  if (!areThere || !(rows === undefined || isCount(rows)) || !(best === undefined || isBest(best)))
    throw new FormatError(
      `${name}: step, batches, bad_steps, rows and best must be numbers, got ${metadata.get("training")}`,
    );
  const values = async (key: string): Promise<Float32Array> => decodeFloats("F32", await read(key));
  const runs: AdamWState["runs"][number][] = [];
  for (let i = 0; i < tensors.size / KINDS.length; i++)
    runs.push({ p: await values(`${i}.p`), m: await values(`${i}.m`), v: await values(`${i}.v`) });
  return { optimizer: { stepCount: step, runs }, batchCount: batches, badSteps: bad_steps, best, rowCount: rows };
}

const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && Number(value) >= 0;
const isBest = (value: unknown): value is BestSoFar =>
  isObject(value) && isCount(value.step) && isCount(value.since) && typeof value.loss === "number";

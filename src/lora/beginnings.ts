/** What adapters that began with a part of the base have besides their parts, as a file of a checkpoint. */
import type { Directory } from "../io/bytes.ts";
import { decodeFloats } from "../io/dtype.ts";
import { FormatError } from "../io/errors.ts";
import { encodeSafetensors, openSafetensors } from "../io/safetensors.ts";
import { tensorToWrite } from "../nn/checkpoint.ts";
import type { LoraAdapter } from "./adapter.ts";

const FACTORS = ["A", "B"] as const;

/** A₀ and B₀ of each module as `<module>.A` and `<module>.B`, exactly. */
export function encodeBeginnings({ beginnings }: LoraAdapter): AsyncIterable<Uint8Array> {
  const tensors = [...beginnings].flatMap(([name, beginning]) =>
    FACTORS.map((factor) => tensorToWrite(`${name}.${factor}`, beginning[factor])),
  );
  return encodeSafetensors(tensors);
}

/**
 * Starts a fresh adapter of the same settings as the one whose beginnings these are: see `LoraAdapter.start`. Nothing is decomposed again.
 * Throws FormatError where the file is missing or has not what the adapter needs, ShapeError as `start`.
 */
export async function startFrom(adapter: LoraAdapter, directory: Directory, file: string): Promise<void> {
  const source = await directory.open(file);
  if (!source) throw new FormatError(`${directory.name}/${file}: must be there, got nothing`);
  const { tensors, read } = await openSafetensors(source, `${directory.name}/${file}`);
  const starts = new Map<string, Record<"A" | "B", Float32Array>>();
  for (const [name, pair] of adapter.pairs) {
    const values = async (factor: "A" | "B"): Promise<Float32Array> => {
      const [key, shape] = [`${name}.${factor}`, pair[factor].shape];
      if (String(tensors.get(key)?.shape) !== String(shape))
        throw new FormatError(
          `${directory.name}/${file}: ${key} must be [${shape}], got [${tensors.get(key)?.shape ?? ""}]`,
        );
      return decodeFloats("F32", await read(key));
    };
    starts.set(name, { A: await values("A"), B: await values("B") });
  }
  adapter.start(starts, true);
}

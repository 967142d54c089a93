/** What an adapter begins with: PEFT's usual start. */
import { copyTo } from "../kernels/copy-rows.ts";
import { doraNorms } from "../kernels/dora.ts";
import { embedding } from "../kernels/embedding.ts";
import type { Linear } from "../nn/linear.ts";
import type { Table } from "../nn/table.ts";
import { piecesOf } from "../tensor/pieces.ts";
import type { Random } from "../tensor/random.ts";
import { empty, type Tensor, tensor } from "../tensor/tensor.ts";
import { type LoraConfig, settingsOf } from "./config.ts";
import { rowSquares } from "./dora-linear.ts";
import type { LoraParts, TableParts } from "./parts.ts";
import { type TokenTarget, tableSize } from "./tables.ts";

function uniform(gpu: Tensor["gpu"], r: number, K: number, random: Random): Tensor {
  const bound = 1 / Math.sqrt(K);
  const values = Float32Array.from({ length: r * K }, () => random.uniform(-bound, bound));
  return tensor(gpu, values, [r, K]);
}

export function freshPair(config: LoraConfig, name: string, layer: Linear, random: Random): LoraParts {
  const { r, scale: s } = settingsOf(config, name);
  const [N = 0, K = 0] = layer.weight.shape;
  const { gpu } = layer.weight;
  const A = uniform(gpu, r, K, random);
  const B = tensor(gpu, new Float32Array(N * r), [N, r]);
  const isBiased = config.bias === "lora_only" || config.bias === "all";
  const bias = isBiased && layer.bias ? empty(gpu, [N], "bias") : undefined;
  if (bias && layer.bias) copyTo(layer.bias, bias);
  return {
    ...{ A, B, bias },
    loraBias: config.loraBias ? tensor(gpu, new Float32Array(N), [N]) : undefined,
    magnitude: config.useDora
      ? gpu.scope(() => doraNorms(layer.weight, A, B, rowSquares(layer.weight), s).gain)
      : undefined,
  };
}

export function freshTable(r: number, table: Table, random: Random): TableParts {
  const [V, C] = tableSize(table);
  const { gpu } = table.weight[0] as Tensor;
  const X = tensor(gpu, new Float32Array(V * r), [V, r]);
  if (table.use === "head") return { X, Y: uniform(gpu, r, C, random) };
  const values = Float32Array.from({ length: r * C }, () => random.normal(0, 1));
  return { X, Y: tensor(gpu, values, [r, C]) };
}

/** The rows as they are. */
export function freshRows({ tables: [table], ids }: TokenTarget): Tensor {
  const { weight } = table as Table;
  const { gpu } = weight[0] as Tensor;
  return gpu.scope(() => embedding(piecesOf(weight), tensor(gpu, Int32Array.from(ids), [ids.length])));
}

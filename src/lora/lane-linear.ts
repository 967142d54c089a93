import { adding, record } from "../autograd/engine.ts";
import { matmul } from "../kernels/matmul.ts";
import { sumTo } from "../kernels/reduce.ts";
import { isPacked } from "../tensor/packed.ts";
import { dims2, empty, rowsOf, type Tensor, view } from "../tensor/tensor.ts";
import { type LoraLayer, shrink, throughB } from "./lora-linear.ts";

/** Rows of a batch that go through an adapter of their own. */
export interface Lane {
  /** The first of its rows, and how many they are. */
  readonly first: number;
  readonly rows: number;
  /** [G·R,K]: the A's of the layers, one below the other. */
  readonly A: Tensor;
  /** Of each layer. */
  readonly pairs: readonly Pick<LoraLayer, "A" | "B">[];
  readonly scale: number;
}

/**
 * LoRA linear layers that read the same x, whose rows belong to several adapters: yᵢ = x·Wᵢᵀ + biasᵢ, and to the rows of lane l is added
 * sₗ·(xₗ·Aₗᵢᵀ)·Bₗᵢᵀ.
 *
 *     z [M,N]   row by row what the lanes add; each of their products has the rows of one lane alone
 *     w [M,K]   of the backward pass, vₗ·Aₗᵢ; dx = dy·W + w
 *
 * Each W is in one product forward and one for dx, however many lanes there are, and no sum goes over rows of two lanes: what is not finite in
 * one does not reach another. The lanes take all M rows, one lane below the other. Throws ShapeError where rows do not begin where a view may.
 */
export function laneLinears(
  x: Tensor,
  layers: readonly Pick<LoraLayer, "W" | "bias">[],
  lanes: readonly Lane[],
): Tensor[] {
  const { gpu } = x;
  const [M, K] = dims2("laneLinears", "x", x);
  const of = (t: Tensor, { first, rows }: Lane): Tensor => rowsOf(view(t, dims2("laneLinears", "t", t)), first, rows);
  const shrunk = lanes.map((lane) => {
    const As = lane.pairs.map(({ A }) => A);
    return { lane, ...shrink(of(x, lane), lane.A, As) };
  });

  return layers.map(({ W, bias }, i) => {
    const [N] = W.shape as [number, number];
    const parts = shrunk.map((one) => ({ ...one, ...(one.lane.pairs[i] as Lane["pairs"][number]) }));
    const y = gpu.scope(() => {
      const z = empty(gpu, [...x.shape.slice(0, -1), N], "laneLinears");
      for (const { lane, block, B } of parts) matmul(block(i), B, "nt", { scale: lane.scale, out: of(z, lane) });
      return matmul(x, W, "nt", { residual: z, ...(bias && { bias }) });
    });
    const base = isPacked(W) ? [] : [W];
    const inputs = [...parts.map(({ u }) => u), x, ...parts.map(({ B }) => B), ...(bias ? [bias] : []), ...base];
    return record("laneLinears", y, inputs, (dy) => {
      const back = parts.map(({ lane, u, block, B }) =>
        throughB(of(dy, lane), B, block(i), lane.scale, u.requiresGrad || x.requiresGrad),
      );
      const dx = adding((sum) => {
        const low = back.map(({ v }) => v());
        return gpu.scope(() => {
          const w = empty(gpu, x.shape, "laneLinears");
          parts.forEach(({ lane, A }, l) => {
            matmul(low[l] as Tensor, A, "nn", { out: of(w, lane), ...(sum && { residual: of(sum, lane) }) });
          });
          return matmul(dy, W, "nn", { residual: w });
        });
      });
      return [
        ...parts.map(({ gradient }, l) => adding((sum) => gradient(i, back[l]?.v as (out: Tensor) => Tensor, sum))),
        dx,
        ...back.map(({ dB }) => dB),
        ...(bias ? [() => sumTo(dy, bias.shape)] : []),
        () => matmul(view(dy, [M, N]), view(x, [M, K]), "tn"), // never run while W is frozen
      ];
    });
  });
}

import { defineKernel, type Uniform } from "../gpu/kernel.ts";
import { dims2, empty, expectDType, expectShape, type Tensor } from "../tensor/tensor.ts";
import source from "./cross-entropy.wgsl";
import backwardSource from "./cross-entropy-backward.wgsl";
import { reduce } from "./reduce.ts";

const forward = defineKernel("cross-entropy", source);
const backward = defineKernel("cross-entropy-backward", backwardSource);

/**
 * scale·Σ over rows with a label ≥ 0 of (log Σ exp(x) − x[label]), shape []; stats [rows,2] are kept for backward.
 *
 * x [...,V], labels i32 [...]; a negative label takes no part. Throws ShapeError if they do not fit.
 */
export function crossEntropy(x: Tensor, labels: Tensor, scale: Uniform): { loss: Tensor; stats: Tensor } {
  const [M, V] = dims2("crossEntropy", "logits", x);
  expectShape("crossEntropy", "labels must be the leading axes of logits", labels, x.shape.slice(0, -1));
  expectDType("crossEntropy", "labels", labels, "i32");
  const losses = empty(x.gpu, [M], "crossEntropy");
  const stats = empty(x.gpu, [M, 2], "crossEntropy");
  forward(x.gpu, { M, V, c: scale }, { x, labels, loss: losses, stats }, [M]);
  const loss = reduce("sum", losses);
  x.gpu.release(losses);
  return { loss, stats };
}

/** dx of `crossEntropy`, like x; dy has one element. */
export function crossEntropyBackward(dy: Tensor, x: Tensor, labels: Tensor, stats: Tensor, scale: Uniform): Tensor {
  const dx = empty(x.gpu, x.shape, "crossEntropyBackward");
  backward(x.gpu, { n: x.size, V: x.shape.at(-1) ?? 0, c: scale }, { x, labels, stats, dy, dx }, [x.size]);
  return dx;
}

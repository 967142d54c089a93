import { defineKernel } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { empty, expectDType, type Shape, type Tensor } from "../tensor/tensor.ts";
import narrowSource from "./narrow16.wgsl";
import widenSource from "./widen16.wgsl";

const widen = defineKernel("widen16", widenSource);
const narrow = defineKernel("narrow16", narrowSource);

/** The two 16-bit float formats: IEEE binary16, and the upper half of an f32. */
export type Half = "f16" | "bf16";

/**
 * 16-bit floats as f32 of this shape, exactly. `words` is i32 and holds two floats to a word, the first in its low half, as
 * files do.
 *
 * Throws ShapeError if it holds fewer than the shape needs.
 */
export function widen16(words: Tensor, shape: Shape, from: Half): Tensor {
  expectDType("widen16", "words", words, "i32");
  const y = empty(words.gpu, shape, "widen16");
  if (2 * words.size < y.size)
    throw new ShapeError(`widen16: [${shape}] needs ${Math.ceil(y.size / 2)} words, got ${words.size}`);
  widen(words.gpu, { n: y.size }, { x: words, y }, [y.size], { BF16: from === "bf16" ? 1 : 0 });
  return y;
}

/**
 * f32 as 16-bit floats, to nearest, ties to even: i32 words [⌈n/2⌉] of two, the first in its low half. Too large a value
 * becomes infinity; NaN stays NaN.
 */
export function narrow16(x: Tensor, to: Half): Tensor {
  expectDType("narrow16", "x", x, "f32");
  const y = empty(x.gpu, [Math.ceil(x.size / 2)], "narrow16", "i32");
  narrow(x.gpu, { n: x.size, words: y.size }, { x, y }, [y.size], { BF16: to === "bf16" ? 1 : 0 });
  return y;
}

import { matmul } from "../kernels/matmul.ts";
import { type LinearOperator, type Matrix, matrix } from "../tensor/linalg.ts";
import { empty, read, type Tensor, tensor } from "../tensor/tensor.ts";

/** W [N,K] on the device as what `randomizedSvd` asks for: products are made there, in f32, and only they are read. */
export function deviceOperator(W: Tensor): LinearOperator {
  const [rows = 0, columns = 0] = W.shape;
  const product = async (layout: "nn" | "tn", { rows: inner, columns: l, data }: Matrix): Promise<Matrix> => {
    const y = W.gpu.scope(() => matmul(W, tensor(W.gpu, Float32Array.from(data), [inner, l]), layout));
    const values = await read(y);
    W.gpu.release(y);
    return matrix(layout === "nn" ? rows : columns, l, values);
  };
  return { rows, columns, times: (X) => product("nn", X), transposeTimes: (X) => product("tn", X) };
}

/** Makes and frees what the products of `deviceOperator` with l columns need: how a plan knows. */
export function planOperator(W: Tensor, l: number): void {
  const [rows = 0, columns = 0] = W.shape;
  for (const [inner, layout] of [
    [columns, "nn"],
    [rows, "tn"],
  ] as const)
    W.gpu.release(W.gpu.scope(() => matmul(W, empty(W.gpu, [inner, l], "plan"), layout)));
}

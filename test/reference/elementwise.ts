import { type Nd, nd, zeros } from "../harness.ts";

const at = ({ data }: Nd, i: number): number => data[i] ?? Number.NaN;

/** op(a, b) with NumPy's broadcasting, by walking the index of every element. */
export function binaryTwin(op: "add" | "sub" | "mul", a: Nd, b: Nd): Nd {
  const rank = Math.max(a.shape.length, b.shape.length);
  const shape = Array.from({ length: rank }, (_, i) => Math.max(a.shape.at(i - rank) ?? 1, b.shape.at(i - rank) ?? 1));
  const y = zeros(shape);
  y.data.forEach((_, i) => {
    const [p, q] = [a, b].map((operand) => {
      let [rest, offset, stride] = [i, 0, 1];
      for (let axis = 1; axis <= rank; axis++) {
        const size = operand.shape.at(-axis) ?? 1;
        const index = rest % (shape.at(-axis) ?? 1);
        rest = Math.floor(rest / (shape.at(-axis) ?? 1));
        if (axis <= operand.shape.length && size !== 1) offset += index * stride;
        stride *= size;
      }
      return at(operand, offset);
    }) as [number, number];
    y.data[i] = op === "add" ? p + q : op === "sub" ? p - q : p * q;
  });
  return y;
}

export const siluTwin = ({ shape, data }: Nd): Nd =>
  nd(
    shape,
    data.map((x) => x / (1 + Math.exp(-x))),
  );

export function geluTwin({ shape, data }: Nd, approximate: "none" | "tanh" = "none"): Nd {
  const phi = (x: number): number =>
    0.5 *
    (1 + (approximate === "tanh" ? Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)) : erf(x / Math.SQRT2)));
  return nd(
    shape,
    data.map((x) => x * phi(x)),
  );
}

/** erf by its series 2/√π·e^(−x²)·Σ 2ⁿx²ⁿ⁺¹/(2n+1)!!, whose terms all have one sign; 1 where f64 cannot tell. */
function erf(x: number): number {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x;
  let sum = x;
  for (let n = 1; n < 200; n++) {
    term *= (2 * x * x) / (2 * n + 1);
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

export const tanhTwin = ({ shape, data }: Nd): Nd => nd(shape, data.map(Math.tanh));

import { type Nd, nd, zeros } from "../harness.ts";

const at = ({ data }: Nd, i: number): number => data[i] ?? Number.NaN;

/** x·rsqrt(mean(x²) + eps)·w over the last axis. */
export function rmsNormTwin(x: Nd, w: Nd, eps: number): Nd {
  return mapRows(x, (row) => {
    const r = 1 / Math.sqrt(mean(row.map((v) => v * v)) + eps);
    return row.map((v, h) => v * r * at(w, h));
  });
}

/** (x − mean)·rsqrt(var + eps)·w + b over the last axis. */
export function layerNormTwin(x: Nd, w: Nd, b: Nd, eps: number): Nd {
  return mapRows(x, (row) => {
    const center = mean(row);
    const r = 1 / Math.sqrt(mean(row.map((v) => (v - center) ** 2)) + eps);
    return row.map((v, h) => (v - center) * r * at(w, h) + at(b, h));
  });
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

function mapRows({ shape, data }: Nd, f: (row: number[]) => number[]): Nd {
  const H = shape.at(-1) ?? 0;
  const rows = Array.from({ length: data.length / H }, (_, i) => f([...data.subarray(i * H, (i + 1) * H)]));
  return nd(shape, rows.flat());
}

/** cos and sin [P,D/2] of position·theta^(−2i/D), rounded to f32. */
export function rotaryTables(P: number, D: number, theta: number): { cos: Nd; sin: Nd } {
  const angles = Array.from(
    { length: (P * D) / 2 },
    (_, i) => Math.floor((2 * i) / D) * theta ** ((-2 * (i % (D / 2))) / D),
  );
  const table = (f: (angle: number) => number): Nd =>
    nd(
      [P, D / 2],
      angles.map((a) => Math.fround(f(a))),
    );
  return { cos: table(Math.cos), sin: table(Math.sin) };
}

/** Each pair (i, i + D/2) of x [B,T,H,D], as a complex number, times cos + i·sin of its position. */
export function ropeTwin(x: Nd, cos: Nd, sin: Nd, offset: number): Nd {
  const [, T = 0, H = 0] = x.shape;
  let row = 0;
  return mapRows(x, (values) => {
    const half = values.length / 2;
    const position = offset + (Math.floor(row++ / H) % T);
    return values.map((v, i) => {
      const angle = position * half + (i % half);
      const other = i < half ? -(values[i + half] ?? Number.NaN) : (values[i - half] ?? Number.NaN);
      return v * at(cos, angle) + other * at(sin, angle);
    });
  });
}

/** Rows of w [V,H] by ids. */
export function embeddingTwin(w: Nd, ids: Nd): Nd {
  const H = w.shape[1] ?? 0;
  return nd(
    [...ids.shape, H],
    [...ids.data].flatMap((id) => [...w.data.subarray(id * H, (id + 1) * H)]),
  );
}

/** Causal attention, one row of scores at a time. q [B,T,H,D], k and v [B,S,G,D]. */
export function attentionTwin(q: Nd, k: Nd, v: Nd, scale: number, keyLength: number): Nd {
  const [B = 0, T = 0, H = 0, D = 0] = q.shape;
  const [, S = 0, G = 0] = k.shape;
  const o = zeros(q.shape);
  for (let b = 0; b < B; b++)
    for (let t = 0; t < T; t++)
      for (let h = 0; h < H; h++) {
        const row = ((b * T + t) * H + h) * D;
        const key = (j: number): number => ((b * S + j) * G + Math.floor(h / (H / G))) * D;
        const scores = Array.from({ length: keyLength - T + t + 1 }, (_, j) => {
          let dot = 0;
          for (let i = 0; i < D; i++) dot += at(q, row + i) * at(k, key(j) + i);
          return scale * dot;
        });
        const top = Math.max(...scores);
        const weights = scores.map((s) => Math.exp(s - top));
        const sum = weights.reduce((x, y) => x + y, 0);
        for (let i = 0; i < D; i++)
          o.data[row + i] = weights.reduce((total, p, j) => total + (p / sum) * at(v, key(j) + i), 0);
      }
  return o;
}

/** scale·Σ −log softmax(x)[label] over the rows with a label ≥ 0. */
export function crossEntropyTwin(x: Nd, labels: Nd, scale: number): Nd {
  const V = x.shape.at(-1) ?? 0;
  let loss = 0;
  labels.data.forEach((label, i) => {
    if (label < 0) return;
    const row = [...x.data.subarray(i * V, (i + 1) * V)];
    const top = Math.max(...row);
    loss += Math.log(row.reduce((sum, v) => sum + Math.exp(v - top), 0)) + top - (row[label] ?? Number.NaN);
  });
  return nd([], [scale * loss]);
}

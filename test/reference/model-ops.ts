import { type Nd, nd, zeros } from "../harness.ts";

const at = ({ data }: Nd, i: number): number => data[i] ?? Number.NaN;

/** x·rsqrt(mean(x²) + eps)·(offset + w) over the last axis. */
export function rmsNormTwin(x: Nd, w: Nd, eps: number, offset = 0): Nd {
  return mapRows(x, (row) => {
    const r = 1 / Math.sqrt(mean(row.map((v) => v * v)) + eps);
    return row.map((v, h) => v * r * (offset + at(w, h)));
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

/** Each pair (i, i + E/2) of x [B,T,H,D], as a complex number, times cos + i·sin [P,E/2] of its position: where + t, or where[b,t]. */
export function ropeTwin(x: Nd, cos: Nd, sin: Nd, where: number | Nd): Nd {
  const [, T = 0, H = 0] = x.shape;
  let row = 0;
  return mapRows(x, (values) => {
    const half = cos.shape[1] ?? 0;
    const token = Math.floor(row++ / H);
    const position = typeof where === "number" ? where + (token % T) : at(where, token);
    return values.map((v, i) => {
      if (i >= 2 * half) return v;
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

/** What attention may be told besides; see `AttentionInputs`. starts [B,T], lengths [B]. */
export interface AttentionTwinOptions {
  readonly window?: number | undefined;
  readonly softCap?: number | undefined;
  readonly starts?: Nd | undefined;
  readonly lengths?: Nd | undefined;
}

/** Attention, causal unless there are lengths, one row of scores at a time. q [B,T,H,D], k and v [B,S,G,D]. */
export function attentionTwin(
  q: Nd,
  k: Nd,
  v: Nd,
  scale: number,
  keyLength: number,
  options: AttentionTwinOptions = {},
): Nd {
  return attentionGradientTwin(q, k, v, scale, keyLength, options).o;
}

/** `attentionTwin`, and its gradients where a dy is given, by softmax's own formula: what central differences say of it is tested. */
export function attentionGradientTwin(
  q: Nd,
  k: Nd,
  v: Nd,
  scale: number,
  keyLength: number,
  { window = Number.POSITIVE_INFINITY, softCap, starts, lengths }: AttentionTwinOptions,
  dy?: Nd,
): { o: Nd; dq: Nd; dk: Nd; dv: Nd } {
  const [B = 0, T = 0, H = 0, D = 0] = q.shape;
  const [, S = 0, G = 0] = k.shape;
  const [o, dq, dk, dv] = [zeros(q.shape), zeros(q.shape), zeros(k.shape), zeros(v.shape)];
  const dot = (a: Nd, i: number, b: Nd, j: number): number => {
    let sum = 0;
    for (let n = 0; n < D; n++) sum += at(a, i + n) * at(b, j + n);
    return sum;
  };
  const addTo = (y: Nd, i: number, c: number, x: Nd, j: number): void => {
    for (let n = 0; n < D; n++) y.data[i + n] = at(y, i + n) + c * at(x, j + n);
  };
  for (let b = 0; b < B; b++)
    for (let t = 0; t < T; t++)
      for (let h = 0; h < H; h++) {
        const row = ((b * T + t) * H + h) * D;
        const position = keyLength - T + t;
        const end = lengths ? at(lengths, b) : position + 1;
        const first = Math.max(0, position - window + 1, starts ? at(starts, b * T + t) : 0);
        const keys = Array.from(
          { length: end - first },
          (_, j) => ((b * S + first + j) * G + Math.floor(h / (H / G))) * D,
        );
        const bends = keys.map((key) => Math.tanh((scale * dot(q, row, k, key)) / (softCap ?? 1)));
        const scores = keys.map((key, j) => (softCap ? softCap * (bends[j] ?? 0) : scale * dot(q, row, k, key)));
        const top = Math.max(...scores);
        const weights = scores.map((s) => Math.exp(s - top));
        const sum = weights.reduce((x, y) => x + y, 0);
        const p = weights.map((weight) => weight / sum);
        keys.forEach((key, j) => {
          addTo(o, row, p[j] ?? 0, v, key);
        });
        if (!dy) continue;
        const dp = keys.map((key) => dot(dy, row, v, key));
        const delta = dp.reduce((total, value, j) => total + value * (p[j] ?? 0), 0);
        keys.forEach((key, j) => {
          const bend = softCap ? 1 - (bends[j] ?? 0) ** 2 : 1;
          const ds = scale * bend * (p[j] ?? 0) * ((dp[j] ?? 0) - delta);
          addTo(dq, row, ds, k, key);
          addTo(dk, key, ds, q, row);
          addTo(dv, key, p[j] ?? 0, dy, row);
        });
      }
  return { o, dq, dk, dv };
}

/** scale·Σ −log softmax(x)[label] over the rows with a label ≥ 0. */
export function crossEntropyTwin(x: Nd, labels: Nd, scale: number, smoothing = 0): Nd {
  const V = x.shape.at(-1) ?? 0;
  let loss = 0;
  labels.data.forEach((label, i) => {
    if (label < 0) return;
    const row = [...x.data.subarray(i * V, (i + 1) * V)];
    const top = Math.max(...row);
    const log = Math.log(row.reduce((sum, v) => sum + Math.exp(v - top), 0)) + top;
    const uniform = row.reduce((sum, v) => sum + (log - v), 0) / V;
    loss += (1 - smoothing) * (log - (row[label] ?? Number.NaN)) + smoothing * uniform;
  });
  return nd([], [scale * loss]);
}

/** Rows whose label is the argmax, the first of ties. */
export function hitsTwin(x: Nd, labels: Nd): number {
  const V = x.shape.at(-1) ?? 0;
  return [...labels.data].filter((label, i) => {
    const row = x.data.subarray(i * V, (i + 1) * V);
    return label >= 0 && row.indexOf(Math.max(...row)) === label;
  }).length;
}

/** A Llama's training step in f64 on the host, forward and backward written out: what the results of a step must be. */
import type { DoraMagnitude, HostMatrix, LlamaStep } from "../peers/peer.ts";

/** Row-major. */
interface M64 {
  readonly rows: number;
  readonly columns: number;
  readonly values: Float64Array;
}

export interface StepValues {
  readonly loss: number;
  readonly gradNorm: number;
  /** By "A of …", "B of …" and DoRA's "m of …", or by the names of the weights where those are trained. */
  readonly gradients: ReadonlyMap<string, Float64Array>;
}

/** What the step gives, with the adapter trained and all else frozen, or without it and with every weight trained. */
export function stepInF64(step: LlamaStep, trained: "adapter" | "weights"): StepValues {
  const { layers, heads, kvHeads, headDim: D, ids } = step;
  const T = ids.length;
  const weights = new Map([...step.weights].map(([name, host]) => [name, widen(host)]));
  const get = (name: string): M64 => weights.get(`${name}.weight`) ?? fail(name);
  const gradients = new Map<string, Float64Array>();
  const toWeight = (name: string, dw: M64): void => {
    if (trained === "weights") accumulate(gradients, `${name}.weight`, dw.values);
  };

  /** y, and what dx is from dy. The gradients of its parameters go to `gradients`. */
  const linear = (x: M64, module: string): Node => {
    const W = get(module);
    const y = product(x, W, "nt");
    if (trained === "weights")
      return {
        y,
        back: (dy) => {
          toWeight(module, product(dy, x, "tn"));
          return product(dy, W, "nn");
        },
      };
    const pair = step.adapter.get(module) ?? fail(module);
    const [A, B] = [widen(pair.A), widen(pair.B)];
    const u = product(x, A, "nt");
    addTo(y, scaled(product(u, B, "nt"), step.scale));
    const gain = pair.magnitude && gainOf(y, pair.magnitude);
    return {
      y: gain?.y ?? y,
      back: (outer) => {
        if (gain) gradients.set(`m of ${module}`, gain.dm(outer));
        const dy = gain?.back(outer) ?? outer;
        const v = scaled(product(dy, B, "nn"), step.scale);
        gradients.set(`A of ${module}`, product(v, x, "tn").values);
        gradients.set(`B of ${module}`, scaled(product(dy, u, "tn"), step.scale).values);
        const dx = product(dy, W, "nn");
        addTo(dx, product(v, A, "nn"));
        return dx;
      },
    };
  };
  const norm = (x: M64, name: string): Node => {
    const w = get(name).values;
    const C = x.columns;
    const inverse = Float64Array.from({ length: x.rows }, (_, t) => {
      let squares = 0;
      for (let c = 0; c < C; c++) squares += at(x, t, c) ** 2;
      return 1 / Math.sqrt(squares / C + step.rmsNormEps);
    });
    const r = (t: number): number => inverse[t] ?? 0;
    return {
      y: make(x.rows, C, (t, c) => at(x, t, c) * r(t) * (w[c] ?? 0)),
      back: (dy) => {
        const dw = make(1, C, () => 0);
        const dx = make(x.rows, C, () => 0);
        for (let t = 0; t < x.rows; t++) {
          let dot = 0;
          for (let c = 0; c < C; c++) {
            dot += at(dy, t, c) * (w[c] ?? 0) * at(x, t, c);
            dw.values[c] = (dw.values[c] ?? 0) + at(dy, t, c) * at(x, t, c) * r(t);
          }
          for (let c = 0; c < C; c++)
            dx.values[t * C + c] = r(t) * (at(dy, t, c) * (w[c] ?? 0) - (at(x, t, c) * dot * r(t) ** 2) / C);
        }
        toWeight(name, dw);
        return dx;
      },
    };
  };
  /** By the angles, or back by them. */
  const rotate = (x: M64, sign: 1 | -1): M64 =>
    make(x.rows, x.columns, (t, c) => {
      const [i, half] = [c % D, D / 2];
      const angle = t * half + (i % half);
      const [cos, sin] = [step.cos.values[angle] ?? 0, sign * (step.sin.values[angle] ?? 0)];
      return i < half ? at(x, t, c) * cos - at(x, t, c + half) * sin : at(x, t, c) * cos + at(x, t, c - half) * sin;
    });
  const rope = ({ y, back }: Node): Node => ({ y: rotate(y, 1), back: (dy) => back(rotate(dy, -1)) });

  const embedding = get("model.embed_tokens");
  let h = make(T, embedding.columns, (t, c) => at(embedding, ids[t] ?? 0, c));
  const backs: ((dh: M64) => void)[] = [];
  for (let i = 0; i < layers; i++) {
    const name = `model.layers.${i}`;
    const n = norm(h, `${name}.input_layernorm`);
    const q = rope(linear(n.y, `${name}.self_attn.q_proj`));
    const k = rope(linear(n.y, `${name}.self_attn.k_proj`));
    const v = linear(n.y, `${name}.self_attn.v_proj`);
    const mixed = attention(q.y, k.y, v.y, { heads, kvHeads, D });
    const o = linear(mixed.y, `${name}.self_attn.o_proj`);
    h = sumOf(h, o.y);
    const z = norm(h, `${name}.post_attention_layernorm`);
    const gate = linear(z.y, `${name}.mlp.gate_proj`);
    const up = linear(z.y, `${name}.mlp.up_proj`);
    const silu = gate.y.values.map((g) => g * sigmoid(g));
    const inside = { ...gate.y, values: silu.map((s, j) => s * (up.y.values[j] ?? 0)) };
    const down = linear(inside, `${name}.mlp.down_proj`);
    h = sumOf(h, down.y);
    backs.unshift((d) => {
      const dInside = down.back(d);
      const dGate = dInside.values.map((dy, j) => {
        const g = gate.y.values[j] ?? 0;
        return dy * (up.y.values[j] ?? 0) * sigmoid(g) * (1 + g * (1 - sigmoid(g)));
      });
      const dUp = dInside.values.map((dy, j) => dy * (silu[j] ?? 0));
      const dz = gate.back({ ...dInside, values: dGate });
      addTo(dz, up.back({ ...dInside, values: dUp }));
      addTo(d, z.back(dz));
      const from = mixed.back(o.back(d));
      const dn = q.back(from.dq);
      addTo(dn, k.back(from.dk));
      addTo(dn, v.back(from.dv));
      addTo(d, n.back(dn));
    });
  }
  const last = norm(h, "model.norm");
  const dlogits = product(last.y, embedding, "nt");
  const loss = crossEntropy(dlogits, ids);
  toWeight("model.embed_tokens", product(dlogits, last.y, "tn"));
  const dh = last.back(product(dlogits, embedding, "nn"));
  for (const back of backs) back(dh);
  const dEmbedding = make(embedding.rows, embedding.columns, () => 0);
  for (let t = 0; t < T; t++)
    for (let c = 0; c < dh.columns; c++) {
      const to = (ids[t] ?? 0) * dh.columns + c;
      dEmbedding.values[to] = (dEmbedding.values[to] ?? 0) + at(dh, t, c);
    }
  toWeight("model.embed_tokens", dEmbedding);
  let squares = 0;
  for (const g of gradients.values()) for (const value of g) squares += value * value;
  return { loss, gradNorm: Math.sqrt(squares), gradients };
}

interface Node {
  readonly y: M64;
  readonly back: (dy: M64) => M64;
}

/** DoRA's (m/n)∘z, each column by its own factor; n takes no gradient. */
function gainOf(
  z: M64,
  { m, norms }: DoraMagnitude,
): { y: M64; back: (dy: M64) => M64; dm: (dy: M64) => Float64Array } {
  const by = (x: M64): M64 =>
    make(x.rows, x.columns, (t, j) => (at(x, t, j) * (m.values[j] ?? 0)) / (norms[j] ?? Number.NaN));
  const dm = (dy: M64): Float64Array =>
    norms.map((n, j) => {
      let sum = 0;
      for (let t = 0; t < z.rows; t++) sum += at(dy, t, j) * at(z, t, j);
      return sum / n;
    });
  return { y: by(z), back: by, dm };
}

/** The mean over all tokens but the last one's; the logits become their gradient. */
function crossEntropy(logits: M64, ids: Int32Array): number {
  const [T, V] = [logits.rows, logits.columns];
  let total = 0;
  for (let t = 0; t < T; t++) {
    const row = logits.values.subarray(t * V, (t + 1) * V);
    if (t === T - 1) row.fill(0);
    else {
      const label = ids[t + 1] ?? 0;
      const most = row.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
      const exps = row.reduce((sum, x) => sum + Math.exp(x - most), 0);
      total += most + Math.log(exps) - (row[label] ?? 0);
      for (let w = 0; w < V; w++) row[w] = (Math.exp((row[w] ?? 0) - most) / exps - (w === label ? 1 : 0)) / (T - 1);
    }
  }
  return total / (T - 1);
}

/** Causal, grouped queries: q [T,H·D], k and v [T,G·D]. */
function attention(
  q: M64,
  k: M64,
  v: M64,
  { heads, kvHeads, D }: { readonly heads: number; readonly kvHeads: number; readonly D: number },
): { y: M64; back: (dy: M64) => { dq: M64; dk: M64; dv: M64 } } {
  const T = q.rows;
  const part = (x: M64, head: number): M64 => make(T, D, (t, i) => at(x, t, head * D + i));
  const put = (from: M64, to: M64, head: number): void => {
    for (let t = 0; t < T; t++)
      for (let i = 0; i < D; i++) {
        const to_ = t * to.columns + head * D + i;
        to.values[to_] = (to.values[to_] ?? 0) + at(from, t, i);
      }
  };
  const kvOf = (head: number): number => Math.floor((head * kvHeads) / heads);
  const weightsOf = (head: number): M64 => {
    const scores = scaled(product(part(q, head), part(k, kvOf(head)), "nt"), 1 / Math.sqrt(D));
    for (let t = 0; t < T; t++) {
      const row = scores.values.subarray(t * T, (t + 1) * T);
      const seen = row.subarray(0, t + 1);
      const most = seen.reduce((a, b) => Math.max(a, b), Number.NEGATIVE_INFINITY);
      const total = seen.reduce((sum, x) => sum + Math.exp(x - most), 0);
      for (let s = 0; s < T; s++) row[s] = s > t ? 0 : Math.exp((row[s] ?? 0) - most) / total;
    }
    return scores;
  };
  const y = make(T, heads * D, () => 0);
  const weights = Array.from({ length: heads }, (_, head) => weightsOf(head));
  weights.forEach((p, head) => {
    put(product(p, part(v, kvOf(head)), "nn"), y, head);
  });
  const back = (dy: M64) => {
    const [dq, dk, dv] = [q, k, v].map((x) => make(T, x.columns, () => 0)) as [M64, M64, M64];
    weights.forEach((p, head) => {
      const kv = kvOf(head);
      const d = part(dy, head);
      put(product(p, d, "tn"), dv, kv);
      const dp = product(d, part(v, kv), "nt");
      const ds = make(T, T, () => 0);
      for (let t = 0; t < T; t++) {
        let dot = 0;
        for (let s = 0; s <= t; s++) dot += at(p, t, s) * at(dp, t, s);
        for (let s = 0; s <= t; s++) ds.values[t * T + s] = (at(p, t, s) * (at(dp, t, s) - dot)) / Math.sqrt(D);
      }
      put(product(ds, part(k, kv), "nn"), dq, head);
      put(product(ds, part(q, head), "tn"), dk, kv);
    });
    return { dq, dk, dv };
  };
  return { y, back };
}

/** op(a)·op(b), four columns of the result at a time. */
function product(a: M64, b: M64, layout: "nn" | "nt" | "tn"): M64 {
  const left = layout === "tn" ? transposed(a) : a;
  const right = layout === "nt" ? b : transposed(b);
  const [M, N, K] = [left.rows, right.rows, left.columns];
  const [x, w] = [left.values, right.values];
  const y = new Float64Array(M * N);
  for (let j = 0; j < N; j += 4) {
    const [r0, r1, r2, r3] = [j, j + 1, j + 2, j + 3].map((row) => Math.min(row, N - 1) * K) as [
      number,
      number,
      number,
      number,
    ];
    for (let i = 0; i < M; i++) {
      let [s0, s1, s2, s3] = [0, 0, 0, 0];
      for (let k = 0; k < K; k++) {
        const value = x[i * K + k] as number;
        s0 += value * (w[r0 + k] as number);
        s1 += value * (w[r1 + k] as number);
        s2 += value * (w[r2 + k] as number);
        s3 += value * (w[r3 + k] as number);
      }
      y[i * N + j] = s0;
      if (j + 1 < N) y[i * N + j + 1] = s1;
      if (j + 2 < N) y[i * N + j + 2] = s2;
      if (j + 3 < N) y[i * N + j + 3] = s3;
    }
  }
  return { rows: M, columns: N, values: y };
}

const at = ({ values, columns }: M64, row: number, column: number): number => values[row * columns + column] ?? 0;

function make(rows: number, columns: number, f: (row: number, column: number) => number): M64 {
  const values = new Float64Array(rows * columns);
  for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) values[r * columns + c] = f(r, c);
  return { rows, columns, values };
}

const transposed = (x: M64): M64 => make(x.columns, x.rows, (r, c) => at(x, c, r));
const widen = ({ rows, columns, values }: HostMatrix): M64 => ({ rows, columns, values: Float64Array.from(values) });
const scaled = (x: M64, by: number): M64 => ({ ...x, values: x.values.map((value) => value * by) });
const sumOf = (x: M64, y: M64): M64 => ({ ...x, values: x.values.map((value, i) => value + (y.values[i] ?? 0)) });
const sigmoid = (x: number): number => 1 / (1 + Math.exp(-x));

function addTo(x: M64, y: M64): void {
  for (let i = 0; i < x.values.length; i++) x.values[i] = (x.values[i] ?? 0) + (y.values[i] ?? 0);
}

function accumulate(to: Map<string, Float64Array>, name: string, values: Float64Array): void {
  const before = to.get(name);
  to.set(name, before ? before.map((value, i) => value + (values[i] ?? 0)) : values);
}

function fail(name: string): never {
  throw new Error(`bench: the step must have weights of ${name}, got none`);
}

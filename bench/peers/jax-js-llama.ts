/** A LoRA training step in jax-js: loss, gradients, norm and AdamW in one jitted function, with the library's own attention. */
import type { Array as JaxArray } from "@jax-js/jax";
import type { Jax, Program } from "./jax-js.ts";
import { type HostMatrix, type LlamaStep, llamaResults, parametersOf } from "./peer.ts";

/** Arrays by name, each of which may be used as often as wanted: `take` gives a reference. */
class Named {
  readonly #arrays: ReadonlyMap<string, JaxArray>;

  constructor(names: readonly string[], arrays: readonly JaxArray[]) {
    this.#arrays = new Map(names.map((name, i) => [name, arrays[i] as JaxArray]));
  }

  take(name: string): JaxArray {
    const found = this.#arrays.get(name);
    if (!found) throw new Error(`jax-js: the step has no ${name}`);
    return found.ref;
  }

  dispose(): void {
    for (const array of this.#arrays.values()) array.dispose();
  }
}

export function llamaStep(jax: Jax, work: LlamaStep): Program {
  const parameters = parametersOf(work);
  const names = parameters.map(([name]) => name);
  const zeros = parameters.map(([, { rows, columns }]) => zerosOf(rows, columns));
  const T = work.ids.length;
  const next = Int32Array.from({ length: T }, (_, t) => work.ids[t + 1] ?? 0);
  const counted = { rows: T, columns: 1, values: Float32Array.from({ length: T }, (_, t) => (t < T - 1 ? 1 : 0)) };
  const frozen = new Map<string, HostMatrix>([
    ...work.weights,
    ["cos", work.cos],
    ["sin", work.sin],
    ["counted", counted],
  ]);
  const operands = [...parameters.map(([, matrix]) => matrix), ...zeros, ...zeros, ...frozen.values(), work.ids, next];
  const n = names.length;
  const { sqrt, square } = jax.numpy;
  const { beta1, beta2, eps, learningRate } = work.adamw;

  const f = (...args: JaxArray[]): JaxArray[] => {
    const [p, m, v] = [args.slice(0, n), args.slice(n, 2 * n), args.slice(2 * n, 3 * n)];
    const given = new Named([...frozen.keys(), "ids", "next"], args.slice(3 * n));
    const lossOf = (xs: JaxArray[]): JaxArray => {
      const trained = new Named(names, xs);
      const loss = meanLoss(jax, work, given, trained);
      trained.dispose();
      return loss;
    };
    const [loss, g] = jax.valueAndGrad(lossOf)(p.map((x) => x.ref));
    given.dispose();
    const norm = sqrt(g.map((x) => square(x.ref).sum()).reduce((a, b) => a.add(b)));
    const after = p.map((x, i) => {
      const [gi, mi, vi] = [g[i], m[i], v[i]] as [JaxArray, JaxArray, JaxArray];
      const newM = mi.mul(beta1).add(gi.ref.mul(1 - beta1));
      const newV = vi.mul(beta2).add(square(gi.ref).mul(1 - beta2));
      const step = newM.ref.div(1 - beta1).div(sqrt(newV.ref.div(1 - beta2)).add(eps));
      return { p: x.sub(step.mul(learningRate)), m: newM, v: newV };
    });
    const wanted = g.filter((_, i) => work.gradients.has(names[i] ?? ""));
    for (const x of g) if (!wanted.includes(x)) x.dispose();
    return [loss, norm, ...after.map((one) => one.p), ...wanted, ...after.flatMap((one) => [one.m, one.v])];
  };
  return {
    operands,
    f,
    results: ([loss = new Float32Array(), norm = new Float32Array(), ...rest]) => {
      const wanted = names.filter((name) => work.gradients.has(name));
      const gradients = new Map(wanted.map((name, i) => [name, rest[n + i] ?? new Float32Array()]));
      return llamaResults(work, loss, norm, rest.slice(0, n), gradients);
    },
  };
}

function meanLoss(jax: Jax, work: LlamaStep, given: Named, trained: Named): JaxArray {
  const { heads, kvHeads, headDim, layers, scale, rmsNormEps } = work;
  const { concatenate, matmul, split, sqrt, square, take } = jax.numpy;
  const { dotProductAttention, logSoftmax, oneHot, silu } = jax.nn;
  const T = work.ids.length;

  const norm = (x: JaxArray, name: string): JaxArray => {
    const rms = sqrt(square(x.ref).mean(-1, { keepdims: true }).add(rmsNormEps));
    return x.div(rms).mul(given.take(`${name}.weight`));
  };
  const linear = (x: JaxArray, module: string): JaxArray => {
    const low = matmul(x.ref, trained.take(`A of ${module}`).transpose());
    const update = matmul(low, trained.take(`B of ${module}`).transpose());
    return matmul(x, given.take(`${module}.weight`).transpose()).add(update.mul(scale));
  };
  const rope = (x: JaxArray): JaxArray => {
    const [a, b] = split(x, 2, -1) as [JaxArray, JaxArray];
    const angle = (name: string): JaxArray => given.take(name).reshape([T, 1, headDim / 2]);
    const first = a.ref.mul(angle("cos")).sub(b.ref.mul(angle("sin")));
    return concatenate([first, b.mul(angle("cos")).add(a.mul(angle("sin")))], -1);
  };

  let h = take(given.take("model.embed_tokens.weight"), given.take("ids"), 0);
  for (let i = 0; i < layers; i++) {
    const at = `model.layers.${i}`;
    const n = norm(h.ref, `${at}.input_layernorm`);
    const q = rope(linear(n.ref, `${at}.self_attn.q_proj`).reshape([T, heads, headDim]));
    const k = rope(linear(n.ref, `${at}.self_attn.k_proj`).reshape([T, kvHeads, headDim]));
    const v = linear(n, `${at}.self_attn.v_proj`).reshape([T, kvHeads, headDim]);
    const mixed = dotProductAttention(q, k, v, { isCausal: true }).reshape([T, heads * headDim]);
    h = h.add(linear(mixed, `${at}.self_attn.o_proj`));
    const z = norm(h.ref, `${at}.post_attention_layernorm`);
    const inside = silu(linear(z.ref, `${at}.mlp.gate_proj`)).mul(linear(z, `${at}.mlp.up_proj`));
    h = h.add(linear(inside, `${at}.mlp.down_proj`));
  }
  const embedding = "model.embed_tokens.weight";
  const logits = matmul(norm(h, "model.norm"), given.take(embedding).transpose());
  const labels = oneHot(given.take("next"), work.weights.get(embedding)?.rows ?? 0);
  return logSoftmax(logits)
    .mul(labels)
    .mul(given.take("counted"))
    .sum()
    .mul(-1 / (T - 1));
}

const zerosOf = (rows: number, columns: number): HostMatrix => ({
  rows,
  columns,
  values: new Float32Array(rows * columns),
});

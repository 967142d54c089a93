/**
 * A LoRA training step in TensorFlow.js: its gradients of A and B only, and AdamW on all of them as one tensor, which takes 800 dispatches
 * less than one after the other. None of its fused ops fits: they add a bias along the columns.
 */
import type { Tensor } from "@tensorflow/tfjs-core";
import { type HostMatrix, type LlamaStep, llamaResults, parametersOf } from "./peer.ts";
import type { Tf } from "./tfjs.ts";

interface Step {
  readonly inputs: readonly Tensor[];
  readonly f: () => Readonly<Record<string, Tensor>>;
  readonly results: (values: Readonly<Record<string, Float32Array>>) => Record<string, Float32Array>;
}

export function llamaStep(tf: Tf, work: LlamaStep): Step {
  const parameters = parametersOf(work);
  const names = parameters.map(([name]) => name);
  const T = work.ids.length;
  const [D, G] = [work.headDim, work.heads / work.kvHeads];

  const matrix = ({ values, rows, columns }: HostMatrix): Tensor => tf.tensor2d(values, [rows, columns]);
  const weights = new Map([...work.weights].map(([name, host]) => [name, matrix(host)]));
  const starts = parameters.map(([, { values }]) => values.length).map((_, i, sizes) => sum(sizes.slice(0, i)));
  const flat = new Float32Array(sum(parameters.map(([, { values }]) => values.length)));
  parameters.forEach(([, { values }], i) => {
    flat.set(values, starts[i]);
  });
  const [p, m, v] = [tf.tensor1d(flat), tf.zeros([flat.length]), tf.zeros([flat.length])];
  const angles = ({ values }: HostMatrix): Tensor => tf.tensor3d(values, [T, 1, D / 2]);
  const [cos, sin] = [angles(work.cos), angles(work.sin)];
  const mask = tf.tensor2d(
    Float32Array.from({ length: T * T }, (_, i) => (i % T > Math.floor(i / T) ? -1e9 : 0)),
    [T, T],
  );
  const vocab = work.weights.get("model.embed_tokens.weight")?.rows ?? 0;
  const ids = tf.tensor1d(work.ids, "int32");
  const next = tf.tensor1d(work.ids.slice(1), "int32");
  const labels = tf.oneHot(next, vocab);
  next.dispose();

  const weight = (name: string): Tensor => weights.get(`${name}.weight`) as Tensor;
  const norm = (x: Tensor, name: string): Tensor =>
    tf.mul(tf.mul(x, tf.rsqrt(tf.add(tf.mean(tf.square(x), -1, true), work.rmsNormEps))), weight(name));
  const rope = (x: Tensor): Tensor => {
    const [a, b] = tf.split(x, 2, -1) as [Tensor, Tensor];
    return tf.concat([tf.sub(tf.mul(a, cos), tf.mul(b, sin)), tf.add(tf.mul(b, cos), tf.mul(a, sin))], -1);
  };
  /** The query heads that share a key and value head stand below one another. */
  const attention = (q: Tensor, k: Tensor, v_: Tensor): Tensor => {
    const { kvHeads: K, heads: H } = work;
    const queries = tf.reshape(tf.transpose(tf.reshape(q, [T, K, G, D]), [1, 2, 0, 3]), [K, G * T, D]);
    const scores = tf.matMul(tf.mul(queries, 1 / Math.sqrt(D)), tf.transpose(k, [1, 0, 2]), false, true);
    const weighted = tf.reshape(tf.softmax(tf.add(tf.reshape(scores, [H, T, T]), mask)), [K, G * T, T]);
    const mixed = tf.reshape(tf.matMul(weighted, tf.transpose(v_, [1, 0, 2])), [K, G, T, D]);
    return tf.reshape(tf.transpose(mixed, [2, 0, 1, 3]), [T, H * D]);
  };

  const meanLoss = (...trained: Tensor[]): Tensor => {
    const parameter = new Map(names.map((name, i) => [name, trained[i] as Tensor]));
    const linear = (x: Tensor, module: string): Tensor => {
      const low = tf.matMul(x, parameter.get(`A of ${module}`) as Tensor, false, true);
      const update = tf.matMul(low, parameter.get(`B of ${module}`) as Tensor, false, true);
      return tf.add(tf.matMul(x, weight(module), false, true), tf.mul(update, work.scale));
    };
    let h = tf.gather(weight("model.embed_tokens"), ids);
    for (let i = 0; i < work.layers; i++) {
      const at = `model.layers.${i}`;
      const n = norm(h, `${at}.input_layernorm`);
      const q = rope(tf.reshape(linear(n, `${at}.self_attn.q_proj`), [T, work.heads, D]));
      const k = rope(tf.reshape(linear(n, `${at}.self_attn.k_proj`), [T, work.kvHeads, D]));
      const values = tf.reshape(linear(n, `${at}.self_attn.v_proj`), [T, work.kvHeads, D]);
      h = tf.add(h, linear(attention(q, k, values), `${at}.self_attn.o_proj`));
      const z = norm(h, `${at}.post_attention_layernorm`);
      const gate = linear(z, `${at}.mlp.gate_proj`);
      const inside = tf.mul(tf.mul(gate, tf.sigmoid(gate)), linear(z, `${at}.mlp.up_proj`));
      h = tf.add(h, linear(inside, `${at}.mlp.down_proj`));
    }
    const counted = tf.slice(norm(h, "model.norm"), [0, 0], [T - 1, hidden]);
    return tf.losses.softmaxCrossEntropy(labels, tf.matMul(counted, weight("model.embed_tokens"), false, true));
  };
  const hidden = work.weights.get("model.norm.weight")?.columns ?? 0;

  const { beta1, beta2, eps, learningRate } = work.adamw;
  const f = (): Record<string, Tensor> => {
    const trained = parameters.map(([, { rows, columns, values }], i) =>
      tf.reshape(tf.slice(p, [starts[i] ?? 0], [values.length]), [rows, columns]),
    );
    const { value: loss, grads } = tf.valueAndGrads(meanLoss)(trained);
    const g = tf.concat(
      grads.map((gradient, i) => tf.reshape(gradient, [parameters[i]?.[1].values.length ?? 0])),
      0,
    );
    const norm_ = tf.sqrt(tf.sum(tf.square(g)));
    const newM = tf.add(tf.mul(m, beta1), tf.mul(g, 1 - beta1));
    const newV = tf.add(tf.mul(v, beta2), tf.mul(tf.square(g), 1 - beta2));
    const step = tf.div(tf.mul(newM, learningRate / (1 - beta1)), tf.add(tf.sqrt(tf.div(newV, 1 - beta2)), eps));
    const wanted = names.flatMap((name, i) => (work.gradients.has(name) ? [[name, grads[i] as Tensor] as const] : []));
    return { loss, norm: norm_, p: tf.sub(p, step), m: newM, v: newV, ...Object.fromEntries(wanted) };
  };
  return {
    inputs: [...weights.values(), p, m, v, cos, sin, mask, ids, labels],
    f,
    results: ({ loss, norm: norm_, p: after, ...rest }) => {
      const none = new Float32Array();
      return llamaResults(work, loss ?? none, norm_ ?? none, [after ?? none], new Map(Object.entries(rest)));
    },
  };
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);

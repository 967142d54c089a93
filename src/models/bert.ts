/**
 * Encoders that sort rows into classes: BERT (Devlin et al., arXiv:1810.04805) and RoBERTa (Liu et al., arXiv:1907.11692).
 *
 *     h = norm(word + position + token type)
 *     h = norm(h + Wo·attention(Wq·h, Wk·h, Wv·h))        every token of a row sees every other
 *     h = norm(h + Wdown·gelu(Wup·h))                     norm is LayerNorm
 *
 * The class is told from the first token, c = h[:,0]: W·tanh(Wpool·c). Dropout of the base model is not done, in training neither.
 */
import { add, reshape, tanh } from "../autograd/basic-ops.ts";
import { recompute } from "../autograd/engine.ts";
import { attention, gatherRows, layerNorm } from "../autograd/model-ops.ts";
import type { Gpu } from "../gpu/gpu.ts";
import { isObject, type JsonObject } from "../io/json.ts";
import { type Activation, activate } from "../nn/activation.ts";
import { type Linear, linear, linears } from "../nn/linear.ts";
import { inUse, type Module, type Norm } from "../nn/module.ts";
import { embed, type Table } from "../nn/table.ts";
import { ShapeError } from "../tensor/errors.ts";
import { type Tensor, tensor } from "../tensor/tensor.ts";
import { ConfigReader } from "./config-reader.ts";
import { type Limits, Shapes, type WeightMap, Weights } from "./weights.ts";

export interface BertConfig {
  readonly modelType: "bert" | "roberta";
  readonly vocabSize: number;
  readonly hiddenSize: number;
  readonly intermediateSize: number;
  readonly layers: number;
  readonly heads: number;
  readonly headDim: number;
  /** Rows of the table of positions, and the row of a text's first token: RoBERTa counts on from the padding's id. */
  readonly positions: number;
  readonly firstPosition: number;
  /** Tokens that a row may have. */
  readonly contextLength: number;
  /** Kinds of tokens: BERT's pairs of texts have two. */
  readonly tokenTypes: number;
  readonly layerNormEps: number;
  readonly activation: Activation;
  readonly padId: number;
  /** Names of the classes. */
  readonly labels: readonly string[];
  /** Standard deviation of the weights of a new head. */
  readonly initializerRange: number;
}

interface Block {
  /** q, k and v. */
  readonly inputs: readonly [Linear, Linear, Linear];
  readonly o: Linear;
  readonly attentionNorm: Norm;
  readonly up: Linear;
  readonly down: Linear;
  readonly norm: Norm;
}

/** By `model_type`. */
export const ENCODER_TYPES: readonly string[] = ["bert", "roberta"];

/** The two layers between the first token and its classes. */
const headNames = ({ modelType }: BertConfig): readonly [pool: string, classify: string] =>
  modelType === "bert" ? ["bert.pooler.dense", "classifier"] : ["classifier.dense", "classifier.out_proj"];

/** Whether a weight belongs to the classifier. */
export const isOfHead = (name: string): boolean => name.startsWith("classifier.");

const inputNames = (at: string): string[] => ["query", "key", "value"].map((one) => `${at}.attention.self.${one}`);

const layerName = ({ modelType }: BertConfig, i: number): string => `${modelType}.encoder.layer.${i}`;

/** Throws FormatError naming the key that is missing or wrong. */
export function bertConfig(json: JsonObject, name: string): BertConfig {
  const read = new ConfigReader(json, name);
  const modelType = json.model_type === "roberta" ? "roberta" : "bert";
  const hiddenSize = read.count("hidden_size", 768);
  const heads = read.count("num_attention_heads", 12);
  if (hiddenSize % (4 * heads) !== 0) read.fail("hidden_size", `a multiple of 4 · num_attention_heads = ${4 * heads}`);
  if ((json.position_embedding_type ?? "absolute") !== "absolute") read.fail("position_embedding_type", '"absolute"');
  if (read.flag("is_decoder")) read.fail("is_decoder", "false");
  const isRoberta = modelType === "roberta";
  const padId = json.pad_token_id ?? (isRoberta ? 1 : 0);
  if (typeof padId !== "number" || !Number.isInteger(padId) || padId < 0)
    return read.fail("pad_token_id", "a token's id");
  const firstPosition = isRoberta ? padId + 1 : 0;
  const positions = read.count("max_position_embeddings", 512);
  return {
    modelType,
    vocabSize: read.count("vocab_size", isRoberta ? 50265 : 30522),
    hiddenSize,
    intermediateSize: read.count("intermediate_size", 3072),
    layers: read.count("num_hidden_layers", 12),
    heads,
    headDim: hiddenSize / heads,
    positions,
    firstPosition,
    contextLength: positions - firstPosition,
    tokenTypes: read.count("type_vocab_size", 2),
    layerNormEps: read.positive("layer_norm_eps", 1e-12),
    activation: read.activation("hidden_act", "gelu"),
    padId,
    labels: labelsOf(read),
    initializerRange: read.positive("initializer_range", 0.02),
  };
}

/** transformers writes no `id2label` where there are two classes without names. */
function labelsOf(read: ConfigReader): string[] {
  const names = read.json.id2label ?? undefined;
  const problem = read.json.problem_type ?? "single_label_classification";
  if (problem !== "single_label_classification")
    read.fail("problem_type", '"single_label_classification"', ". Other losses are not supported yet");
  if (names === undefined) return unnamed(read.count("num_labels", 2));
  if (!isObject(names)) return read.fail("id2label", "an object");
  const labels = Object.keys(names).map((_, i) => names[i]);
  return labels.length > 1 && labels.every((label) => typeof label === "string")
    ? (labels as string[])
    : read.fail("id2label", "the names of two classes or more, by numbers from 0 on");
}

/** Classes that have no names. */
export const unnamed = (count: number): string[] => Array.from({ length: count }, (_, i) => `LABEL_${i}`);

/** BERT or RoBERTa with a head that gives logits of classes: ids [B,T] → [B,labels]. See `loadClassifier`. */
export class BertClassifier {
  readonly gpu: Gpu;
  readonly config: BertConfig;
  /** Every linear layer, by module name: "bert.encoder.layer.0.attention.self.query". All can take an adapter. */
  readonly linears: ReadonlyMap<string, Linear>;
  /** Every module with parameters of its own, by name. */
  readonly modules: ReadonlyMap<string, Module>;
  /** Names of those that read the same input. */
  readonly groups: readonly (readonly string[])[];
  /** What PEFT calls it. */
  readonly taskType = "SEQ_CLS";
  /** Keep only the input of each block for the backward pass and compute the block again there: less memory, a third more arithmetic. */
  checkpointing = false;
  readonly #weights: Weights;
  readonly #words: Table;
  readonly #positions: Table;
  readonly #tokenTypes: Table;
  readonly #norm: Norm;
  readonly #blocks: readonly Block[];
  readonly #pool: Linear;
  readonly #classify: Linear;

  /** `weights` by Hugging Face name, complete and in the order of `bertShapes`. */
  constructor(gpu: Gpu, config: BertConfig, weights: WeightMap) {
    const all = new Weights(weights);
    const norm = (name: string): Norm => all.norm(name);
    const embeddings = `${config.modelType}.embeddings`;
    this.gpu = gpu;
    this.config = config;
    this.#weights = all;
    this.#words = all.table(`${embeddings}.word_embeddings`);
    this.#positions = all.table(`${embeddings}.position_embeddings`);
    this.#tokenTypes = all.table(`${embeddings}.token_type_embeddings`);
    this.#norm = norm(`${embeddings}.LayerNorm`);
    this.#blocks = Array.from({ length: config.layers }, (_, i): Block => {
      const at = layerName(config, i);
      return {
        inputs: inputNames(at).map((name) => all.linear(name)) as [Linear, Linear, Linear],
        o: all.linear(`${at}.attention.output.dense`),
        attentionNorm: norm(`${at}.attention.output.LayerNorm`),
        up: all.linear(`${at}.intermediate.dense`),
        down: all.linear(`${at}.output.dense`),
        norm: norm(`${at}.output.LayerNorm`),
      };
    });
    [this.#pool, this.#classify] = headNames(config).map((name) => all.linear(name)) as [Linear, Linear];
    this.linears = all.linears;
    this.modules = all.modules;
    this.groups = this.#blocks.map((_, i) => inputNames(layerName(config, i)));
  }

  /** Every weight as it is now, by Hugging Face name: a merged layer shows its merged weight. */
  get weights(): Map<string, Tensor> {
    return this.#weights.tensors;
  }

  /**
   * Logits of the classes: ids i32 [B,T] → [B, classes]. Of row b the first lengths[b] tokens count, all unless given; what is behind them is
   * padding. tokenTypes i32 [B,T] are 0 unless given. Throws ShapeError when a row is longer than the model's context.
   */
  logits(ids: Tensor, { lengths, tokenTypes }: { lengths?: Tensor; tokenTypes?: Tensor } = {}): Tensor {
    const { contextLength, firstPosition, hiddenSize: C } = this.config;
    const [B = 0, T = 0] = ids.shape;
    if (T > contextLength)
      throw new ShapeError(`logits: at most ${contextLength} positions fit, got ${T}. Shorten the rows`);
    const upTo = (n: number): number[] => Array.from({ length: n }, (_, i) => i);
    const i32 = (values: readonly number[], shape: readonly number[] = [values.length]): Tensor =>
      tensor(this.gpu, Int32Array.from(values), shape);
    const counts = lengths ?? i32(new Array(B).fill(T));
    const types = embed(this.#tokenTypes, tokenTypes ?? i32([0], [1, 1]));
    const at = upTo(T).map((t) => firstPosition + t); // of padding too, whatever it is: nothing comes of it
    const places = embed(this.#positions, i32(at, [1, T]));
    let h = this.#normed(add(add(embed(this.#words, ids), types), places), this.#norm);
    for (const block of this.#blocks) {
      const run = (x: Tensor): Tensor => this.#block(block, x, counts);
      h = this.checkpointing ? recompute(h, run) : run(h);
    }
    const firsts = i32(upTo(B).map((b) => b * T));
    const inverse = i32(upTo(B * T).map((i) => (i % T === 0 ? i / T : -1)));
    const pooled = tanh(linear(this.#pool, gatherRows(reshape(h, [B * T, C]), firsts, inverse)));
    return linear(this.#classify, pooled);
  }

  #normed(x: Tensor, norm: Norm): Tensor {
    const { weight, bias } = inUse(norm);
    return layerNorm(x, weight, bias as Tensor, this.config.layerNormEps);
  }

  #block({ inputs, o, attentionNorm, up, down, norm }: Block, x: Tensor, lengths: Tensor): Tensor {
    const { heads, headDim, hiddenSize: C, activation } = this.config;
    const [B = 0, T = 0] = x.shape;
    const [q, k, v] = linears(inputs, x).map((t) => reshape(t, [B, T, heads, headDim])) as [Tensor, Tensor, Tensor];
    const mixed = reshape(attention(q, k, v, { lengths }), [B, T, C]);
    const middle = this.#normed(add(linear(o, mixed), x), attentionNorm);
    const inner = activate(linear(up, middle), activation);
    return this.#normed(add(linear(down, inner), middle), norm);
  }

  /** Frees every weight. Adapters are freed by their own `detach`. */
  destroy(): void {
    this.gpu.release(...new Set(this.weights.values()));
  }
}

/** Name and shape of every weight, in the order of its layers: see `weightShapes`. */
export function bertShapes(config: BertConfig, limits?: Limits): Shapes {
  const { modelType, hiddenSize: C, intermediateSize: I, vocabSize } = config;
  const shapes = new Shapes(limits);
  const norm = (name: string): void => {
    shapes.add(`${name}.weight`, C);
    shapes.add(`${name}.bias`, C);
  };
  shapes.table(`${modelType}.embeddings.word_embeddings.weight`, vocabSize, C);
  shapes.add(`${modelType}.embeddings.position_embeddings.weight`, config.positions, C);
  shapes.add(`${modelType}.embeddings.token_type_embeddings.weight`, config.tokenTypes, C);
  norm(`${modelType}.embeddings.LayerNorm`);
  for (let i = 0; i < config.layers; i++) {
    const at = layerName(config, i);
    for (const name of inputNames(at)) shapes.linear(name, C, C, true);
    shapes.linear(`${at}.attention.output.dense`, C, C, true);
    norm(`${at}.attention.output.LayerNorm`);
    shapes.linear(`${at}.intermediate.dense`, I, C, true);
    shapes.linear(`${at}.output.dense`, C, I, true);
    norm(`${at}.output.LayerNorm`);
  }
  const [pool, classify] = headNames(config);
  shapes.linear(pool, C, C, true);
  shapes.linear(classify, config.labels.length, C, true);
  return shapes;
}

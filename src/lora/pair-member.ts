/** LoRA of one linear layer, as it is in a model. */
import { add, matmul as product, scale } from "../autograd/basic-ops.ts";
import { dropout } from "../autograd/model-ops.ts";
import type { Uniform } from "../gpu/kernel.ts";
import { axpy, scale as scaled } from "../kernels/axpy.ts";
import { matmul } from "../kernels/matmul.ts";
import { unpackMatrix } from "../kernels/unpack.ts";
import { type Linear, type LinearAdapter, type LinearGroup, linear } from "../nn/linear.ts";
import { isPacked, type PackedMatrix } from "../tensor/packed.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { doraLinear, type Magnitude, mergedMagnitude, rowSquares, withMagnitude } from "./dora-linear.ts";
import { type LoraDropout, loraLinear, loraLinears } from "./lora-linear.ts";
import type { Member, Parameters } from "./members.ts";
import type { Beginning, LoraPair } from "./parts.ts";

/** What of an adapter changes while it is in use. */
export interface Live {
  /** What `setScale` was given. */
  readonly factor: number;
  readonly dropout: number;
  readonly training: { readonly seed: number; readonly step: Uniform } | undefined;
}

const widened = (W: Tensor | PackedMatrix): Tensor => (isPacked(W) ? unpackMatrix(W) : W);

/** The dropout of the module that has these masks, if it is on. */
export const dropoutOf = ({ dropout: p, training }: Live, stream: number): LoraDropout | undefined =>
  training && p > 0 ? { p, key: { ...training, stream } } : undefined;

export class PairMember implements Member {
  readonly name: string;
  readonly pair: LoraPair;
  readonly modules: readonly [Linear];
  readonly #live: Live;
  /** Whose masks its dropout has. */
  readonly #stream: number;
  /** Of the layers that it is computed with. */
  group: LinearGroup | undefined;
  beginning: Beginning | undefined;
  /** ‖W‖² of the rows, where there is a magnitude, and whose. */
  #squares: Tensor | undefined;
  #squared: Linear["weight"] | undefined;
  readonly #adapter: LinearAdapter;

  constructor(name: string, pair: LoraPair, live: Live, stream: number) {
    this.name = name;
    this.pair = pair;
    this.modules = [pair.layer];
    this.#live = live;
    this.#stream = stream;
    const groupOf = (): LinearGroup | undefined => this.group;
    this.#adapter = {
      apply: (x, W, bias) => this.#apply(x, W, bias),
      add: (y, x) => this.#add(y, x),
      get group() {
        return groupOf();
      },
    };
  }

  adds(): boolean {
    return !this.pair.magnitude && !this.pair.bias && !this.beginning;
  }

  get unmergeable(): string | undefined {
    const { loraBias, layer } = this.pair;
    return loraBias && !layer.bias
      ? `merge: a bias needs a layer with one, got ${this.name} without. Keep the adapter apart`
      : undefined;
  }

  enable(): void {
    const { layer } = this.pair;
    const beginning = this.#beginningNow();
    if (this.beginning && beginning !== this.beginning) layer.weight.gpu.release(this.beginning.residual);
    this.beginning = beginning;
    const W = beginning?.residual ?? layer.weight;
    this.takeSquares(W);
    layer.weight = W;
    layer.adapters = [...(layer.adapters ?? []), this.#adapter];
  }

  disable(): void {
    const { layer } = this.pair;
    const others = layer.adapters?.filter((one) => one !== this.#adapter);
    layer.adapters = others?.length ? others : undefined;
    if (this.beginning && layer.weight === this.beginning.residual) layer.weight = this.beginning.original;
  }

  /** What beginning with these factors takes from the weight as it is. */
  taken(A: Tensor, B: Tensor): Beginning {
    const { layer, scale: s } = this.pair;
    const { weight: original } = layer;
    const residual = original.gpu.scope(() => axpy(1, widened(original), -1, matmul(B, A, "nn", { scale: s })));
    return { A, B, residual, original };
  }

  /** Puts in what was taken, while it is enabled. */
  begin(beginning: Beginning, squares: Tensor | undefined): void {
    this.beginning = beginning;
    this.pair.layer.weight = beginning.residual;
    this.#setSquares(beginning.residual, squares);
  }

  /** Its beginning, taken anew where the weight is another: an adapter may have been merged into it for good meanwhile. */
  #beginningNow(): Beginning | undefined {
    const { beginning, pair } = this;
    const { weight } = pair.layer;
    if (!beginning || weight === beginning.original || weight === beginning.residual) return beginning;
    return this.taken(beginning.A, beginning.B);
  }

  /** W + s·B·A, its rows scaled to the magnitude, and the bias with the adapter's own. */
  merged(): Parameters {
    const { layer, A, B, magnitude: m } = this.pair;
    const weight = A.gpu.scope(() => {
      const W = this.#beginningNow()?.residual ?? layer.weight;
      const sum = axpy(1, widened(W), 1, matmul(B, A, "nn", { scale: this.scale }));
      return m ? mergedMagnitude(sum, { W, A, B }, { m, squares: rowSquares(W) }, this.scale) : sum;
    });
    return { weight, bias: this.#mergedBias() };
  }

  #mergedBias(): Tensor | undefined {
    const { layer, bias = layer.bias, loraBias } = this.pair;
    if (!bias || (bias === layer.bias && !loraBias)) return layer.bias;
    return loraBias ? axpy(1, bias, this.scale, loraBias) : scaled(bias, 1);
  }

  /** s as it is now. */
  get scale(): number {
    return this.#live.factor * this.pair.scale;
  }

  get magnitude(): Magnitude | undefined {
    const { magnitude: m } = this.pair;
    return m && this.#squares && { m, squares: this.#squares };
  }

  /** Of the weight that it is to be computed with. */
  takeSquares(W: Linear["weight"]): void {
    if (this.#squared !== W) this.#setSquares(W, this.squaresOf(W));
  }

  squaresOf(W: Linear["weight"]): Tensor | undefined {
    return this.pair.magnitude && rowSquares(W);
  }

  #setSquares(W: Linear["weight"], squares: Tensor | undefined): void {
    if (this.#squares) W.gpu.release(this.#squares);
    this.#squared = W;
    this.#squares = squares;
  }

  /** What it has beside its parts. */
  get owned(): Tensor[] {
    const { A, B, residual } = this.beginning ?? {};
    return [this.#squares, A, B, residual].filter((t) => t !== undefined);
  }

  get dropout(): LoraDropout | undefined {
    return dropoutOf(this.#live, this.#stream);
  }

  #apply(x: Tensor, W: Tensor | PackedMatrix, base?: Tensor): Tensor {
    const { A, B } = this.pair;
    const bias = this.bias(base);
    const magnitude = this.magnitude;
    return magnitude
      ? doraLinear(x, { W, A, B, bias }, magnitude, this.scale, this.dropout)
      : loraLinear(x, W, A, B, this.scale, bias, this.dropout);
  }

  /** y + s·(x·Aᵀ·Bᵀ + its bias) */
  #add(y: Tensor, x: Tensor): Tensor {
    const { A, B, loraBias } = this.pair;
    const drop = this.dropout;
    const u = product(drop ? dropout(x, drop.p, drop.key) : x, A, "nt");
    return add(y, scale(product(u, B, "nt", loraBias), this.scale));
  }

  /** The bias of the layer with the adapter's own. */
  bias(original: Tensor | undefined): Tensor | undefined {
    const { bias: base = original, loraBias } = this.pair;
    if (!loraBias) return base;
    const own = scale(loraBias, this.scale);
    return base ? add(base, own) : own;
  }
}

/** Lets members with the A's of one matrix be computed together. */
export function join(members: readonly PairMember[], A: Tensor): void {
  const layers = members.map(({ pair }) => pair.layer);
  const apply = (x: Tensor): Tensor[] => {
    const [first] = members;
    if (!first || first.dropout) return layers.map((layer) => linear(layer, x)); // masks differ, so what they read does
    const ofAll = members.map((member) => {
      const { layer, A: own, B } = member.pair;
      return { W: layer.weight, A: own, B, bias: member.bias(layer.bias) };
    });
    const plain = ofAll.map(({ bias, ...member }, i) => (members[i]?.magnitude ? member : { ...member, bias }));
    return loraLinears(x, plain, A, first.scale).map((z, i) => {
      const magnitude = members[i]?.magnitude;
      const layer = ofAll[i];
      return magnitude && layer ? withMagnitude(z, layer, magnitude, first.scale) : z;
    });
  };
  for (const member of members) member.group = { layers, apply };
}

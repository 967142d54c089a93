/** A LoRA adapter on a model: train, switch, merge, detach. */
import type { Uniform } from "../gpu/kernel.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isPacked } from "../tensor/packed.ts";
import { type Tensor, tensor } from "../tensor/tensor.ts";
import { type LoraConfig, settingsOf } from "./config.ts";
import {
  demandRoom,
  enter,
  leave,
  type Member,
  type Merged,
  mergeInto,
  type Parameters,
  tensorsBut,
} from "./members.ts";
import { join, type Live, PairMember } from "./pair-member.ts";
import {
  type AdapterParts,
  type Beginning,
  type Group,
  type LoraPair,
  PARTS,
  type SavedLayer,
  type TablePair,
  type TokenRows,
} from "./parts.ts";
import { parametersOf, savedMember } from "./saved.ts";
import { TableMember, TokenMember } from "./table-members.ts";

type Buffers = readonly [Tensor, ...Tensor[]];

/**
 * One adapter on one model. It is made enabled: the model's layers compute through it until `disable`, `merge` or `detach`.
 *
 * Several may be enabled, or merged, on one layer where each only adds to it: y = W·x + Σ sᵢ·Bᵢ·(Aᵢ·x). Not so DoRA, a start that takes
 * from the base, trained copies, biases and rows of tokens, which depend on what else is there: they are alone.
 */
export class LoraAdapter {
  readonly config: LoraConfig;
  /** The adapted layers by module name, such as "model.layers.0.self_attn.q_proj". */
  readonly pairs: ReadonlyMap<string, LoraPair>;
  /** Layers on one input whose A's are one matrix. */
  readonly groups: readonly Group[];
  /** The modules that are trained whole, or their biases, by module name. `setScale` does not change them. */
  readonly saved: ReadonlyMap<string, SavedLayer>;
  /** The adapted embeddings and heads. */
  readonly tables: ReadonlyMap<string, TablePair>;
  /** The rows of tokens that are trained, by the table's name. `setScale` does not change them. */
  readonly tokens: ReadonlyMap<string, TokenRows>;
  /** Set while a training step is made: `config.dropout` is on, its masks made from the seed and the number of the batch. */
  training: { readonly seed: number; readonly step: Uniform } | undefined;
  #factor = 1;
  #state: "enabled" | "disabled" | "merged" | "detached" = "disabled";
  readonly #linears: readonly PairMember[];
  readonly #tokens: TokenMember[] = [];
  readonly #members: readonly Member[];
  /** What `parameters` are views of, and the others. */
  readonly #buffers: Buffers;
  #merged: readonly Merged[] = [];

  /** Use `attachLora` or `attachParts`. `buffers` are all that the parts are views of. Throws ShapeError as `enable`. */
  constructor(config: LoraConfig, parts: AdapterParts, buffers: Buffers) {
    this.config = config;
    this.pairs = parts.pairs;
    this.groups = parts.groups;
    this.saved = parts.saved;
    this.tables = parts.tables;
    this.tokens = parts.tokens;
    this.#buffers = buffers;
    const live = this.#live();
    this.#linears = [...parts.pairs].map(([name, pair], i) => new PairMember(name, pair, live, i));
    for (const { names, A } of parts.groups)
      join(
        this.#linears.filter(({ name }) => names.includes(name)),
        A,
      );
    const tables = [...parts.tables].map(([name, pair], i) => new TableMember(name, pair, live, parts.pairs.size + i));
    const saved = [...parts.saved].map(([name, layer]) => savedMember(name, layer));
    try {
      for (const [name, rows] of parts.tokens) this.#tokens.push(new TokenMember(name, rows));
      this.#members = [...this.#linears, ...tables, ...this.#tokens, ...saved];
      this.enable();
    } catch (error) {
      buffers[0].gpu.release(...this.#owned());
      throw error;
    }
  }

  #live(): Live {
    const factor = (): number => this.#factor;
    const training = (): Live["training"] => this.training;
    return {
      dropout: this.config.dropout ?? 0,
      get factor() {
        return factor();
      },
      get training() {
        return training();
      },
    };
  }

  /** The trainable tensors: every A and B, and what else there is. */
  get parameters(): Tensor[] {
    return [
      ...[...this.pairs.values()].flatMap((pair) => PARTS.flatMap((part) => pair[part] ?? [])),
      ...[...this.tables.values()].flatMap(({ X, Y }) => [X, Y]),
      ...[...this.tokens.values()].map(({ rows }) => rows),
      ...[...this.saved.values()].flatMap(parametersOf),
    ];
  }

  /**
   * LoRA+ (arXiv:2402.12354): B and what has one axis learn `ratio` times as fast as A, which is what the optimizer's `rates` take. Tables
   * and rows of them learn as A does.
   *
   * Throws ShapeError unless the ratio is above 0.
   */
  rates(ratio: number): Map<Tensor, number> {
    if (!(ratio > 0) || !Number.isFinite(ratio))
      throw new ShapeError(`rates: the ratio must be a number above 0, got ${ratio}`);
    const heads = [...this.tables.values()].flatMap(({ table, X }) => (table.use === "head" ? [X] : []));
    const fast = new Set([...[...this.pairs.values()].map(({ B }) => B), ...heads]);
    return new Map(this.parameters.filter((p) => fast.has(p) || p.shape.length === 1).map((p) => [p, ratio]));
  }

  get state(): "enabled" | "disabled" | "merged" | "detached" {
    return this.#state;
  }

  /** What was taken from the base, by module name: see `start`. */
  get beginnings(): ReadonlyMap<string, Beginning> {
    return new Map(this.#linears.flatMap(({ name, beginning }) => (beginning ? [[name, beginning] as const] : [])));
  }

  /** Throws ShapeError where `start` would, whatever the values. */
  demandStart(): void {
    this.#demand("start", "enabled");
    if (this.beginnings.size > 0 || this.#factor !== 1)
      throw new ShapeError("start: an adapter starts once, at its own scale, got one that did. Attach a fresh one");
  }

  /**
   * Puts these values into A and B of the modules. With `takesFromBase` what they stand for is taken from the weights, W − s·B·A, as long as
   * the adapter is enabled: the model's output stays what it is, and the original weights are kept beside.
   *
   * Throws ShapeError where the adapter is merged, was started so before, or its scale was changed, and where something is taken from a
   * layer that another adapter is on, or is to be from an embedding or a head. Nothing has changed where it throws.
   */
  start(values: ReadonlyMap<string, Readonly<Record<"A" | "B", Float32Array>>>, takesFromBase: boolean): void {
    this.demandStart();
    const [table] = this.tables.keys();
    if (takesFromBase && table)
      throw new ShapeError(`start: a part of the base is taken from linear layers, got ${table}. Leave it out`);
    const started = [...values].map(([name, { A, B }]) => {
      const member = this.#linears.find((one) => one.name === name);
      if (!member) throw new ShapeError(`start: modules must be the adapter's, got ${name}`);
      const { weight } = member.pair.layer;
      if (takesFromBase && isPacked(weight))
        throw new ShapeError(
          `start: a part of the base is taken from f32 weights, got ${weight.format}. Load it as f32`,
        );
      return { member, A, B };
    });
    if (takesFromBase)
      demandRoom(
        "start",
        this,
        started.map(({ member: { name, modules } }) => ({ name, modules, adds: () => false })),
      );
    const { gpu } = this.#buffers[0];
    const take = ({ member, A, B }: (typeof started)[number]) => {
      const beginning = member.taken(tensor(gpu, A, member.pair.A.shape), tensor(gpu, B, member.pair.B.shape));
      return { beginning, squares: member.squaresOf(beginning.residual) };
    };
    for (const member of this.#linears) member.takeSquares(member.pair.layer.weight);
    const taken = takesFromBase ? gpu.scope(() => started.map(take)) : [];
    for (const [i, { member, A, B }] of started.entries()) {
      gpu.write(member.pair.A, A);
      gpu.write(member.pair.B, B);
      const { beginning, squares } = taken[i] ?? {};
      if (beginning) member.begin(beginning, squares);
    }
  }

  /** What `setScale` was given; 1 at first. */
  get factor(): number {
    return this.#factor;
  }

  /** s of a module whose rank and alpha no pattern changes, times what `setScale` was given. */
  get scale(): number {
    return this.#factor * settingsOf({ ...this.config, rankPattern: {}, alphaPattern: {} }, "").scale;
  }

  /** Multiplies s: 1 is the adapter as trained, 0 leaves B·A out (magnitudes, biases and what was taken from the base stay). Not while merged. */
  setScale(factor: number): void {
    if (!Number.isFinite(factor)) throw new ShapeError(`setScale: the factor must be a finite number, got ${factor}`);
    this.#demand("setScale", "enabled", "disabled");
    this.#factor = factor;
  }

  /** Puts the adapter to work. Throws ShapeError if another one is on one of its modules, unless both only add. */
  enable(): void {
    if (this.#state === "enabled") return;
    this.#demand("enable", "disabled");
    demandRoom("enable", this, this.#members);
    try {
      for (const member of this.#members) {
        member.enable();
        enter(this, member);
      }
    } catch (error) {
      this.#takeOff();
      throw error;
    }
    this.#state = "enabled";
  }

  /** The model computes as if the adapter were not there. */
  disable(): void {
    if (this.#state === "disabled") return;
    this.#demand("disable", "enabled");
    this.#takeOff();
    this.#state = "disabled";
  }

  /** Also where it is on some of its modules only. */
  #takeOff(): void {
    for (const member of this.#members) {
      member.disable();
      leave(this, member);
    }
  }

  /**
   * W ← W + s·B·A in every adapted layer (DoRA: its rows scaled to their magnitudes), and biases, trained copies and rows likewise, at no cost
   * per token from then on, packed weights as f32. What was there is kept for `unmerge`. Others that only add may be enabled or merged beside.
   *
   * Throws ShapeError where the adapter has a bias for a layer that has none, or changes one of two tied tables, and as `enable`;
   * GpuError where there is no room. Nothing has changed then.
   */
  merge(): void {
    const unmergeable = this.#members.find((member) => member.unmergeable)?.unmergeable;
    if (unmergeable) throw new ShapeError(unmergeable);
    if (this.#state !== "enabled") {
      this.#demand("merge", "disabled");
      demandRoom("merge", this, this.#members);
    }
    const after = this.#buffers[0].gpu.scope(() => this.#members.map((member) => member.merged()));
    this.disable();
    this.#merged = this.#members.flatMap((member, i) => {
      enter(this, member);
      return mergeInto(member, after[i] as Parameters);
    });
    this.#state = "merged";
  }

  /** Puts the original weights back, bit for bit, and enables the adapter. Of several that were merged the last goes first: else ShapeError. */
  unmerge(): void {
    this.#demand("unmerge", "merged");
    const covered = this.#merged.find(
      ({ module, after }) => module.weight !== after.weight || module.bias !== after.bias,
    );
    if (covered)
      throw new ShapeError(
        `unmerge: the adapter that was merged last must be the first to go, got one with another over it on ${covered.name}`,
      );
    const made = new Set(this.#merged.flatMap(({ before, after }) => tensorsBut(after, before)));
    for (const { module, before } of this.#merged) Object.assign(module, before);
    this.#buffers[0].gpu.release(...made);
    this.#leaveMerged();
    this.#state = "disabled";
    this.enable();
  }

  #leaveMerged(): void {
    for (const member of this.#members) leave(this, member);
    this.#merged = [];
  }

  /** Takes the adapter off and frees its tensors. A merged adapter stays merged into the weights, for good. */
  detach(): void {
    if (this.#state === "detached") return;
    const replaced = new Set(this.#merged.flatMap(({ before, after }) => tensorsBut(before, after)));
    if (this.#state === "merged") this.#leaveMerged();
    else this.disable();
    this.#buffers[0].gpu.release(...this.#buffers, ...this.#owned(), ...replaced);
    this.#state = "detached";
  }

  /** What its members have beside its parts. */
  #owned(): Tensor[] {
    return [...this.#linears, ...this.#tokens].flatMap(({ owned }) => owned);
  }

  #demand(call: string, ...states: string[]): void {
    if (!states.includes(this.#state))
      throw new ShapeError(`${call}: the adapter must be ${states.join(" or ")}, got ${this.#state}`);
  }
}

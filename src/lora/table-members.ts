/** LoRA of embeddings and heads, and rows of them that are trained by themselves, as they are in a model. */
import { sub } from "../autograd/basic-ops.ts";
import { dropout } from "../autograd/model-ops.ts";
import { axpy } from "../kernels/axpy.ts";
import { embedding } from "../kernels/embedding.ts";
import { matmul } from "../kernels/matmul.ts";
import type { Table, TableUpdate } from "../nn/table.ts";
import { type Piece, piecesOf } from "../tensor/pieces.ts";
import { rowsOf, type Tensor, tensor } from "../tensor/tensor.ts";
import type { Member, Parameters } from "./members.ts";
import { dropoutOf, type Live } from "./pair-member.ts";
import type { TablePair, TokenRows } from "./parts.ts";

const put = (table: Table, update: TableUpdate): void => {
  table.updates = [...(table.updates ?? []), update];
};

const take = (table: Table, update: TableUpdate): void => {
  const others = table.updates?.filter((one) => one !== update);
  table.updates = others?.length ? others : undefined;
};

/** Why a member of a table that is tied to another cannot be merged. */
export const tiedReason = (name: string, tiedTo: string | undefined): string | undefined =>
  tiedTo &&
  `merge: an embedding and a head that are tied must be changed alike, got ${name} changed apart from ${tiedTo}. Keep the adapter apart`;

/** y = (W + s·X·Y)[ids] of an embedding, h·(W + s·X·Y)ᵀ of a head, whose input has dropout in training. */
export class TableMember implements Member {
  readonly name: string;
  readonly modules: readonly [Table];
  readonly unmergeable: string | undefined;
  readonly #update: TableUpdate;

  constructor(name: string, { table, X, Y, scale, tiedTo }: TablePair, live: Live, stream: number) {
    this.name = name;
    this.modules = [table];
    this.unmergeable = tiedReason(name, tiedTo);
    this.#update = {
      X,
      Y: () => Y,
      scale: () => live.factor * scale,
      dropped: (h) => {
        const drop = dropoutOf(live, stream);
        return drop ? dropout(h, drop.p, drop.key) : h;
      },
    };
  }

  adds(): boolean {
    return true;
  }

  enable(): void {
    put(this.modules[0], this.#update);
  }

  disable(): void {
    take(this.modules[0], this.#update);
  }

  merged(): Parameters {
    const [{ weight }] = this.modules;
    const { X, Y, scale } = this.#update;
    const sum = ({ W, first, rows }: Piece<Tensor>): Tensor =>
      W.gpu.scope(() => axpy(1, W, 1, matmul(rowsOf(X, first, rows), Y(), "nn", { scale: scale() })));
    return { weight: piecesOf(weight).map(sum), bias: undefined };
  }
}

/**
 * Rows R [n,C] in place of those of some ids, W[ids]: an update X·(R − W[ids]) whose X [V,n] has a 1 where a row is the one of an id. A head
 * that is tied has them too.
 */
export class TokenMember implements Member {
  readonly name: string;
  readonly modules: readonly Table[];
  readonly unmergeable: string | undefined;
  readonly #rows: TokenRows;
  readonly #update: TableUpdate;
  /** W[ids], and of which W. */
  #before: Tensor | undefined;
  #of: Table["weight"] | undefined;

  constructor(name: string, tokens: TokenRows) {
    const { tables, ids, rows, tiedTo } = tokens;
    const V = (tables[0]?.weight ?? []).reduce((sum, { shape: [count = 0] }) => sum + count, 0);
    this.name = name;
    this.modules = tables;
    this.unmergeable = tiedReason(name, tiedTo);
    this.#rows = tokens;
    this.#update = { X: oneHot(rows, V, ids), Y: () => sub(rows, this.#before ?? rows), scale: () => 1 };
  }

  adds(): boolean {
    return false;
  }

  /** What it has beside the rows. */
  get owned(): readonly Tensor[] {
    return [this.#update.X, ...(this.#before ? [this.#before] : [])];
  }

  enable(): void {
    const { ids, rows } = this.#rows;
    const [{ weight } = { weight: [] }] = this.modules;
    if (weight !== this.#of) {
      const before = rowsByIds(piecesOf(weight), ids);
      if (this.#before) rows.gpu.release(this.#before);
      this.#before = before;
      this.#of = weight;
    }
    for (const table of this.modules) put(table, this.#update);
  }

  disable(): void {
    for (const table of this.modules) take(table, this.#update);
  }

  /** The tables with the rows in their places. */
  merged(): Parameters {
    const { ids, rows: R } = this.#rows;
    const replaced = ({ W, first, rows }: Piece<Tensor>): Tensor => {
      const at = Array.from({ length: rows }, (_, i) => i);
      ids.forEach((id, k) => {
        if (id >= first && id < first + rows) at[id - first] = rows + k;
      });
      return rowsByIds(
        [
          { W, first: 0, rows },
          { W: R, first: rows, rows: ids.length },
        ],
        at,
      );
    };
    return { weight: piecesOf(this.modules[0]?.weight ?? []).map(replaced), bias: undefined };
  }
}

function rowsByIds(pieces: readonly Piece<Tensor>[], ids: readonly number[]): Tensor {
  const { gpu } = (pieces[0] as Piece<Tensor>).W;
  return gpu.scope(() => embedding(pieces, tensor(gpu, Int32Array.from(ids), [ids.length])));
}

/** [V,n], 1 at [ids[k],k]. */
function oneHot({ gpu }: Tensor, V: number, ids: readonly number[]): Tensor {
  const values = new Float32Array(V * ids.length);
  ids.forEach((id, k) => {
    values[id * ids.length + k] = 1;
  });
  return tensor(gpu, values, [V, ids.length]);
}

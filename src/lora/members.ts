/** What an adapter does to single modules, and which adapters may share one. */
import type { Module } from "../nn/module.ts";
import { ShapeError } from "../tensor/errors.ts";
import { tensorsIn } from "../tensor/packed.ts";
import { piecesOf } from "../tensor/pieces.ts";
import type { Tensor } from "../tensor/tensor.ts";

/** The part of an adapter that is for one module, or for several with the same weight. */
export interface Member {
  readonly name: string;
  readonly modules: readonly Module[];
  /** Whether it only adds to what the module gives, so that others may add to it too. */
  adds(): boolean;
  enable(): void;
  disable(): void;
  /** The parameters with which the modules do the same by themselves: new tensors, or those that are there. Enabled or not. */
  merged(): Parameters;
  /** Why it cannot be merged, if so. */
  readonly unmergeable?: string | undefined;
}

/** What has to be known of a member to let it in. */
export type Guest = Pick<Member, "name" | "modules" | "adds">;

export type Parameters = Pick<Module, "weight" | "bias">;

/** Who is enabled on a module or merged into it, and whether it only adds. */
const users = new WeakMap<Module, Map<object, Guest>>();

/** Throws ShapeError where somebody else is at one of the modules and one of the two does more than add. */
export function demandRoom(call: string, owner: object, members: readonly Guest[]): void {
  for (const member of members)
    for (const module of member.modules)
      for (const [other, theirs] of users.get(module) ?? [])
        if (other !== owner && !(member.adds() && theirs.adds()))
          throw new ShapeError(
            `${call}: adapters share a layer where each only adds B·A to it, got two on ${member.name} of which one does more: DoRA, a start from the base, a trained copy or bias, a pool. Disable or unmerge the other first`,
          );
}

export function enter(owner: object, member: Guest): void {
  for (const module of member.modules) users.set(module, new Map([...(users.get(module) ?? []), [owner, member]]));
}

export function leave(owner: object, { modules }: Pick<Member, "modules">): void {
  for (const module of modules) users.get(module)?.delete(owner);
}

/** A module before something was merged into it, and after. */
export interface Merged {
  readonly name: string;
  readonly module: Module;
  readonly before: Parameters;
  readonly after: Parameters;
}

/** Puts a member's merged parameters into its modules. */
export function mergeInto(member: Member, after: Parameters): Merged[] {
  return member.modules.map((module) => {
    const before = { weight: module.weight, bias: module.bias };
    Object.assign(module, after);
    return { name: member.name, module, before, after };
  });
}

/** Tensors of some parameters that are not among those of others. */
export function tensorsBut(some: Parameters, others: Parameters): Tensor[] {
  const all = ({ weight, bias }: Parameters): Tensor[] => [
    ...piecesOf(weight).flatMap(({ W }) => tensorsIn(W)),
    ...(bias ? [bias] : []),
  ];
  const kept = new Set(all(others));
  return all(some).filter((t) => !kept.has(t));
}

/** The modules that are trained whole, `modulesToSave`, and those whose biases are, `bias: "all"`. */
import { scale } from "../kernels/axpy.ts";
import type { Module } from "../nn/module.ts";
import { ShapeError } from "../tensor/errors.ts";
import { isPacked, type PackedMatrix } from "../tensor/packed.ts";
import { piecesOf } from "../tensor/pieces.ts";
import type { Tensor } from "../tensor/tensor.ts";
import { CLASSIFIER_HEADS, isSaved, type LoraConfig } from "./config.ts";
import type { Member } from "./members.ts";
import type { HasLinears, SavedLayer, SavedParts } from "./parts.ts";
import { tiedReason } from "./table-members.ts";

export function savedMember(name: string, { layer, weight, bias, tiedTo }: SavedLayer): Member {
  return {
    name,
    modules: [layer],
    unmergeable: tiedReason(name, tiedTo),
    adds: () => false,
    enable() {
      layer.trained = { weight, bias };
    },
    disable() {
      layer.trained = undefined;
    },
    merged: () => ({ weight: weight ? copy(weight) : layer.weight, bias: bias ? scale(bias, 1) : layer.bias }),
  };
}

export const parametersOf = ({ weight, bias }: SavedParts): Tensor[] => [
  ...(weight ? piecesOf(weight).map(({ W }) => W) : []),
  ...(bias ? [bias] : []),
];

/** Copies of a module's weight and bias, or of its bias alone, to be trained. Throws ShapeError where a weight is packed. */
export function copyOf({ weight, bias }: Module, isWhole: boolean): SavedParts {
  return { weight: isWhole ? copy(weight) : undefined, bias: bias && scale(bias, 1) };
}

function copy(weight: Module["weight"]): Tensor | readonly Tensor[] {
  const one = (W: Tensor | PackedMatrix): Tensor => {
    if (!isPacked(W)) return scale(W, 1);
    throw new ShapeError(`lora: modules_to_save are trained as f32, got one packed as ${W.format}. Load it as f32`);
  };
  return "length" in weight ? weight.map(one) : one(weight);
}

/**
 * The modules that `modulesToSave` names, PEFT's way: "norm" is also input_layernorm. Throws ShapeError where an entry names none, unless it
 * is one that PEFT adds, and for layers that files have the other way around.
 */
export function savedModulesOf(config: LoraConfig, model: HasLinears): string[] {
  const { modulesToSave = [] } = config;
  const { linears, modules = linears } = model;
  const names = [...modules.keys()].filter((name) => isSaved(modulesToSave, name));
  const turned = names.find((name) => model.isTransposed?.(`${name}.weight`));
  if (turned !== undefined)
    throw new ShapeError(
      `lora: modules_to_save must be modules that files have as [N,K], got "${turned}". Adapt it, or leave it out`,
    );
  const idle = modulesToSave.find(
    (entry) => !names.some((name) => isSaved([entry], name)) && !(names.length > 0 && CLASSIFIER_HEADS.includes(entry)),
  );
  if (idle !== undefined)
    throw new ShapeError(`lora: modules_to_save must name modules of the model, got "${idle}". Look for its name`);
  return names;
}

/** The other modules whose biases are trained: by `bias: "all"`, and not with A and B. */
export function biasedModulesOf(
  { bias }: LoraConfig,
  { linears, modules = linears }: HasLinears,
  others: readonly string[],
): string[] {
  if (bias !== "all") return [];
  return [...modules].flatMap(([name, module]) => (module.bias && !others.includes(name) ? [name] : []));
}

/** A WGSL file made callable. Binding names, uniform fields and tunables are read from the WGSL itself. */
import { GpuError } from "./errors.ts";
import type { BindingLayout, Gpu, HasBuffer, Pipeline } from "./gpu.ts";
import { closingBrace, unroll } from "./unroll.ts";

/** Values for a kernel's `override`s and for its replaceable top-level `const NAME: u32 = …;`. */
export type Tuned = Readonly<Record<string, number>>;

/** A value for a field of a kernel's uniform struct; a function is asked each time, also at every run of a traced step. */
export type Uniform = number | (() => number);

/** The uniform's value as it is now. */
export const uniformValue = (uniform: Uniform): number => (typeof uniform === "number" ? uniform : uniform());

/** f of a uniform: of its value at the time, where that varies. */
export function mapUniform(uniform: Uniform, f: (value: number) => number): Uniform {
  return typeof uniform === "number" ? f(uniform) : () => f(uniform());
}

/**
 * Encodes one dispatch. `threads` counts invocations per axis; workgroups are rounded up. A one-axis grid too large for
 * WebGPU's 65,535 workgroups is folded into y: such kernels index by `id.x + id.y * WG * groups.x`.
 */
export type Kernel = (
  gpu: Gpu,
  uniforms: Readonly<Record<string, Uniform>>,
  buffers: Readonly<Record<string, HasBuffer>>,
  threads: readonly [x: number, y?: number, z?: number],
  tuned?: Tuned,
  parts?: readonly Part[],
) => void;

/** Declarations that stand in for those of a kernel, by name: another way to read an operand, one more thing done to a result. */
export interface Part {
  readonly name: string;
  /** Functions, aliases, constants, bindings: name → text. */
  readonly declarations: ReadonlyMap<string, string>;
  /** `enable …;` lines, which go to the top. */
  readonly directives: readonly string[];
}

const NO_TUNING: Tuned = {};
const NO_PARTS: readonly Part[] = [];
export const MAX_GROUPS = 65535;

interface Variant {
  readonly key: string;
  readonly source: () => string;
  readonly constants: Tuned;
  readonly workgroup: readonly number[];
  readonly layout: WgslLayout;
}

/**
 * Makes a part of a WGSL text: of all its declarations, or of those named. A kernel file can lend some of its functions so.
 *
 * Throws GpuError if a named one is not there.
 */
/* @__NO_SIDE_EFFECTS__ */
export function definePart(name: string, source: string, only?: readonly string[]): Part {
  const all = declarations(source);
  const missing = only?.find((id) => !all.has(id));
  if (missing !== undefined) throw new GpuError(`${name}: a part takes declarations that exist, got "${missing}"`);
  return {
    name,
    declarations: only ? new Map([...all].filter(([id]) => only.includes(id))) : all,
    directives: [...source.matchAll(/^enable .*;$/gm)].map(([line]) => line),
  };
}

/** The kernel's text with the parts' declarations in place of its own of the same name, or added to them. */
export function assemble(source: string, parts: readonly Part[]): string {
  let text = source;
  for (const part of parts)
    for (const [id, declaration] of part.declarations) {
      const own = declarations(text).get(id);
      text = own === undefined ? `${text}\n${declaration}\n` : text.replace(own, () => declaration);
    }
  const directives = parts.flatMap((part) => part.directives);
  return `${[...new Set(directives)].map((line) => `${line}\n`).join("")}${text}`;
}

/**
 * Turns one WGSL file into a function that encodes one dispatch.
 *
 * Rules for the WGSL: one entry point `main`; at most one uniform struct, of 4-byte scalars only, so a field's byte offset
 * is 4 × its index; sizes that may be tuned are `override`s, or `const`s of u32 where WGSL demands a constant.
 */
/* @__NO_SIDE_EFFECTS__ */
export function defineKernel(name: string, source: string): Kernel {
  const variants = new Map<string, Variant>();

  const variantOf = (tuned: Tuned, parts: readonly Part[]): Variant => {
    let key = name;
    for (const part of parts) key += ` +${part.name}`;
    for (const id in tuned) key += ` ${id}=${tuned[id]}`;
    const known = variants.get(key);
    if (known) return known;
    const made = specialize(name, assemble(source, parts), tuned, key);
    variants.set(key, made);
    return made;
  };

  return (gpu, uniforms, buffers, threads, tuned = NO_TUNING, parts = NO_PARTS) => {
    const variant = variantOf(tuned, parts);
    const { layout } = variant;
    const pipeline: Pipeline = gpu.pipeline(
      name,
      variant.key,
      variant.source,
      variant.constants,
      layout.bindings,
      Math.ceil(layout.fields.length / 4) * 16,
    );
    const bound = layout.storage.map((id) => {
      const given = buffers[id];
      if (given === undefined)
        throw new GpuError(`${name}: buffer "${id}" was not given, got ${Object.keys(buffers).join(", ")}`);
      return given;
    });
    const fill = (slot: DataView): void =>
      layout.fields.forEach(({ id, type }, i) => {
        const given = uniforms[id];
        if (given === undefined)
          throw new GpuError(`${name}: uniform "${id}" was not given, got ${Object.keys(uniforms).join(", ")}`);
        const value = uniformValue(given);
        if (type === "f32") slot.setFloat32(4 * i, value, true);
        else slot.setInt32(4 * i, value, true);
      });
    let [x = 1, y = 1, z = 1] = [0, 1, 2].map((axis) =>
      Math.ceil((threads[axis] ?? 1) / (variant.workgroup[axis] ?? 1)),
    );
    if (x > MAX_GROUPS && threads.length === 1) {
      y = Math.ceil(x / MAX_GROUPS);
      x = Math.ceil(x / y);
    }
    if (Math.max(x, y, z) > MAX_GROUPS)
      throw new GpuError(`${name}: at most ${MAX_GROUPS} workgroups per axis, got ${x}×${y}×${z}. Use a smaller batch`);
    if (x * y * z > 0) gpu.dispatch({ pipeline, uniforms, fill, buffers: bound, groups: [x, y, z] });
  };
}

interface WgslLayout {
  readonly bindings: readonly BindingLayout[];
  /** Names of the bindings that are not the uniforms. */
  readonly storage: readonly string[];
  readonly fields: readonly { readonly id: string; readonly type: string }[];
  readonly overrides: ReadonlyMap<string, number>;
  readonly constants: ReadonlyMap<string, number>;
  readonly workgroup: readonly string[];
}

/** Reads what a kernel declares. `wgsl_reflect` proves this reading right in a test. */
export function readWgsl(source: string): WgslLayout {
  const code = source.replace(/\/\/.*$/gm, "");
  const bindings = [...code.matchAll(/@binding\((\d+)\)\s*var<([^>]+)>\s*(\w+)/g)].map(([, slot, space = "", id]) => ({
    slot: Number(slot),
    id: String(id),
    type: (space === "uniform"
      ? "uniform"
      : /read_write/.test(space)
        ? "storage"
        : "read-only-storage") as GPUBufferBindingType,
  }));
  const struct = /var<uniform>\s*\w+\s*:\s*(\w+)/.exec(code)?.[1];
  const body = struct ? (new RegExp(`struct\\s+${struct}\\s*\\{([^}]*)\\}`).exec(code)?.[1] ?? "") : "";
  return {
    bindings,
    storage: bindings.filter(({ type }) => type !== "uniform").map(({ id }) => id),
    fields: [...body.matchAll(/(\w+)\s*:\s*(u32|i32|f32)/g)].map(([, id, type]) => ({
      id: String(id),
      type: String(type),
    })),
    overrides: new Map(
      [...code.matchAll(/\boverride\s+(\w+)[^=;]*=\s*(\d+)/g)].map(([, id, value]) => [String(id), Number(value)]),
    ),
    constants: new Map(
      [...code.matchAll(/^const\s+(\w+)\s*:\s*u32\s*=\s*(\d+)u?\s*;/gm)].map(([, id, value]) => [
        String(id),
        Number(value),
      ]),
    ),
    workgroup: (/@workgroup_size\(([^)]*)\)/.exec(code)?.[1] ?? "1").split(",").map((size) => size.trim()),
  };
}

/** Top-level functions, aliases, constants, structs and variables of a WGSL text, by name. */
function declarations(source: string): Map<string, string> {
  const found = new Map<string, string>();
  const head = /^(?:@group\(\d+\) @binding\(\d+\) )?(fn|struct|alias|const|override|var(?:<[^>]+>)?) (\w+)/gm;
  for (const match of source.matchAll(head)) {
    const isBlock = match[1] === "fn" || match[1] === "struct";
    const end = isBlock ? closingBrace(source, source.indexOf("{", match.index) + 1) : source.indexOf(";", match.index);
    found.set(String(match[2]), source.slice(match.index, end + 1));
  }
  return found;
}

function specialize(name: string, source: string, tuned: Tuned, key: string): Variant {
  const layout = readWgsl(source);
  const constants: Record<string, number> = {};
  let text = source;
  for (const [id, value] of Object.entries(tuned)) {
    if (layout.overrides.has(id)) constants[id] = value;
    else if (layout.constants.has(id))
      text = text.replace(new RegExp(`^(const\\s+${id}\\s*:\\s*u32\\s*=\\s*)\\d+`, "m"), `$1${value}`);
    else throw new GpuError(`${name}: there is no override or const "${id}" to tune, got ${id} = ${value}`);
  }
  const values = readWgsl(text).constants;
  const workgroup = layout.workgroup.map(
    (size) =>
      constants[size] ??
      layout.overrides.get(size) ??
      values.get(size) ??
      (/^\d+u?$/.test(size) ? Number.parseInt(size, 10) : Number.NaN),
  );
  if (workgroup.some((size) => !(size > 0)))
    throw new GpuError(
      `${name}: @workgroup_size(${layout.workgroup.join(", ")}) is not known before the pipeline is built`,
    );
  return { key, source: () => unroll(text), constants, workgroup, layout };
}

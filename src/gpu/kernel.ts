/** A WGSL file made callable. Binding names, uniform fields and tunables are read from the WGSL itself. */
import { GpuError } from "./errors.ts";
import type { BindingLayout, Gpu, HasBuffer, Pipeline } from "./gpu.ts";
import { unroll } from "./unroll.ts";

/** Values for a kernel's `override`s and for its replaceable top-level `const NAME: u32 = …;`. */
export type Tuned = Readonly<Record<string, number>>;

/**
 * Encodes one dispatch. `threads` counts invocations per axis; workgroups are rounded up. A one-axis grid too large for
 * WebGPU's 65,535 workgroups is folded into y: such kernels index by `id.x + id.y * WG * groups.x`.
 */
export type Kernel = (
  gpu: Gpu,
  uniforms: Readonly<Record<string, number>>,
  buffers: Readonly<Record<string, HasBuffer>>,
  threads: readonly [x: number, y?: number, z?: number],
  tuned?: Tuned,
) => void;

const NO_TUNING: Tuned = {};
const MAX_GROUPS = 65535;

interface Variant {
  readonly key: string;
  readonly source: () => string;
  readonly constants: Tuned;
  readonly workgroup: readonly number[];
}

/**
 * Turns one WGSL file into a function that encodes one dispatch.
 *
 * Rules for the WGSL: one entry point `main`; at most one uniform struct, of 4-byte scalars only, so a field's byte offset
 * is 4 × its index; sizes that may be tuned are `override`s, or `const`s of u32 where WGSL demands a constant.
 */
/* @__NO_SIDE_EFFECTS__ */
export function defineKernel(name: string, source: string): Kernel {
  const layout = readWgsl(source);
  const storage = layout.bindings.filter(({ type }) => type !== "uniform");
  const variants = new Map<string, Variant>();

  const variantOf = (tuned: Tuned): Variant => {
    let key = name;
    for (const id in tuned) key += ` ${id}=${tuned[id]}`;
    const known = variants.get(key);
    if (known) return known;
    const made = specialize(name, source, layout, tuned, key);
    variants.set(key, made);
    return made;
  };

  return (gpu, uniforms, buffers, threads, tuned = NO_TUNING) => {
    const variant = variantOf(tuned);
    const pipeline: Pipeline = gpu.pipeline(
      name,
      variant.key,
      variant.source,
      variant.constants,
      layout.bindings,
      Math.ceil(layout.fields.length / 4) * 16,
    );
    const bound = storage.map(({ id }) => {
      const given = buffers[id];
      if (given === undefined)
        throw new GpuError(`${name}: buffer "${id}" was not given, got ${Object.keys(buffers).join(", ")}`);
      return given.buffer;
    });
    const fill = (slot: DataView): void =>
      layout.fields.forEach(({ id, type }, i) => {
        const value = uniforms[id];
        if (value === undefined)
          throw new GpuError(`${name}: uniform "${id}" was not given, got ${Object.keys(uniforms).join(", ")}`);
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
    if (x * y * z > 0) gpu.dispatch(pipeline, fill, bound, [x, y, z]);
  };
}

interface WgslLayout {
  readonly bindings: readonly (BindingLayout & { readonly id: string })[];
  readonly fields: readonly { readonly id: string; readonly type: string }[];
  readonly overrides: ReadonlyMap<string, number>;
  readonly constants: ReadonlySet<string>;
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
    fields: [...body.matchAll(/(\w+)\s*:\s*(u32|i32|f32)/g)].map(([, id, type]) => ({
      id: String(id),
      type: String(type),
    })),
    overrides: new Map(
      [...code.matchAll(/\boverride\s+(\w+)[^=;]*=\s*(\d+)/g)].map(([, id, value]) => [String(id), Number(value)]),
    ),
    constants: new Set([...code.matchAll(/^const\s+(\w+)\s*:\s*u32\s*=\s*\d+u?\s*;/gm)].map(([, id]) => String(id))),
    workgroup: (/@workgroup_size\(([^)]*)\)/.exec(code)?.[1] ?? "1").split(",").map((size) => size.trim()),
  };
}

function specialize(name: string, source: string, layout: WgslLayout, tuned: Tuned, key: string): Variant {
  const constants: Record<string, number> = {};
  let text = source;
  for (const [id, value] of Object.entries(tuned)) {
    if (layout.overrides.has(id)) constants[id] = value;
    else if (layout.constants.has(id))
      text = text.replace(new RegExp(`^(const\\s+${id}\\s*:\\s*u32\\s*=\\s*)\\d+`, "m"), `$1${value}`);
    else throw new GpuError(`${name}: there is no override or const "${id}" to tune, got ${id} = ${value}`);
  }
  const workgroup = layout.workgroup.map(
    (size) => constants[size] ?? layout.overrides.get(size) ?? tuned[size] ?? Number.parseInt(size, 10),
  );
  if (workgroup.some((size) => !(size > 0)))
    throw new GpuError(
      `${name}: @workgroup_size(${layout.workgroup.join(", ")}) is not known before the pipeline is built`,
    );
  return { key, source: () => unroll(text), constants, workgroup };
}

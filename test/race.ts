/** Runs a kernel in an interpreter that reports data races: no GPU, every workgroup, small grids only. */
import { detectRaces, WgslDebug, WgslExec } from "wgsl_reflect/wgsl_reflect.module.js";
import { readWgsl } from "../src/gpu/kernel.ts";
import { closingBrace, unroll } from "../src/gpu/unroll.ts";

export interface RaceCheck {
  readonly name: string;
  readonly source: string;
  /** Values for `override`s and for `const NAME: u32`s: make tiles and workgroups as small as they go. */
  readonly constants?: Readonly<Record<string, number>>;
  /** Workgroups. */
  readonly groups: readonly [x: number, y?: number, z?: number];
  readonly uniforms: Readonly<Record<string, number>>;
  /** The storage buffers by name. A `read_write` buffer is copied: its end state comes back in `outputs`. */
  readonly buffers: Readonly<Record<string, Float32Array | Uint32Array>>;
}

export interface RaceResult {
  /** Pairs of accesses of two threads of one workgroup to the same bytes, one a write, with no barrier between. */
  readonly races: readonly string[];
  /** Barriers that some threads of a workgroup never reach. */
  readonly divergences: readonly string[];
  readonly outputs: Readonly<Record<string, Float32Array>>;
}

const PAST_END = 4096;
const NAN_BITS = 0xffffffff;

/**
 * What races when `main` runs on this grid, and what it computes.
 *
 * `outputs` must be compared with what is expected: the interpreter knows not all of WGSL, and a kernel it ran wrongly proves nothing.
 * Races between workgroups are not seen. Nor are barriers in functions of the kernel's own that give a result: what they part is
 * reported. `var<private>` is shared by all threads, so it must be the same in all. Throws where it cannot parse or run the source.
 */
export function findRaces({ name, source, constants = {}, groups, uniforms, buffers }: RaceCheck): RaceResult {
  let text = source.replace(/^override\b/gm, "const"); // the interpreter cannot size an array by an override
  for (const [id, value] of Object.entries(constants)) {
    const declared = new RegExp(`^(const\\s+${id}\\b[^=;]*=)[^;]+;`, "m");
    if (!declared.test(text))
      throw new Error(`findRaces: ${name} has no override or const "${id}", got ${id} = ${value}`);
    text = text.replace(declared, `$1 ${value}u;`);
  }
  text = unroll(text); // as it is sent; the interpreter cannot assign to part of a vector in an array either
  text = plainBarriers(text);
  const { bindings, fields } = readWgsl(source);
  const outputs: Record<string, Float32Array> = {};
  const bound: Record<string, unknown> = {};
  for (const { slot, id, type } of bindings) {
    const given = buffers[id];
    if (type === "uniform") bound[slot] = { uniform: uniformBytes(name, fields, uniforms) };
    else if (!given)
      throw new Error(`findRaces: ${name} needs a buffer "${id}", got ${Object.keys(buffers).join(", ")}`);
    else {
      // WGSL lets a kernel read past the end of a buffer, the interpreter does not: what lies there is NaN.
      const past = type === "storage" ? 0 : PAST_END;
      const copy = new Uint32Array(given.length + past).fill(NAN_BITS);
      copy.set(new Uint32Array(given.buffer, given.byteOffset, given.length));
      bound[slot] = copy.buffer;
      if (type === "storage") outputs[id] = new Float32Array(copy.buffer);
    }
  }
  const races: string[] = [];
  const divergences: string[] = [];
  const [gx, gy = 1, gz = 1] = groups;
  // One call per workgroup: within one call the detector watches workgroup memory for the first workgroup only.
  for (let z = 0; z < gz; z++)
    for (let y = 0; y < gy; y++)
      for (let x = 0; x < gx; x++) {
        const one = onlyWorkgroup(text, [x, y, z], [gx, gy, gz]);
        const found = interpret(name, () => detectRaces(one, "main", [1, 1, 1], { 0: bound }));
        races.push(...found.races.map(({ message }) => `workgroup ${x},${y},${z}: ${message}`));
        divergences.push(...found.errors.map((message) => `workgroup ${x},${y},${z}: ${message}`));
      }
  return { races, divergences, outputs };
}

/**
 * The text with its barriers where the interpreter heeds them: a function that waits at some and gives no result is written out where
 * it is called, and no barrier is the first thing in its block.
 */
function plainBarriers(source: string): string {
  let text = source;
  for (const [head, id = "", parameters = ""] of source.matchAll(/^fn (\w+)\(([^()]*)\) \{/gm)) {
    const start = text.indexOf(head);
    const end = closingBrace(text, start + head.length);
    const body = text.slice(start + head.length, end);
    if (!body.includes("workgroupBarrier();")) continue;
    const names = parameters.split(",").map((parameter) => parameter.split(":")[0]?.trim());
    text = `${text.slice(0, start)}${text.slice(end + 1)}`.replace(
      new RegExp(`\\b${id}\\(([^()]*)\\);`, "g"),
      (_, given: string) => {
        const values = given.split(",").map((value) => value.trim());
        const lets = names.map((name, i) => (name && name !== values[i] ? `let ${name} = ${values[i]};` : ""));
        return `{ ${lets.join(" ")} ${body} }`;
      },
    );
  }
  return text.replace(/\{\s*workgroupBarrier\(\);/g, "{ let before_barrier = 0u; workgroupBarrier();");
}

/**
 * Runs the interpreter without four faults of wgsl_reflect 1.6.0:
 * - What it cannot do it tells the console and goes on. Here it throws.
 * - Where it steps into a function, all threads share the place where the result waits to be used, and each gets that of the
 *   last. Here a call is one step.
 * - It works out a call's arguments among the parameters before them, so that a name may mean the wrong thing.
 * - A call whose result is not used overwrites variables of the caller that have a parameter's name.
 */
function interpret<T>(name: string, run: () => T): T {
  const { stepStack } = WgslDebug.prototype;
  const { _evalCallValue, _call } = WgslExec.prototype;
  const { error: print } = console;
  const call = (
    exec: WgslExec,
    { name: callee, args }: CallNode,
    context: Context,
  ): ReturnType<typeof _evalCallValue> => {
    const inner = context.clone();
    inner.currentFunctionName = callee;
    const { node } = context.getFunction(callee) ?? { node: undefined };
    const values = args?.map((arg) => exec.evalExpression(arg, context)) ?? [];
    node?.args.forEach((parameter, i) => {
      const value = values[i];
      if (value) inner.createVariable(parameter.name, value, parameter);
    });
    return exec._execStatements(node?.body ?? [], inner);
  };
  WgslDebug.prototype.stepStack = function (stack) {
    return stepStack.call(this, stack, false);
  };
  WgslExec.prototype._evalCallValue = function (node, context) {
    return context.getFunction(node.name) ? call(this, node, context) : _evalCallValue.call(this, node, context);
  };
  WgslExec.prototype._call = function (node, context) {
    if (context.getFunction(node.name)) call(this, node, context);
    else _call.call(this, node, context);
  };
  console.error = (...complaint: unknown[]) => {
    throw new Error(complaint.filter((part) => typeof part === "string").join(" "));
  };
  try {
    return run();
  } catch (error) {
    throw new Error(`findRaces: wgsl_reflect cannot run ${name}: ${String(error)}`, { cause: error });
  } finally {
    WgslDebug.prototype.stepStack = stepStack;
    WgslExec.prototype._evalCallValue = _evalCallValue;
    WgslExec.prototype._call = _call;
    console.error = print;
  }
}

type CallNode = Pick<Parameters<WgslExec["_evalCallValue"]>[0], "name" | "args">;
type Context = Parameters<WgslExec["_evalCallValue"]>[1];

function uniformBytes(
  name: string,
  fields: readonly { readonly id: string; readonly type: string }[],
  uniforms: Readonly<Record<string, number>>,
): ArrayBuffer {
  const view = new DataView(new ArrayBuffer(Math.ceil(fields.length / 4) * 16));
  fields.forEach(({ id, type }, i) => {
    const value = uniforms[id];
    if (value === undefined)
      throw new Error(`findRaces: ${name} needs a uniform "${id}", got ${Object.keys(uniforms).join(", ")}`);
    if (type === "f32") view.setFloat32(4 * i, value, true);
    else view.setUint32(4 * i, value, true);
  });
  return view.buffer;
}

/** The kernel with its workgroup's place in the grid written in, so that a grid of one workgroup runs just that one. */
function onlyWorkgroup(source: string, place: readonly number[], grid: readonly number[]): string {
  const [, head = "", rest = ""] = /^([\s\S]*@compute\b)([\s\S]*)$/.exec(source) ?? [];
  const size = (/@workgroup_size\(([^)]*)\)/.exec(rest)?.[1] ?? "1").split(",").map((part) => part.trim());
  const lines: string[] = [];
  const values: Record<string, (id: string) => string> = {
    workgroup_id: () => `vec3u(${place.map((n) => `${n}u`).join(", ")})`,
    num_workgroups: () => `vec3u(${grid.map((n) => `${n}u`).join(", ")})`,
    global_invocation_id: (id) =>
      `${id} + vec3u(${place.map((n, axis) => `${n}u * ${size[axis] ?? "1u"}`).join(", ")})`,
  };
  const renamed = rest.replace(/@builtin\((\w+)\)\s*(\w+)(?=\s*:)/g, (whole, builtin: string, id: string) => {
    const value = values[builtin];
    if (!value) return whole;
    lines.push(`let ${id} = ${value(`${id}_here`)};`);
    return `@builtin(${builtin}) ${id}_here`;
  });
  return `${head}${renamed.replace(/(\bfn\s+main\s*\([\s\S]*?\)\s*\{)/, `$1 ${lines.join(" ")}`)}`;
}

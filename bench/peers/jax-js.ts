/** The peer jax-js: a jitted function per piece of work. Its arrays are counted: a use consumes one, `.ref` keeps it. */
import type { Array as JaxArray } from "@jax-js/jax";
import { llamaStep } from "./jax-js-llama.ts";
import {
  type HostMatrix,
  importError,
  type Peer,
  type PeerCase,
  type PeerSource,
  type PeerWork,
  packageVersion,
} from "./peer.ts";

export type Jax = typeof import("@jax-js/jax");

export const jaxJs: PeerSource = {
  name: "jax-js",
  open: async (host): Promise<Peer> => {
    const jax = await importJax();
    const found = await jax.init("webgpu");
    if (!found.includes("webgpu")) throw new Error(`jax.init found ${found.join(", ") || "nothing"}, not webgpu`);
    jax.defaultDevice("webgpu");
    return {
      name: "jax-js",
      version: await packageVersion(host, "@jax-js/jax"),
      device: () => jax.getWebGPUDevice(),
      prepare: (work) => prepare(jax, work),
    };
  },
};

async function importJax(): Promise<Jax> {
  lendIteratorHelpers();
  try {
    return await import("@jax-js/jax");
  } catch (error) {
    throw importError(error);
  }
}

/** `einsum`, which its attention is made of, maps and filters iterators: Node can from 22 on. */
function lendIteratorHelpers(): void {
  const prototype = Object.getPrototypeOf(Object.getPrototypeOf([].values())) as object;
  if ("map" in prototype) return;
  function* map<T, U>(this: Iterable<T>, f: (value: T) => U): Generator<U> {
    for (const value of this) yield f(value);
  }
  function* filter<T>(this: Iterable<T>, f: (value: T) => boolean): Generator<T> {
    for (const value of this) if (f(value)) yield value;
  }
  for (const helper of [map, filter])
    Object.defineProperty(prototype, helper.name, { configurable: true, writable: true, value: helper });
}

async function prepare(jax: Jax, work: PeerWork): Promise<PeerCase> {
  const { operands, results, f } = program(jax, work);
  const inputs = await Promise.all(operands.map((operand) => upload(jax, operand)));
  const compiled = jax.jit(f);
  let outputs: JaxArray[] = [];
  const drop = (): void => {
    for (const output of outputs) output.dispose();
    outputs = [];
  };
  return {
    run: () => {
      drop();
      outputs = compiled(...inputs.map((input) => input.ref));
      // Arrays are lazy, and what is dropped before it was submitted is never computed.
      for (const output of outputs) output.ref.gpuBufferSync();
    },
    finish: () => jax.getWebGPUDevice().queue.onSubmittedWorkDone() as Promise<void>,
    read: async () => {
      const values = await Promise.all(outputs.map((output) => output.ref.data()));
      if (typeof results === "function") return results(values);
      return Object.fromEntries(results.map((name, i) => [name, values[i] ?? new Float32Array()]));
    },
    dispose: () => {
      drop();
      for (const input of inputs) input.dispose();
      compiled.dispose();
    },
  };
}

export interface Program {
  readonly operands: readonly (HostMatrix | Int32Array<ArrayBuffer>)[];
  /** The names of what `f` gives, or what is made of it. */
  readonly results: readonly string[] | ((values: Float32Array[]) => Record<string, Float32Array>);
  readonly f: (...args: JaxArray[]) => JaxArray[];
}

function program(jax: Jax, work: PeerWork): Program {
  const { matmul, sum } = jax.numpy;
  type Args = [JaxArray, JaxArray, JaxArray, JaxArray, JaxArray];
  switch (work.op) {
    case "matmul": {
      const { layout } = work;
      const f = (...[x, w]: Args): JaxArray[] => [
        matmul(layout === "tn" ? x.transpose() : x, layout === "nt" ? w.transpose() : w),
      ];
      return { operands: [work.x, work.w], results: ["y"], f: f as Program["f"] };
    }
    case "lora-forward":
    case "lora-step": {
      const { scale } = work;
      const forward = (W: JaxArray) => (x: JaxArray, A: JaxArray, B: JaxArray) => {
        const low = matmul(matmul(x.ref, A.transpose()), B.transpose());
        return matmul(x, W.transpose()).add(low.mul(scale));
      };
      if (work.op === "lora-forward") {
        const f = (...[x, W, A, B]: Args): JaxArray[] => [forward(W)(x, A, B)];
        return { operands: [work.x, work.W, work.A, work.B], results: ["y"], f: f as Program["f"] };
      }
      const step = (...[x, W, A, B, dy]: Args): JaxArray[] => {
        const [y, pull] = jax.vjp(forward(W) as (...args: JaxArray[]) => JaxArray, [x, A, B]);
        const gradients = pull(dy);
        pull.dispose();
        return [y, ...gradients];
      };
      const operands = [work.x, work.W, work.A, work.B, work.dy];
      return { operands, results: ["y", "dx", "dA", "dB"], f: step as Program["f"] };
    }
    case "add":
      return { operands: [work.x, work.z], results: ["y"], f: ((...[x, z]: Args) => [x.add(z)]) as Program["f"] };
    case "row-sum":
      return { operands: [work.x], results: ["y"], f: ((...[x]: Args) => [sum(x, 1)]) as Program["f"] };
    case "llama-step":
      return llamaStep(jax, work);
  }
}

function upload(jax: Jax, operand: HostMatrix | Int32Array<ArrayBuffer>): Promise<JaxArray> {
  const { array } = jax.numpy;
  if (operand instanceof Int32Array) return array(operand, { shape: [operand.length] }).blockUntilReady();
  return array(operand.values, { shape: [operand.rows, operand.columns] }).blockUntilReady();
}

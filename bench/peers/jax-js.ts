/** The peer jax-js: a jitted function per piece of work. Its arrays are counted: a use consumes one, `.ref` keeps it. */
import type { Array as JaxArray } from "@jax-js/jax";
import {
  type HostMatrix,
  importError,
  type Peer,
  type PeerCase,
  type PeerSource,
  type PeerWork,
  packageVersion,
} from "./peer.ts";

type Jax = typeof import("@jax-js/jax");

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
      prepare: (work) => prepare(jax, work),
    };
  },
};

async function importJax(): Promise<Jax> {
  try {
    return await import("@jax-js/jax");
  } catch (error) {
    throw importError(error);
  }
}

async function prepare(jax: Jax, work: PeerWork): Promise<PeerCase> {
  const { operands, results, f } = program(jax, work);
  const inputs = await Promise.all(operands.map((matrix) => upload(jax, matrix)));
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
      return Object.fromEntries(results.map((name, i) => [name, values[i] ?? new Float32Array()]));
    },
    dispose: () => {
      drop();
      for (const input of inputs) input.dispose();
      compiled.dispose();
    },
  };
}

interface Program {
  readonly operands: readonly HostMatrix[];
  readonly results: readonly string[];
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
  }
}

const upload = (jax: Jax, { values, rows, columns }: HostMatrix): Promise<JaxArray> =>
  jax.numpy.array(values, { shape: [rows, columns] }).blockUntilReady();

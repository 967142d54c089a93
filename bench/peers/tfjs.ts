/** The peer TensorFlow.js with its WebGPU backend: eager ops, and its own gradients. */
import type { Tensor } from "@tensorflow/tfjs-core";
import {
  type HostMatrix,
  importError,
  type Peer,
  type PeerCase,
  type PeerSource,
  type PeerWork,
  packageVersion,
} from "./peer.ts";
import { llamaStep } from "./tfjs-llama.ts";

export type Tf = typeof import("@tensorflow/tfjs-core");

export const tfjs: PeerSource = {
  name: "tfjs",
  open: async (host): Promise<Peer> => {
    const tf = await importTf();
    if (!(await tf.setBackend("webgpu"))) throw new Error("tf.setBackend could not start the backend webgpu");
    return {
      name: "tfjs",
      version: await packageVersion(host, "@tensorflow/tfjs-backend-webgpu"),
      device: () => (tf.backend() as Backend).device,
      prepare: (work) => prepare(tf, work),
    };
  },
};

async function importTf(): Promise<Tf> {
  // Deno has Node's `process`, by which the package would know Node and ask for its modules: here it is to see a page.
  const pretend = "Deno" in globalThis && !("WorkerGlobalScope" in globalThis);
  if (pretend) Object.assign(globalThis, { WorkerGlobalScope: Object });
  try {
    const tf = await import("@tensorflow/tfjs-core");
    await import("@tensorflow/tfjs-backend-webgpu"); // registers itself if navigator.gpu is there
    // The packages for Node leave the gradients out, and all of them at once cannot be imported there. They are awaited within `try`, where
    // bundling goes on without what is not installed.
    const gradients: object[] = [
      await import("@tensorflow/tfjs-core/dist/gradients/Add_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/BatchMatMul_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Concat_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Mean_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Multiply_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/RealDiv_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Reshape_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Rsqrt_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Sigmoid_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Slice_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Softmax_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/SplitV_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Square_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Sub_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Sum_grad.js"),
      await import("@tensorflow/tfjs-core/dist/gradients/Transpose_grad.js"),
    ];
    for (const configs of gradients) for (const config of Object.values(configs)) tf.registerGradient(config);
    return tf;
  } catch (error) {
    throw importError(error);
  } finally {
    if (pretend) Reflect.deleteProperty(globalThis, "WorkerGlobalScope");
  }
}

async function prepare(tf: Tf, work: PeerWork): Promise<PeerCase> {
  if (work.op === "llama-step") return stepCase(tf, work);
  const { operands, f } = program(tf, work);
  const inputs = operands.map(({ values, rows, columns }) => tf.tensor2d(values, [rows, columns]));
  return caseOf(tf, inputs, () => f(...(inputs as Inputs)));
}

function stepCase(tf: Tf, work: Extract<PeerWork, { op: "llama-step" }>): PeerCase {
  const { inputs, f, results } = llamaStep(tf, work);
  const prepared = caseOf(tf, inputs, f);
  return { ...prepared, read: async () => results(await prepared.read()) };
}

function caseOf(tf: Tf, inputs: readonly Tensor[], f: () => Readonly<Record<string, Tensor>>): PeerCase {
  const backend = tf.backend() as Backend;
  let outputs: Readonly<Record<string, Tensor>> = {};
  const drop = (): void => {
    for (const output of Object.values(outputs)) output.dispose();
    outputs = {};
  };
  return {
    run: () => {
      drop();
      outputs = tf.tidy(f);
    },
    finish: async () => {
      backend.endComputePassEncoder();
      if (backend.commandEncoder) backend.submitQueue();
      await backend.device.queue.onSubmittedWorkDone();
    },
    read: async () => {
      const entries = Object.entries(outputs).map(async ([name, output]) => [name, await output.data()] as const);
      return Object.fromEntries(await Promise.all(entries));
    },
    dispose: () => {
      drop();
      for (const input of inputs) input.dispose();
    },
  };
}

type Inputs = [Tensor, Tensor, Tensor, Tensor, Tensor];

interface Program {
  readonly operands: readonly HostMatrix[];
  readonly f: (...inputs: Inputs) => Readonly<Record<string, Tensor>>;
}

function program(tf: Tf, work: Exclude<PeerWork, { op: "llama-step" }>): Program {
  switch (work.op) {
    case "matmul": {
      const [xT, wT] = [work.layout === "tn", work.layout === "nt"];
      return { operands: [work.x, work.w], f: (x, w) => ({ y: tf.matMul(x, w, xT, wT) }) };
    }
    case "lora-forward":
    case "lora-step": {
      const forward = (x: Tensor, W: Tensor, A: Tensor, B: Tensor): Tensor => {
        const low = tf.matMul(tf.matMul(x, A, false, true), B, false, true);
        return tf.add(tf.matMul(x, W, false, true), tf.mul(low, work.scale));
      };
      const operands = [work.x, work.W, work.A, work.B];
      if (work.op === "lora-forward") return { operands, f: (x, W, A, B) => ({ y: forward(x, W, A, B) }) };
      const f: Program["f"] = (x, W, A, B, dy) => {
        const step = tf.valueAndGrads((...[x_, A_, B_]) => forward(x_ as Tensor, W, A_ as Tensor, B_ as Tensor));
        const { value: y, grads } = step([x, A, B], dy);
        const [dx, dA, dB] = grads as [Tensor, Tensor, Tensor];
        return { y, dx, dA, dB };
      };
      return { operands: [...operands, work.dy], f };
    }
    case "add":
      return { operands: [work.x, work.z], f: (x, z) => ({ y: tf.add(x, z) }) };
    case "row-sum":
      return { operands: [work.x], f: (x) => ({ y: tf.sum(x, 1) }) };
  }
}

/** The WebGPU backend, which gathers dispatches until it is told to submit them. */
interface Backend {
  readonly device: GPUDevice;
  readonly commandEncoder: GPUCommandEncoder | null;
  endComputePassEncoder(): void;
  submitQueue(): void;
}

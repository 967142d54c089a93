/** The peer ONNX Runtime Web with its WebGPU provider: a graph per piece of work, operands and results in GPU buffers. */
import type { InferenceSession, Tensor } from "onnxruntime-web/webgpu";
import { encodeModel, type OnnxGraph, type OnnxNode } from "./onnx.ts";
import {
  type HostMatrix,
  importError,
  PEER_MODULES,
  type Peer,
  type PeerCase,
  type PeerSource,
  type PeerWork,
  packageVersion,
} from "./peer.ts";

type Ort = typeof import("onnxruntime-web/webgpu");

const WASM = `${PEER_MODULES}/onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm`;
const USAGE = 0x80 | 0x04 | 0x08; // STORAGE, COPY_SRC, COPY_DST
const [MAP_READ, COPY_DST] = [0x01, 0x08];

export const onnxruntimeWeb: PeerSource = {
  name: "ort-web",
  open: async (host): Promise<Peer> => {
    const ort = await importOrt();
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = 1;
    ort.env.wasm.wasmBinary = await host.readRepoFile(WASM);
    // The provider makes its device with the first session, and drops it with the last.
    await open(ort, {
      inputs: [{ name: "x", shape: [4] }],
      outputs: [{ name: "y", shape: [4] }],
      nodes: [{ op: "Add", inputs: ["x", "x"], outputs: ["y"] }],
    });
    const device = await ort.env.webgpu.device;
    return {
      name: "ort-web",
      version: await packageVersion(host, "onnxruntime-web"),
      device: () => device,
      prepare: (work) => prepare(ort, device, work),
    };
  },
};

async function importOrt(): Promise<Ort> {
  try {
    return await import("onnxruntime-web/webgpu");
  } catch (error) {
    throw importError(error);
  }
}

type Value = OnnxGraph["inputs"][number];

const open = (ort: Ort, graph: OnnxGraph): Promise<InferenceSession> =>
  ort.InferenceSession.create(encodeModel(graph), {
    executionProviders: ["webgpu"],
    preferredOutputLocation: "gpu-buffer",
  });

async function prepare(ort: Ort, device: GPUDevice, work: PeerWork): Promise<PeerCase> {
  const { operands, graph } = program(work);
  const buffers: GPUBuffer[] = [];
  const onDevice = ({ name, shape }: Value, values?: Float32Array<ArrayBuffer>): [string, Tensor] => {
    const size = 4 * shape.reduce((a, b) => a * b, 1);
    const buffer = device.createBuffer({ size: Math.ceil(size / 16) * 16, usage: USAGE });
    if (values) device.queue.writeBuffer(buffer, 0, values);
    buffers.push(buffer);
    return [name, ort.Tensor.fromGpuBuffer(buffer, { dataType: "float32", dims: shape })];
  };
  const feeds = Object.fromEntries(graph.inputs.map((value) => onDevice(value, operands[value.name]?.values)));
  const fetches = Object.fromEntries(graph.outputs.map((value) => onDevice(value)));
  const session = await open(ort, graph);
  return {
    run: async () => {
      await session.run(feeds, fetches);
    },
    finish: () => device.queue.onSubmittedWorkDone() as Promise<void>,
    read: async () => {
      const results = graph.outputs.map(async ({ name, shape }, i) => {
        const buffer = buffers[graph.inputs.length + i] as GPUBuffer;
        return [
          name,
          await download(
            device,
            buffer,
            shape.reduce((a, b) => a * b, 1),
          ),
        ] as const;
      });
      return Object.fromEntries(await Promise.all(results));
    },
    dispose: async () => {
      await session.release();
      for (const buffer of buffers) buffer.destroy();
    },
  };
}

async function download(device: GPUDevice, buffer: GPUBuffer, count: number): Promise<Float32Array> {
  const staging = device.createBuffer({ size: 4 * count, usage: MAP_READ | COPY_DST });
  const encoder = device.createCommandEncoder();
  encoder.copyBufferToBuffer(buffer, 0, staging, 0, 4 * count);
  device.queue.submit([encoder.finish()]);
  await staging.mapAsync(1);
  const values = new Float32Array(staging.getMappedRange().slice(0));
  staging.destroy();
  return values;
}

interface Program {
  readonly operands: Readonly<Record<string, HostMatrix>>;
  readonly graph: OnnxGraph;
}

function program(work: PeerWork): Program {
  switch (work.op) {
    case "matmul": {
      const { x, w, layout } = work;
      const [M, N] = [layout === "tn" ? x.columns : x.rows, layout === "nt" ? w.rows : w.columns];
      return graphOf({ x, w }, { y: [M, N] }, [product("y", "x", "w", layout)]);
    }
    case "lora-forward":
    case "lora-step": {
      const { x, W, A, B, scale } = work;
      const [M, N, K, r] = [x.rows, W.rows, x.columns, A.rows];
      const forward = [
        product("base", "x", "W", "nt"),
        product("u", "x", "A", "nt"),
        product("low", "u", "B", "nt"),
        binary("Mul", "scaled", "low", "scale"),
        binary("Add", "y", "base", "scaled"),
      ];
      if (work.op === "lora-forward") return graphOf({ x, W, A, B }, { y: [M, N] }, forward, { scale });
      const backward = [
        binary("Mul", "dlow", "dy", "scale"),
        product("v", "dlow", "B", "nn"),
        product("dbase", "dy", "W", "nn"),
        product("dx_low", "v", "A", "nn"),
        binary("Add", "dx", "dbase", "dx_low"),
        product("dA", "v", "x", "tn"),
        product("dB", "dlow", "u", "tn"),
      ];
      const outputs = { y: [M, N], dx: [M, K], dA: [r, K], dB: [N, r] };
      return graphOf({ x, W, A, B, dy: work.dy }, outputs, [...forward, ...backward], { scale });
    }
    case "add": {
      const { x, z } = work;
      return graphOf({ x, z }, { y: [x.rows, x.columns] }, [binary("Add", "y", "x", "z")]);
    }
    case "row-sum": {
      const { x } = work;
      const node = { op: "ReduceSum", inputs: ["x", "axis"], outputs: ["y"], attributes: { keepdims: 0 } };
      const { operands, graph } = graphOf({ x }, { y: [x.rows] }, [node]);
      return { operands, graph: { ...graph, axes: { axis: [1] } } };
    }
    case "llama-step":
      throw new Error("has no gradients: its backward pass would have to be written by hand, node by node");
  }
}

function graphOf(
  operands: Readonly<Record<string, HostMatrix>>,
  results: Readonly<Record<string, readonly number[]>>,
  nodes: readonly OnnxNode[],
  scalars: Readonly<Record<string, number>> = {},
): Program {
  const inputs = Object.entries(operands).map(([name, { rows, columns }]) => ({ name, shape: [rows, columns] }));
  const outputs = Object.entries(results).map(([name, shape]) => ({ name, shape }));
  return { operands, graph: { inputs, outputs, nodes, scalars } };
}

const binary = (op: string, y: string, a: string, b: string): OnnxNode => ({ op, inputs: [a, b], outputs: [y] });

/** MatMul knows no transposed operands; Gemm does. */
function product(y: string, x: string, w: string, layout: "nn" | "nt" | "tn"): OnnxNode {
  const node = { inputs: [x, w], outputs: [y] };
  if (layout === "nn") return { op: "MatMul", ...node };
  return { op: "Gemm", ...node, attributes: layout === "nt" ? { transB: 1 } : { transA: 1 } };
}

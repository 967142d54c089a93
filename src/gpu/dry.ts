import { Gpu } from "./gpu.ts";

/**
 * A Gpu with the limits and features of another and no device behind it: it allocates, counts and plans just as that one would, and computes
 * nothing. What a run takes can be known by it before anything is loaded. Reads never end: there is nothing to read.
 */
export function dryGpu(like: Gpu): Gpu {
  const nothing = (): Record<string, never> => ({});
  const ignore = (): void => {};
  const pass = { setPipeline: ignore, setBindGroup: ignore, dispatchWorkgroups: ignore, end: ignore };
  const device = {
    limits: like.limits,
    features: like.features,
    lost: new Promise(() => {}),
    queue: { writeBuffer: ignore, submit: ignore, onSubmittedWorkDone: async () => {} },
    addEventListener: ignore,
    pushErrorScope: ignore,
    popErrorScope: async () => null,
    createBuffer: ({ size }: GPUBufferDescriptor) => ({ size, destroy: ignore }),
    createBindGroup: nothing,
    createBindGroupLayout: nothing,
    createPipelineLayout: nothing,
    createShaderModule: nothing,
    createComputePipeline: nothing,
    createCommandEncoder: () => ({ beginComputePass: () => pass, copyBufferToBuffer: ignore, finish: nothing }),
    destroy: ignore,
  };
  const { isSoftware, runtime } = like;
  return new Gpu(device as unknown as GPUDevice, like.info, { isSoftware, runtime, tune: "off" });
}

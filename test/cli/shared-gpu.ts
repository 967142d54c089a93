/**
 * One device for all runs of a test file: what is compiled for one serves the others.
 *
 *     vi.mock("../../src/gpu/gpu.ts", async (original) => (await import("./shared-gpu.ts")).sharedGpu(original));
 */
type Module = typeof import("../../src/gpu/gpu.ts");

export async function sharedGpu(original: () => Promise<unknown>): Promise<Module> {
  const real = (await original()) as Module;
  let gpu: ReturnType<Module["openGpu"]> | undefined;
  return {
    ...real,
    openGpu: () => {
      gpu ??= real.openGpu();
      return gpu;
    },
  };
}

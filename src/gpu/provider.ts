/** Finds a `GPU`: the browser's and Deno's own, or Dawn in Node, on hardware or else on the software adapter. */
import { pauseDawnPolling } from "./dawn-polling.ts";
import { GpuError } from "./errors.ts";
import { useSoftwareAdapter } from "./software.ts";

export interface AdapterChoice {
  readonly adapter: GPUAdapter;
  /** True when the adapter runs on the CPU: right everywhere, fast nowhere. */
  readonly isSoftware: boolean;
  readonly runtime: "browser" | "deno" | "node";
}

interface DawnModule {
  create(options: string[]): GPU;
}

/** Matrix units are an unsafe API still, and Dawn keeps f16 from NVIDIA's GPUs unless told otherwise. */
const MATRIX_UNITS = "enable-dawn-features=allow_unsafe_apis,vulkan_enable_f16_on_nvidia";

/** Dawn instances, kept for the life of the process: when one is collected the process crashes at its next use. */
const kept: GPU[] = [];

/** Asks for the fastest adapter. Throws GpuError saying what is missing and how to get it. */
export async function requestAdapter(injected?: GPU, matrixUnits = false): Promise<AdapterChoice> {
  const deno = "Deno" in globalThis;
  const node = !deno && typeof process !== "undefined" && Boolean(process.versions?.node);
  const gpu = injected ?? (globalThis.navigator as Navigator | undefined)?.gpu;
  const runtime = deno ? "deno" : node ? "node" : "browser";
  const adapter = gpu ? await gpu.requestAdapter({ powerPreference: "high-performance" }) : null;
  if (adapter) return { adapter, isSoftware: looksLikeSoftware(adapter.info), runtime };
  if (node && !gpu) return fromDawn(matrixUnits);
  throw new GpuError(
    gpu
      ? "openGpu: WebGPU is here but no adapter was given. Update the graphics driver, or in Deno on a machine without a GPU set VK_ICD_FILENAMES to a software driver"
      : "openGpu: this runtime has no WebGPU (navigator.gpu is missing). Use Chrome or Edge 121 or later on a secure page, Deno 2, or Node with the package webgpu",
  );
}

async function fromDawn(matrixUnits: boolean): Promise<AdapterChoice> {
  const name = "webgpu"; // an optional peer: a bundler must not follow it
  let dawn: DawnModule;
  try {
    dawn = (await import(/* @vite-ignore */ name)) as DawnModule;
  } catch (error) {
    throw new GpuError(
      `openGpu: Node needs the npm package webgpu (Dawn). Run: npm install webgpu. (${String(error)})`,
    );
  }
  const fromNewInstance = async (): Promise<GPUAdapter | null> => {
    const gpu = dawn.create(matrixUnits ? [MATRIX_UNITS] : []);
    kept.push(gpu);
    return gpu.requestAdapter({ powerPreference: "high-performance" });
  };
  const wish = process.env.LOWRANK_ADAPTER ?? "auto";
  if (wish !== "auto" && wish !== "software" && wish !== "hardware")
    throw new GpuError(`openGpu: LOWRANK_ADAPTER must be auto, software or hardware, got "${wish}"`);
  if (wish !== "software") {
    const adapter = await fromNewInstance();
    if (adapter) return { adapter, isSoftware: looksLikeSoftware(adapter.info), runtime: "node" };
    if (wish === "hardware")
      throw new GpuError(
        "openGpu: no hardware adapter was found and LOWRANK_ADAPTER=hardware forbids the software one. Install a Vulkan, Metal or D3D12 driver",
      );
  }
  useSoftwareAdapter();
  pauseDawnPolling();
  const adapter = await fromNewInstance();
  if (!adapter)
    throw new GpuError(
      "openGpu: neither a hardware adapter nor the software adapter could be opened. Run: npx lowrank doctor",
    );
  return { adapter, isSoftware: true, runtime: "node" };
}

function looksLikeSoftware(info: GPUAdapterInfo): boolean {
  return (
    /swiftshader|llvmpipe|lavapipe|basic render|software/i.test(
      `${info.vendor} ${info.architecture} ${info.device} ${info.description}`,
    ) || info.isFallbackAdapter === true
  );
}

import { createRequire } from "node:module";
import { freemem, totalmem } from "node:os";
import { Command } from "commander";
import { type Gpu, openGpu } from "../gpu/gpu.ts";
import { matmul } from "../kernels/matmul.ts";
import { read, tensor } from "../tensor/tensor.ts";
import { jsonOption } from "./options.ts";
import { bytes, deviceName, result, softwareNotice } from "./session.ts";
import { version } from "./version.ts";

const EXAMPLES = `
Examples:
  $ lowrank doctor
  $ lowrank doctor --json

Ends with 0 if a device can be opened and computes right, else with 1.`;

const FEATURES = ["shader-f16", "subgroups", "timestamp-query"] as const;
const LIMITS = [
  "maxBufferSize",
  "maxStorageBufferBindingSize",
  "maxComputeWorkgroupStorageSize",
  "maxComputeInvocationsPerWorkgroup",
] as const;
/** Optional packages, and who needs them. */
const PACKAGES = {
  webgpu: "Node needs it to reach the GPU; Deno does not",
  "@sparticuz/chromium": "only machines without a GPU need it (Linux on x64): it brings a software adapter",
} as const;

export function doctorCommand(): Command {
  return new Command("doctor")
    .description("say what this machine has, what is missing and how to get it")
    .addOption(jsonOption())
    .addHelpText("after", EXAMPLES)
    .action(run);
}

interface Diagnosis {
  readonly version: string;
  readonly runtime: string;
  readonly platform: string;
  readonly ok: boolean;
  /** What is wrong, and the way out. */
  readonly error: string | null;
  readonly adapter: {
    readonly name: string;
    readonly vendor: string;
    readonly architecture: string;
    readonly device: string;
    readonly description: string;
    readonly software: boolean;
    readonly notice: string | null;
  } | null;
  readonly features: Readonly<Record<string, boolean>>;
  readonly limits: Readonly<Record<string, number>>;
  /** What a GPU may use is not known: WebGPU does not tell. */
  readonly memory: { readonly free_bytes: number; readonly total_bytes: number; readonly gpu_budget_bytes: null };
  /** Version, or null where it is not installed. */
  readonly packages: Readonly<Record<string, string | null>>;
}

async function run({ json }: { readonly json?: boolean }): Promise<void> {
  const diagnosis = await diagnose();
  if (!diagnosis.ok) process.exitCode = 1;
  if (json) result(JSON.stringify(diagnosis));
  else for (const [subject, text] of lines(diagnosis)) result(`${subject.padEnd(10)}${text}`);
}

async function diagnose(): Promise<Diagnosis> {
  const deno = (globalThis as { Deno?: { readonly version: { readonly deno: string } } }).Deno;
  let gpu: Gpu | undefined;
  let error: string | null = null;
  try {
    gpu = await openGpu();
    await check(gpu);
  } catch (caught) {
    error = caught instanceof Error ? caught.message : String(caught);
  }
  const info = gpu?.info;
  const diagnosis: Diagnosis = {
    version: version(),
    runtime: deno ? `Deno ${deno.version.deno}` : `Node ${process.versions.node}`,
    platform: `${process.platform} ${process.arch}`,
    ok: error === null,
    error,
    adapter:
      gpu && info
        ? {
            name: deviceName(info),
            vendor: info.vendor,
            architecture: info.architecture,
            device: info.device,
            description: info.description,
            software: gpu.isSoftware,
            notice: gpu.isSoftware ? softwareNotice(gpu) : null,
          }
        : null,
    features: gpu ? Object.fromEntries(FEATURES.map((feature) => [feature, gpu.features.has(feature)])) : {},
    limits: gpu ? Object.fromEntries(LIMITS.map((limit) => [limit, gpu.limits[limit]])) : {},
    memory: { free_bytes: freemem(), total_bytes: totalmem(), gpu_budget_bytes: null },
    packages: Object.fromEntries(Object.keys(PACKAGES).map((name) => [name, installed(name)])),
  };
  gpu?.destroy();
  return diagnosis;
}

/** Throws unless the device multiplies two small matrices right. */
async function check(gpu: Gpu): Promise<void> {
  const product = gpu.scope(() => matmul(tensor(gpu, [1, 2, 3, 4], [2, 2]), tensor(gpu, [5, 6, 7, 8], [2, 2])));
  const values = await read(product);
  if (`${values}` !== "19,22,43,50")
    throw new Error(`doctor: [1 2; 3 4]·[5 6; 7 8] must be [19 22; 43 50], got ${values}. Update the graphics driver`);
}

function installed(name: string): string | null {
  const require = createRequire(import.meta.url);
  try {
    return (require(`${name}/package.json`) as { version: string }).version;
  } catch {
    try {
      require.resolve(name);
      return "installed";
    } catch {
      return null;
    }
  }
}

function* lines(d: Diagnosis): Generator<[subject: string, text: string]> {
  yield ["lowrank", `${d.version} on ${d.runtime}, ${d.platform}`];
  if (d.adapter) {
    const { name, vendor, architecture, device, notice } = d.adapter;
    yield [
      "adapter",
      `${name} (vendor ${vendor || "?"}, architecture ${architecture || "?"}, device ${device || "?"})`,
    ];
    if (notice) yield ["", notice];
    yield [
      "features",
      Object.entries(d.features)
        .map(([feature, here]) => `${feature} ${here ? "yes" : "no"}`)
        .join(", "),
    ];
    yield [
      "limits",
      Object.entries(d.limits)
        .map(([limit, value]) => `${limit} ${/Size$/.test(limit) ? bytes(value) : value}`)
        .join(", "),
    ];
  } else yield ["adapter", "none"];
  yield [
    "memory",
    `${bytes(d.memory.free_bytes)} of ${bytes(d.memory.total_bytes)} RAM free; the GPU's is unknown (WebGPU does not tell)`,
  ];
  for (const [name, purpose] of Object.entries(PACKAGES)) {
    const found = d.packages[name];
    yield ["package", `${name} ${found ?? `is not installed: ${purpose}. Get it by: npm install ${name}`}`];
  }
  yield ["check", d.error ?? "a matrix product came out right"];
}

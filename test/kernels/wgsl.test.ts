// Every kernel as it stands and every variant that is put together from parts: it explains itself, Dawn compiles it, and what `defineKernel` reads
// from it is what it says.
import { readdirSync, readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { create } from "webgpu";
import { LiteralExpr, Override, WgslParser, WgslReflect } from "wgsl_reflect/wgsl_reflect.module.js";
import { compileErrors } from "../../bench/compile.ts";
import { type Gpu, openGpu } from "../../src/gpu/gpu.ts";
import { readWgsl } from "../../src/gpu/kernel.ts";
import { testGpu } from "../harness.ts";
import { KERNELS, matmulVariants, otherVariants, planVariants, type Variant } from "./variants.ts";

const kernels = Object.entries(KERNELS).map(([name, source]) => ({ name, source }));
const parts = readdirSync("src/kernels/parts").map((file) => ({
  file,
  source: readFileSync(`src/kernels/parts/${file}`, "utf8"),
}));
const variants = [...matmulVariants(), ...otherVariants()].map((variant) => ({ ...variant, name: variant.key }));
const plans = [planVariants({ features: ["subgroups"] }), planVariants({}), planVariants({ isSoftware: true })]
  .flat()
  .map((variant) => ({ ...variant, name: variant.key }));

const dawn = create(["backend=null"]); // at module level: when one is collected, Dawn crashes
let opened: Promise<Gpu> | undefined;

/** Dawn without a driver: nothing runs, but it has every feature and the least limits, and its pipelines cost nothing. */
function nullGpu(): Promise<Gpu> {
  opened ??= openGpu({ gpu: dawn, tune: "off" });
  return opened;
}

const lacks =
  ({ features }: Gpu) =>
  ({ needs }: Variant): boolean =>
    needs.some((feature) => !features.has(feature));

test("no kernel is left out", () => {
  // Those for matrix units have a test of their own: neither the null backend nor wgsl_reflect takes them.
  const units = "enable chromium_experimental_subgroup_matrix;";
  const files = readdirSync("src/kernels").filter(
    (file) => file.endsWith(".wgsl") && !readFileSync(`src/kernels/${file}`, "utf8").includes(units),
  );
  expect(kernels.map(({ name }) => `${name}.wgsl`).sort()).toEqual(files.sort());
  for (const part of parts) {
    const name = part.file.replace(/^weight-|\.wgsl$/g, "");
    expect(
      // A part that is lent in pieces has a name for each: blocked-x, blocked-y.
      variants.some(({ key }) => key.split(" ").some((used) => used === `+${name}` || used.startsWith(`+${name}-`))),
      `a variant with ${part.file}`,
    ).toBe(true);
  }
});

describe("each kernel", () => {
  test.each(kernels)("$name opens with a comment that gives the formula and the shapes", ({ source }) => {
    const header = /^(\/\/.*\n)+/.exec(source)?.[0] ?? "";
    expect(header.split("\n").length, "at least two lines of header").toBeGreaterThan(2);
  });

  test.each(kernels)("$name compiles as it stands", async (kernel) => {
    const { device } = await testGpu();
    expect(await compileErrors(device, [kernel], { pipelines: false })).toEqual([]);
    expect(await compileErrors((await nullGpu()).device, [kernel])).toEqual([]);
  });

  test.each(kernels)("$name declares what readWgsl reads", ({ source }) => {
    expectReadRight(source);
    expect(new WgslReflect(source).uniforms.length, "one uniform struct").toBeLessThan(2);
  });
});

test.each(parts)("the part $file opens with a comment", ({ source }) => {
  expect(source).toMatch(/^\/\/ .+\n/);
});

describe("each variant", () => {
  test("compiles on the software adapter, where that has the features", async () => {
    const gpu = await testGpu();
    const here = [...variants, ...plans].filter((variant) => !lacks(gpu)(variant));
    expect(here.length).toBeGreaterThan(100);
    expect(await compileErrors(gpu.device, here, { pipelines: false })).toEqual([]);
  });

  test("compiles with its pipeline in Dawn without a driver, f16 and subgroups too", async () => {
    const gpu = await nullGpu();
    expect(variants.filter(lacks(gpu))).toEqual([]);
    expect(variants.some(({ needs }) => needs.includes("shader-f16"))).toBe(true);
    expect(variants.some(({ needs }) => needs.includes("subgroups"))).toBe(true);
    expect(await compileErrors(gpu.device, variants)).toEqual([]);
  });

  test("by any plan, the default one or another that tuning tries, keeps to WebGPU's least limits", async () => {
    const gpu = await nullGpu();
    expect(gpu.limits.maxComputeWorkgroupStorageSize).toBe(16_384);
    expect(gpu.limits.maxComputeInvocationsPerWorkgroup).toBe(256);
    expect(await compileErrors(gpu.device, plans)).toEqual([]);
  });

  test("keeps no array in a function: some compilers would put it into memory", () => {
    for (const { name, source } of [...variants, ...plans])
      expect(source.match(/^ +var \w+: array<.*$/gm) ?? [], name).toEqual([]);
  });

  test("declares what readWgsl reads", () => {
    for (const { name, source } of variants) expectReadRight(source, name);
  });
});

/** Fails unless `wgsl_reflect` finds in a text what `readWgsl` does. */
function expectReadRight(source: string, name = "it"): void {
  const text = source.replace(/\bblock\b/g, "block_"); // wgsl_reflect takes it for a word of its own
  const read = readWgsl(text);
  const reflected = new WgslReflect(text);
  const [uniform] = reflected.uniforms;

  const bindings = [...reflected.uniforms, ...reflected.storage].map(({ group, binding, name: id, access }) => ({
    group,
    slot: binding,
    id,
    type: id === uniform?.name ? "uniform" : access === "read_write" ? "storage" : "read-only-storage",
  }));
  const bySlot = <T extends { readonly slot: number }>(all: readonly T[]): T[] =>
    all.toSorted((a, b) => a.slot - b.slot);
  expect(bySlot(bindings), name).toEqual(
    bySlot(read.bindings).map(({ slot, id, type }) => ({ group: 0, slot, id, type })),
  );
  expect(
    read.fields.map(({ id, type }, i) => ({ name: id, type, offset: 4 * i })),
    name,
  ).toEqual((uniform?.members ?? []).map(({ name: id, type, offset }) => ({ name: id, type: type.name, offset })));
  const overrides = new WgslParser().parse(text).filter((statement) => statement instanceof Override);
  expect([...read.overrides], name).toEqual(
    overrides.map(({ name: id, value }) => [id, value instanceof LiteralExpr ? value.scalarValue : value]),
  );
  expect(
    reflected.entry.compute.map(({ name: id }) => id),
    name,
  ).toEqual(["main"]);
}

// Every kernel as it stands: it explains itself, Dawn compiles it, and what `defineKernel` reads from it is what it says.
import { readdirSync, readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { LiteralExpr, Override, WgslParser, WgslReflect } from "wgsl_reflect/wgsl_reflect.module.js";
import { readWgsl } from "../../src/gpu/kernel.ts";
import { testGpu } from "../harness.ts";

const kernels = readdirSync("src/kernels")
  .filter((file) => file.endsWith(".wgsl"))
  .map((file) => ({ file, source: readFileSync(`src/kernels/${file}`, "utf8") }));

test("there are kernels to check", () => {
  expect(kernels.length).toBeGreaterThan(10);
});

test.each(kernels)("$file opens with a comment that gives the formula and the shapes", ({ source }) => {
  const header = /^(\/\/.*\n)+/.exec(source)?.[0] ?? "";
  expect(header.split("\n").length, "at least two lines of header").toBeGreaterThan(2);
});

test.each(kernels)("$file compiles as it stands", async ({ file, source }) => {
  const { device } = await testGpu();
  device.pushErrorScope("validation");
  const module = device.createShaderModule({ label: file, code: source });
  const { messages } = await module.getCompilationInfo();
  expect(messages.map(({ type, lineNum, message }) => `${type} ${lineNum}: ${message}`)).toEqual([]);
  expect((await device.popErrorScope())?.message).toBeUndefined();
});

test.each(kernels)("$file declares what readWgsl reads", ({ source }) => {
  const read = readWgsl(source);
  const reflected = new WgslReflect(source);
  const [uniform] = reflected.uniforms;

  const bindings = [...reflected.uniforms, ...reflected.storage].map(({ group, binding, name, access }) => ({
    group,
    slot: binding,
    id: name,
    type: name === uniform?.name ? "uniform" : access === "read_write" ? "storage" : "read-only-storage",
  }));
  expect(bindings.sort((a, b) => a.slot - b.slot)).toEqual(
    read.bindings.map(({ slot, id, type }) => ({ group: 0, slot, id, type })),
  );
  expect(reflected.uniforms.length, "one uniform struct").toBeLessThan(2);
  expect(read.fields.map(({ id, type }, i) => ({ name: id, type, offset: 4 * i }))).toEqual(
    (uniform?.members ?? []).map(({ name, type, offset }) => ({ name, type: type.name, offset })),
  );
  const overrides = new WgslParser().parse(source).filter((statement) => statement instanceof Override);
  expect([...read.overrides]).toEqual(
    overrides.map(({ name, value }) => [name, value instanceof LiteralExpr ? value.scalarValue : value]),
  );
  expect(reflected.entry.compute.map(({ name }) => name)).toEqual(["main"]);
});

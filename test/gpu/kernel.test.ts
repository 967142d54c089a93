import { expect, test } from "vitest";
import { GpuError } from "../../src/gpu/errors.ts";
import { openGpu } from "../../src/gpu/gpu.ts";
import { assemble, defineKernel, definePart, type Part, type Tuned } from "../../src/gpu/kernel.ts";
import { empty, read, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { testGpu } from "../harness.ts";
import { Recorder } from "../kernels/recorder.ts";

/** y[i] = f(x[i]) · FACTOR, TILE elements to a thread. */
const SOURCE = `// y = f(x)
override FACTOR: u32 = 1;
const WG: u32 = 4u;
const TILE: u32 = 2u;

struct Dims { n: u32, s: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read> x: array<Element>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;

alias Element = f32;

fn f(value: Element) -> f32 { return value; }

@compute @workgroup_size(WG)
fn main(@builtin(global_invocation_id) id: vec3u) {
  for (var i = 0u; i < TILE; i++) {
    let at = id.x * TILE + i;
    if (at < d.n) { y[at] = d.s * f32(FACTOR) * f(x[at]); }
  }
}
`;
const kernel = defineKernel("part-test", SOURCE);

const square = definePart("square", "// squares\n\nfn f(value: Element) -> f32 { return value * value; }\n");
const whole = definePart(
  "whole",
  `alias Element = i32;

fn f(value: Element) -> f32 {
  if (value < 0) { return -1.0; }
  return f32(value) + OFFSET;
}

const OFFSET: f32 = 0.5;
`,
);

/** Dispatches the kernel over x and reads y. */
async function run(x: Tensor, s: number, tuned: Tuned = {}, parts: readonly Part[] = []): Promise<number[]> {
  const y = empty(x.gpu, x.shape, "test");
  kernel(x.gpu, { n: x.size, s }, { x, y }, [Math.ceil(x.size / (tuned.TILE ?? 2))], tuned, parts);
  return [...(await read(y))];
}

test("a part's declarations stand in for the kernel's of the same name, and nothing else changes", () => {
  const text = assemble(SOURCE, [square]);
  expect(text).toBe(SOURCE.replace("{ return value; }", "{ return value * value; }"));
});

test("what the kernel lacks of a part is added at the end", () => {
  const text = assemble(SOURCE, [whole]);
  expect(text).toBe(
    `${SOURCE.replace("alias Element = f32;", "alias Element = i32;").replace(
      "fn f(value: Element) -> f32 { return value; }",
      "fn f(value: Element) -> f32 {\n  if (value < 0) { return -1.0; }\n  return f32(value) + OFFSET;\n}",
    )}\nconst OFFSET: f32 = 0.5;\n`,
  );
});

test("a later part stands in for what an earlier one brought", () => {
  const text = assemble(SOURCE, [whole, definePart("offset", "const OFFSET: f32 = 2.0;")]);
  expect(text).toContain("const OFFSET: f32 = 2.0;");
  expect(text).not.toContain("0.5");
});

test("dollar signs in a part are kept as they are", () => {
  const odd = definePart("odd", "fn f(value: Element) -> f32 { return value; /* $& $1 $$ */ }");
  expect(assemble(SOURCE, [odd])).toContain("/* $& $1 $$ */");
});

test("directives of parts go to the top, each once", () => {
  const half = (name: string) => definePart(name, `// ${name}\nenable f16;\n\nconst ${name}: f32 = 1.0;\n`);
  const text = assemble(SOURCE, [half("a"), half("b"), definePart("c", "enable subgroups;\nconst c: u32 = 1u;")]);
  expect(text.startsWith("enable f16;\nenable subgroups;\n// y = f(x)\n")).toBe(true);
  expect(text.match(/enable f16;/g)?.length).toBe(1);
});

test("a part may be of some declarations of a text, which must exist", () => {
  const some = definePart("some", `${whole.declarations.get("f")}\nconst OTHER: u32 = 1u;`, ["OTHER"]);
  expect([...some.declarations]).toEqual([["OTHER", "const OTHER: u32 = 1u;"]]);
  expect(() => definePart("some", SOURCE, ["f", "g"])).toThrow(
    new GpuError('some: a part takes declarations that exist, got "g"'),
  );
});

test("bindings, structs and variables count as declarations, and are found whole", () => {
  const { declarations } = definePart(
    "all",
    `@group(0) @binding(6) var<storage, read> scales: array<f32>;
var<private> at: u32;
var<workgroup> stage: array<vec4f, 8>;
struct Pair { a: f32, b: f32 }
override OP: u32 = 0;  // 0 or 1
fn both(p: Pair) -> f32 {
  if (p.a > 0.0) { return p.a; }
  return p.b;
}
`,
  );
  expect([...declarations]).toEqual([
    ["scales", "@group(0) @binding(6) var<storage, read> scales: array<f32>;"],
    ["at", "var<private> at: u32;"],
    ["stage", "var<workgroup> stage: array<vec4f, 8>;"],
    ["Pair", "struct Pair { a: f32, b: f32 }"],
    ["OP", "override OP: u32 = 0;"],
    ["both", "fn both(p: Pair) -> f32 {\n  if (p.a > 0.0) { return p.a; }\n  return p.b;\n}"],
  ]);
});

test("a kernel runs with and without parts, and keeps them apart", async () => {
  const gpu = await testGpu();
  const x = tensor(gpu, [1, 2, 3], [3]);
  expect(await run(x, 1)).toEqual([1, 2, 3]);
  expect(await run(x, 1, {}, [square])).toEqual([1, 4, 9]);
  const whole3 = tensor(gpu, Int32Array.of(-4, 0, 7), [3]);
  expect(await run(whole3, 2, {}, [whole])).toEqual([-2, 1, 15]);
  expect(await run(x, 1)).toEqual([1, 2, 3]);
});

test("overrides and constants are tuned in an assembled text, a part's own too", async () => {
  const gpu = await testGpu();
  const counted = definePart(
    "counted",
    "override PLUS: u32 = 1;\nconst TIMES: u32 = 1u;\nfn f(value: Element) -> f32 { return value * f32(TIMES) + f32(PLUS); }",
  );
  const x = tensor(gpu, [1, 2, 3, 4, 5], [5]);
  expect(await run(x, 1, { FACTOR: 3 })).toEqual([3, 6, 9, 12, 15]);
  expect(await run(x, 1, { TILE: 5, WG: 1 })).toEqual([1, 2, 3, 4, 5]);
  expect(await run(x, 1, { FACTOR: 2, TILE: 1, PLUS: 10, TIMES: 100 }, [counted])).toEqual([220, 420, 620, 820, 1020]);
});

test("workgroups are counted by the size that is tuned, and a const may give it", () => {
  const gpu = new Recorder();
  const x = tensor(gpu, [1], [1]);
  kernel(gpu, { n: 1, s: 1 }, { x, y: x }, [40]);
  kernel(gpu, { n: 1, s: 1 }, { x, y: x }, [41], { WG: 8 });
  expect(gpu.dispatches.map(({ groups }) => groups)).toEqual([
    [10, 1, 1],
    [6, 1, 1],
  ]);
  expect(gpu.dispatches.map(({ sent: { key, constants } }) => [key, constants])).toEqual([
    ["part-test", {}],
    ["part-test WG=8", {}],
  ]);
});

test("what is asked of a kernel that it does not have is named", () => {
  const gpu = new Recorder();
  const x = tensor(gpu, [1], [1]);
  const all = { n: 1, s: 1 };
  expect(() => kernel(gpu, all, { x, y: x }, [1], { BK: 8 })).toThrow(
    new GpuError('part-test: there is no override or const "BK" to tune, got BK = 8'),
  );
  expect(() => kernel(gpu, all, { x }, [1])).toThrow(new GpuError('part-test: buffer "y" was not given, got x'));
  expect(() => kernel(gpu, { n: 1 }, { x, y: x }, [1])).toThrow(
    new GpuError('part-test: uniform "s" was not given, got n'),
  );
  const undeclared = defineKernel("undeclared", SOURCE.replace("@workgroup_size(WG)", "@workgroup_size(SIZE)"));
  expect(() => undeclared(gpu, all, { x, y: x }, [1])).toThrow(
    new GpuError("undeclared: @workgroup_size(SIZE) is not known before the pipeline is built"),
  );
});

test("a buffer that is written may not be another operand too", async () => {
  const gpu = await openGpu({ tune: "off" });
  const x = tensor(gpu, [1, 2, 3], [3]);
  expect(() => kernel(gpu, { n: 3, s: 1 }, { x, y: x }, [2])).toThrow(
    new GpuError(
      'part-test: what is written may not share its buffer with another operand, got one buffer for "y" and "x"',
    ),
  );
  expect(await read(x), "and the device goes on").toEqual(Float32Array.of(1, 2, 3));
  expect(await run(x, 2)).toEqual([2, 4, 6]);
  gpu.destroy();
});

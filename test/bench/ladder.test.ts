// The study ladders: every rung explains itself, compiles as it stands, is right at every size and has no race.
import { readdirSync, readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { WgslReflect } from "wgsl_reflect/wgsl_reflect.module.js";
import { compileErrors } from "../../bench/compile.ts";
import { loraLadder, loraRungs, matmulLadder, matmulRungs } from "../../bench/ladder.ts";
import { readWgsl } from "../../src/gpu/kernel.ts";
import { checkOp, testGpu } from "../harness.ts";
import { findRaces, type RaceCheck } from "../race.ts";
import { matmulTwin } from "../reference/matmul.ts";

const read = (name: string): string => readFileSync(`bench/${name}.wgsl`, "utf8");
const files = ["matmul", "lora"].flatMap((folder) =>
  readdirSync(`bench/${folder}`)
    .filter((file) => file.endsWith(".wgsl"))
    .map((file) => ({
      name: `${folder}/${file.slice(0, -".wgsl".length)}`,
      source: readFileSync(`bench/${folder}/${file}`, "utf8"),
    })),
);

describe("each file", () => {
  test("is one of nine", () => expect(files.length).toBe(9));

  test.each(files)("$name says what it computes, what it costs and what limits it next", ({ name, source }) => {
    const header = /^(\/\/.*\n)+/.exec(source)?.[0] ?? "";
    expect(header.split("\n").length).toBeGreaterThan(2);
    expect(header).toMatch(/^\/\/ y = .*\n/);
    expect(header).toMatch(/multiply-add|operations/);
    if (name !== "lora/0-product") expect(header).toMatch(/^\/\/ Rung \d\. [\s\S]*^\/\/ Next limit: /m);
  });

  test.each(files)("$name compiles as it stands, without a warning", async (file) => {
    const { device } = await testGpu();
    expect(await compileErrors(device, [file])).toEqual([]);
  });

  test.each(files)("$name declares what readWgsl reads", ({ source }) => {
    const { bindings, fields } = readWgsl(source);
    const { uniforms, storage, entry } = new WgslReflect(source);
    expect(bindings.map(({ slot, id, type }) => [slot, id, type])).toEqual([
      ...uniforms.map(({ binding, name }) => [binding, name, "uniform"]),
      ...storage.map(({ binding, name, access }) => [
        binding,
        name,
        access === "read_write" ? "storage" : "read-only-storage",
      ]),
    ]);
    expect(fields.map(({ id, type }, i) => [id, type, 4 * i])).toEqual(
      uniforms.flatMap(({ members }) => (members ?? []).map(({ name, type, offset }) => [name, type.name, offset])),
    );
    expect(entry.compute.map(({ name }) => name)).toEqual(["main"]);
  });

  test("a compiler's complaint is reported with its line", async () => {
    const { device } = await testGpu();
    const source = read("matmul/1-naive").replace("var acc = 0.0;", "var acc = 0;");
    expect((await compileErrors(device, [{ name: "broken", source }])).join("\n")).toMatch(/^broken: error \d+: /);
  });
});

// Tiles are 32×8, 16×16 and 64×64, steps of K 1 and 16. With K or N no multiple of 4, rows start within a vec4.
const SIZES: [M: number, N: number, K: number][] = [
  [1, 1, 1],
  [8, 32, 16],
  [16, 16, 16],
  [15, 17, 15],
  [17, 15, 17],
  [33, 33, 33],
  [64, 64, 16],
  [63, 65, 15],
  [65, 63, 17],
  [129, 129, 33],
  [37, 53, 29],
  [5, 6, 7],
  [6, 7, 18],
  [4, 5, 0],
];

for (const { name, run } of matmulRungs)
  test.each(SIZES)(`matmul rung ${name}, %i×%i over %i, equals its f64 twin`, async (M, N, K) => {
    await checkOp({
      inputs: [
        [M, K],
        [K, N],
      ],
      op: run,
      twin: (x, w) => matmulTwin(x, w, "nn"),
      gradients: false,
    });
  });

for (const { name, run } of loraRungs)
  test.each([
    [1, 1, 1, 1],
    [16, 16, 16, 4],
    [15, 17, 16, 16],
    [17, 15, 17, 15],
    [33, 33, 31, 17],
    [37, 53, 29, 3],
    [20, 24, 32, 64],
  ])(`LoRA rung ${name}, %i×%i over %i of rank %i, equals its f64 twin`, async (M, N, K, R) => {
    await checkOp({
      inputs: [
        [M, K],
        [N, K],
        [R, K],
        [N, R],
      ],
      op: (...[x, W, A, B]) => {
        if (!x || !W || !A || !B) throw new Error("four inputs");
        return run(x, W, A, B, 0.5);
      },
      twin: (...[x, W, A, B]) => {
        if (!x || !W || !A || !B) throw new Error("four inputs");
        return matmulTwin(x, W, "nt", 1, { u: matmulTwin(x, A, "nt"), b: B, c: 0.5 });
      },
      tolerance: 1e-4, // u and its products with B are sums of up to 64 terms each, and may cancel
      gradients: false,
    });
  });

test.each([matmulLadder(24), loraLadder({ M: 20, N: 24, K: 28, r: 4 })])(
  "the contest $name checks its rungs against right values",
  async ({ setup }) => {
    const gpu = await testGpu();
    const { inputs, cases } = setup(gpu);
    for (const { name, run, check } of cases) {
      const { y } = gpu.scope(run);
      if (!y) expect.fail(`${name} has no y`);
      const values = new Float32Array((await gpu.read([y]))[0] ?? new ArrayBuffer(0));
      for (const element of [0, 1, values.length >> 1, values.length - 1])
        expect(Math.abs((values[element] ?? Number.NaN) - check("y", element)), name).toBeLessThanOrEqual(1e-5);
      gpu.release(y);
    }
    gpu.release(...inputs);
  },
);

describe("races", () => {
  const ramp = (n: number): Float32Array => Float32Array.from({ length: n }, (_, i) => ((i * 7) % 11) / 4 - 1);
  const block = { TM: 2, TN: 2, BK: 2, WX: 2, WY: 2 };

  interface TiledRung {
    readonly name: string;
    readonly constants: Readonly<Record<string, number>>;
    /** Three tiles of y, the last ones cut, and two and a half steps of K or more. */
    readonly sizes: readonly [M: number, N: number, K: number, R?: number];
    readonly groups: RaceCheck["groups"];
  }
  const tiled: readonly TiledRung[] = [
    { name: "matmul/3-shared-tile", constants: { T: 2 }, sizes: [3, 4, 5], groups: [2, 2] },
    { name: "matmul/4-register-block", constants: block, sizes: [5, 7, 5], groups: [2, 2] },
    { name: "matmul/5-vec4", constants: { ...block, TM: 4, TN: 4, BK: 4 }, sizes: [9, 11, 10], groups: [2, 2] },
    { name: "matmul/5-vec4", constants: { ...block, TM: 8, TN: 8, BK: 4 }, sizes: [15, 16, 12], groups: [1, 1] },
    { name: "lora/0-product", constants: { T: 2 }, sizes: [3, 4, 5], groups: [2, 2] },
    { name: "lora/2-two-passes", constants: { T: 2 }, sizes: [3, 4, 5, 3], groups: [2, 2] },
    { name: "lora/3-columns", constants: { T: 2 }, sizes: [3, 4, 4, 3], groups: [2, 2] },
  ];

  test("every rung with workgroup memory is checked", () => {
    const shared = files.filter(({ source }) => source.includes("var<workgroup>")).map(({ name }) => name);
    expect([...new Set(tiled.map(({ name }) => name))].sort()).toEqual(shared.sort());
  });

  const check = ({ name, constants, sizes: [M, N, K, R = 0], groups }: TiledRung, source: string): RaceCheck => ({
    name,
    source,
    constants,
    groups,
    uniforms: { M, N, K, R, s: 0.5 },
    buffers: {
      x: ramp(Math.ceil((M * K) / 4) * 4),
      w: ramp(Math.ceil((N * K) / 4) * 4),
      W: ramp(N * K),
      u: ramp(M * R),
      B: ramp(N * R),
      y: new Float32Array(M * N).fill(Number.NaN),
    },
  });

  test.each(tiled)("$name has none on small grids, tiles $constants", (rung) => {
    const source = read(rung.name);
    const [M, N, K, R = 0] = rung.sizes;
    const { races, divergences, outputs } = findRaces(check(rung, source));
    expect(races).toEqual([]);
    expect(divergences).toEqual([]);
    const transposed = rung.name.startsWith("lora");
    for (let i = 0; i < M; i++)
      for (let j = 0; j < N; j++) {
        let expected = 0;
        const at = (index: number): number => ((index * 7) % 11) / 4 - 1; // ramp, exactly
        for (let k = 0; k < K; k++) expected += at(i * K + k) * at(transposed ? j * K + k : k * N + j);
        for (let k = 0; k < R; k++) expected += 0.5 * at(i * R + k) * at(j * R + k);
        expect(outputs.y?.[i * N + j], `y[${i}, ${j}]`).toBeCloseTo(expected, 4);
      }
  });

  for (const barrier of [0, 1])
    test.each(tiled)(`$name has some without barrier ${barrier}, tiles $constants`, (rung) => {
      let n = 0;
      const source = read(rung.name).replace(/workgroupBarrier\(\);/g, (text) => (n++ === barrier ? "" : text));
      expect(n, "barriers in the file").toBe(2);
      const { races } = findRaces({ ...check(rung, source), groups: [1, 1] });
      expect(races.join("\n")).toMatch(/Data race on '(lhs|rhs)'/);
    });

  test("a race in a later workgroup is found", () => {
    const guarded = read("matmul/3-shared-tile")
      .replace("workgroupBarrier();", "if (place.x == 0u) { let first = 0u; workgroupBarrier(); }")
      .replace("fn main(", "fn main(@builtin(workgroup_id) place: vec3u, ");
    const { races } = findRaces(
      check({ name: "guarded", constants: { T: 2 }, sizes: [2, 4, 4], groups: [2, 1] }, guarded),
    );
    expect(races.length).toBeGreaterThan(0);
    expect(races.every((race) => race.startsWith("workgroup 1,0,0: "))).toBe(true);
  });

  test("a barrier that some threads skip is reported", () => {
    const source = read("matmul/3-shared-tile").replace("var acc = 0.0;", "if (j >= d.N) { return; } var acc = 0.0;");
    const { divergences } = findRaces(
      check({ name: "early", constants: { T: 2 }, sizes: [2, 3, 4], groups: [2, 1] }, source),
    );
    expect(divergences.join("\n")).toMatch(/^workgroup 1,0,0: Barrier divergence/);
  });

  const calls = `
    struct Dims { n: u32 }
    @group(0) @binding(0) var<uniform> d: Dims;
    @group(0) @binding(1) var<storage, read_write> y: array<f32>;
    fn half(n: u32) -> f32 { if (n < d.n) { return f32(n) / 2.0; } return -1.0; }
    fn put(at: u32, row: u32, value: f32) { y[at + row] = value; }
    @compute @workgroup_size(3) fn main(@builtin(local_invocation_id) t: vec3u, @builtin(workgroup_id) g: vec3u) {
      let at = 3u * g.x;
      var row = t.x;
      put(0u, at + t.x, half(at + t.x));
      put(0u, at + row, 10.0 * y[at + row]);
    }`;

  test("functions give each thread its own result and leave its variables alone", () => {
    const { outputs, races } = findRaces({
      name: "calls",
      source: calls,
      groups: [2],
      uniforms: { n: 5 },
      buffers: { y: new Float32Array(6) },
    });
    expect([...(outputs.y ?? [])]).toEqual([0, 5, 10, 15, 20, -10]);
    expect(races).toEqual([]);
  });

  test("what the interpreter only complains of is an error", () => {
    const source = calls.replace("var row = t.x;", "var row = t.x; var v: array<vec4f, 4>; v[row][0] = 1.0;");
    expect(() =>
      findRaces({ name: "calls", source, groups: [1], uniforms: { n: 5 }, buffers: { y: new Float32Array(6) } }),
    ).toThrow("findRaces: wgsl_reflect cannot run calls: Error: SetDataValue: Type vec4f is not an array");
  });

  test("what findRaces cannot use, it names", () => {
    const rung: TiledRung = { name: "rung", constants: { T: 2 }, sizes: [2, 2, 2], groups: [1, 1] };
    const source = read("matmul/3-shared-tile");
    const { buffers, uniforms, ...rest } = check(rung, source);
    expect(() => findRaces({ ...rest, buffers, uniforms, constants: { TT: 2 } })).toThrow(
      'findRaces: rung has no override or const "TT", got TT = 2',
    );
    expect(() => findRaces({ ...rest, uniforms, buffers: { x: ramp(4), y: ramp(4) } })).toThrow(
      'findRaces: rung needs a buffer "w", got x, y',
    );
    expect(() => findRaces({ ...rest, buffers, uniforms: { M: 2 } })).toThrow(
      'findRaces: rung needs a uniform "N", got M',
    );
    expect(() => findRaces({ ...rest, buffers, uniforms, source: `${source}\nfn broken( {` })).toThrow(
      /^findRaces: wgsl_reflect cannot run rung: /,
    );
  });
});

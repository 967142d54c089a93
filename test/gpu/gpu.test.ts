import { expect, test } from "vitest";
import { GpuError } from "../../src/gpu/errors.ts";
import { openGpu } from "../../src/gpu/gpu.ts";
import { defineKernel } from "../../src/gpu/kernel.ts";
import { axpy } from "../../src/kernels/axpy.ts";
import { empty, read, readAll, tensor } from "../../src/tensor/tensor.ts";
import { testGpu } from "../harness.ts";

test("many dispatches are one pass and one submit, and their uniforms do not mix", async () => {
  const gpu = await testGpu();
  const x = tensor(gpu, [1, 2, 3], [3]);
  gpu.flush();
  const before = gpu.counters();
  const sums = gpu.scope(() => Array.from({ length: 10 }, (_, i) => axpy(i, x, 0, x)));
  const values = await readAll(sums);
  expect(values.map((v) => v[2])).toEqual([0, 3, 6, 9, 12, 15, 18, 21, 24, 27]);
  expect((gpu.counters().dispatches.get("axpy") ?? 0) - (before.dispatches.get("axpy") ?? 0)).toBe(10);
  expect(gpu.counters().readbacks - before.readbacks).toBe(1);
  gpu.release(x, ...sums);
});

test("free buffers go back to the device, and what is there and what comes later is right", async () => {
  const gpu = await openGpu({ tune: "off" });
  const x = tensor(gpu, [1, 2, 3], [3]);
  const y = axpy(2, x, 0, x);
  gpu.release(empty(gpu, [1 << 20], "test"));
  const { bytesReserved, bytesLive } = gpu.counters();
  expect(bytesReserved).toBeGreaterThan(bytesLive);
  gpu.trim();
  expect(gpu.counters()).toMatchObject({ bytesReserved: bytesLive, bytesLive });
  const z = gpu.scope(() => axpy(1, axpy(3, x, 0, x), 1, y));
  expect((await readAll([x, y, z])).map((values) => [...values])).toEqual([
    [1, 2, 3],
    [2, 4, 6],
    [5, 10, 15],
  ]);
  gpu.destroy();
});

test("within a budget free buffers make way for new ones", async () => {
  const gpu = await openGpu({ tune: "off", budgetBytes: 2 ** 20 });
  for (const size of [2 ** 16, 2 ** 17, 2 ** 17 + 2 ** 15]) {
    gpu.release(empty(gpu, [size], "test"));
    expect(gpu.counters().bytesReserved).toBeLessThanOrEqual(2 ** 20);
  }
  expect(gpu.counters().buffersCreated).toBeGreaterThanOrEqual(3);
  gpu.destroy();
});

test("a scope gives back all but what it returns", async () => {
  const gpu = await testGpu();
  const before = gpu.counters();
  const kept = gpu.scope(() => {
    const x = tensor(gpu, [1, 2], [2]);
    gpu.scope(() => axpy(1, x, 1, x));
    return { inside: [axpy(2, x, 0, x)] };
  });
  expect(gpu.counters().buffersLive).toBe(before.buffersLive + 1);
  expect(await read(kept.inside[0] as never)).toEqual(Float32Array.from([2, 4]));
  gpu.release(...kept.inside);
  expect(gpu.counters().bytesLive).toBe(before.bytesLive);
});

test("a scope that throws gives back everything", async () => {
  const gpu = await testGpu();
  const before = gpu.counters();
  expect(() =>
    gpu.scope(() => {
      tensor(gpu, [1], [1]);
      throw new Error("inside");
    }),
  ).toThrow("inside");
  expect(gpu.counters().buffersLive).toBe(before.buffersLive);
});

test("a scope refuses an async step", async () => {
  const gpu = await testGpu();
  expect(() => gpu.scope(async () => 1)).toThrow(
    new GpuError("scope: the step must be synchronous, got a promise. Read results after the scope"),
  );
});

test("steps of one shape create no buffer and no bind group after the first", async () => {
  const gpu = await openGpu();
  const x = tensor(gpu, new Float32Array(1000).fill(1), [1000]);
  const step = (): void => {
    gpu.scope(() => void axpy(1, axpy(1, x, 1, x), 1, x));
    gpu.flush();
  };
  step();
  step();
  gpu.resetCounters();
  step();
  const { buffersCreated, bindGroupsCreated } = gpu.counters();
  expect({ buffersCreated, bindGroupsCreated }).toEqual({ buffersCreated: 0, bindGroupsCreated: 0 });
  gpu.destroy();
});

test("an upload does not overtake what was dispatched before it", async () => {
  const gpu = await testGpu();
  const x = tensor(gpu, [1], [1]);
  const doubled = axpy(2, x, 0, x);
  gpu.write(x, Float32Array.of(50));
  expect(await read(doubled)).toEqual(Float32Array.of(2));
  gpu.release(x, doubled);
});

test("the byte budget refuses what would pass it, and the peak says how far it went", async () => {
  const gpu = await openGpu({ budgetBytes: 4096 });
  const a = empty(gpu, [512], "a");
  expect(() => empty(gpu, [1024], "b")).toThrow(
    new GpuError(
      "b: 4096 bytes more would pass the budget of 4096 bytes, 2048 are in use. Use a smaller batch, a shorter length or a larger budgetBytes",
    ),
  );
  gpu.release(a);
  expect(gpu.counters()).toMatchObject({ bytesLive: 0, bytesPeak: 2048, bytesReserved: 2048 });
  gpu.destroy();
});

test("a buffer larger than the device allows names the limit", async () => {
  const gpu = await testGpu();
  const limit = Math.min(gpu.limits.maxBufferSize, gpu.limits.maxStorageBufferBindingSize);
  expect(() => gpu.allocate(limit + 4, "huge")).toThrow(
    new GpuError(
      `huge: a buffer may have at most ${limit} bytes on this device, got ${limit + 4}. Use a smaller batch, a shorter length or a smaller model`,
    ),
  );
});

test("WGSL that does not compile is a GpuError at the next read, with the kernel's name", async () => {
  const gpu = await openGpu();
  const broken = defineKernel(
    "broken",
    "@group(0) @binding(0) var<storage, read_write> y: array<f32>;\n@compute @workgroup_size(1) fn main() { y[0] = nonsense; }",
  );
  const y = empty(gpu, [1], "y");
  broken(gpu, {}, { y }, [1]);
  await expect(read(y)).rejects.toThrow(/^broken: .*nonsense/s);
  await expect(read(y)).rejects.toBeInstanceOf(GpuError);
  gpu.destroy();
});

test("a destroyed device says so instead of hanging", async () => {
  const gpu = await openGpu();
  const x = tensor(gpu, [1], [1]);
  gpu.destroy();
  await expect(read(x)).rejects.toThrow(new GpuError("the device was destroyed. Open a new one with openGpu"));
});

test("a kernel names the uniform, buffer or tunable that does not fit", async () => {
  const gpu = await testGpu();
  const source = `override WG: u32 = 64;
struct Dims { n: u32, a: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(WG) fn main(@builtin(global_invocation_id) id: vec3u) { if (id.x < d.n) { y[id.x] = d.a; } }`;
  const fill = defineKernel("fill", source);
  const y = empty(gpu, [4], "y");
  expect(() => fill(gpu, { n: 4 }, { y }, [4])).toThrow(new GpuError('fill: uniform "a" was not given, got n'));
  expect(() => fill(gpu, { n: 4, a: 1 }, {}, [4])).toThrow(new GpuError('fill: buffer "y" was not given, got '));
  expect(() => fill(gpu, { n: 4, a: 1 }, { y }, [4], { WGS: 8 })).toThrow(
    new GpuError('fill: there is no override or const "WGS" to tune, got WGS = 8'),
  );
  fill(gpu, { n: 4, a: 7 }, { y }, [4], { WG: 2 });
  expect(await read(y)).toEqual(Float32Array.of(7, 7, 7, 7));
  gpu.release(y);
});

test("a runtime without WebGPU gets told what to use", async () => {
  const none = { requestAdapter: async () => null } as unknown as GPU;
  await expect(openGpu({ gpu: none })).rejects.toThrow(
    new GpuError(
      "openGpu: WebGPU is here but no adapter was given. Update the graphics driver, or in Deno on a machine without a GPU set VK_ICD_FILENAMES to a software driver",
    ),
  );
});

test("time gives a time for one pass and for several", async () => {
  const gpu = await testGpu();
  const x = tensor(gpu, new Float32Array(400_000).fill(1), [400_000]);
  const add = (times: number) => (): void => {
    for (let i = 0; i < times; i++) gpu.release(axpy(2, x, 0, x));
  };
  expect(await gpu.time(add(20))).toBeGreaterThan(0);
  const split = await gpu.time(() => {
    add(1)();
    gpu.flush();
    add(1)();
  });
  expect(split).toBeGreaterThan(0);
  gpu.release(x);
});

test("a buffer that was given back is not taken again", async () => {
  const gpu = await testGpu();
  const buffer = gpu.allocate(64, "twice");
  gpu.release({ buffer });
  const { bytesLive } = gpu.counters();
  expect(() => gpu.release({ buffer })).toThrow(
    new GpuError(`release: a buffer is given back once, got "${buffer.label}" again`),
  );
  expect(gpu.counters().bytesLive).toBe(bytesLive);
});

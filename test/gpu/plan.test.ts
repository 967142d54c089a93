import { expect, test } from "vitest";
import { GpuError } from "../../src/gpu/errors.ts";
import { defineKernel } from "../../src/gpu/kernel.ts";
import { addInto, axpy, scale } from "../../src/kernels/axpy.ts";
import { copyTo } from "../../src/kernels/copy-rows.ts";
import { empty, read, slice, type Tensor, tensor } from "../../src/tensor/tensor.ts";
import { testGpu } from "../harness.ts";

const N = 100;
const ramp = Float32Array.from({ length: N }, (_, i) => i - 40);

/** y ← ((x·2 + x)·2 + x)·2 … , `depth` times; its values are exact in f32. */
function chain(x: Tensor, y: Tensor, depth: number): void {
  let z = x;
  for (let i = 0; i < depth; i++) z = axpy(2, z, 1, x);
  copyTo(z, y);
}

test("a traced step gives at every run what it gives undone, from inputs as they are then", async () => {
  const gpu = await testGpu();
  const [x, y, eager] = [tensor(gpu, ramp, [N]), empty(gpu, [N], "y"), empty(gpu, [N], "eager")];
  const plan = gpu.trace(() => chain(x, y, 9));
  for (const factor of [1, 3, -2]) {
    gpu.write(
      x,
      ramp.map((v) => v * factor),
    );
    plan.run();
    gpu.scope(() => chain(x, eager, 9));
    expect(await read(y)).toEqual(await read(eager));
  }
  plan.destroy();
  gpu.release(x, y, eager);
});

test("a run makes no GPU object, reads nothing back and is one submit", async () => {
  const gpu = await testGpu();
  const [x, y] = [tensor(gpu, ramp, [N]), empty(gpu, [N], "y")];
  const plan = gpu.trace(() => chain(x, y, 30));
  plan.run();
  await gpu.finish();
  gpu.resetCounters();
  plan.run();
  plan.run();
  const { buffersCreated, bindGroupsCreated, submits, readbacks, dispatches } = gpu.counters();
  expect({ buffersCreated, bindGroupsCreated, submits, readbacks, dispatches }).toEqual({
    ...{ buffersCreated: 0, bindGroupsCreated: 0, submits: 2, readbacks: 0 },
    dispatches: new Map([["axpy", 60]]),
  });
  plan.destroy();
  gpu.release(x, y);
});

test("memory is that of what is live together, not of all that is made", async () => {
  const gpu = await testGpu();
  const [x, y] = [tensor(gpu, ramp, [N]), empty(gpu, [N], "y")];
  const workspace: GPUBuffer[] = [];
  const before = gpu.counters().bytesLive;
  const plan = gpu.trace(() => chain(x, y, 50), workspace);
  // Two of fifty: one is read while the other is written. The last is y itself.
  expect(plan.workspaceBytes).toBe(2 * 4 * N);
  expect(workspace).toHaveLength(2);
  const longer = gpu.trace(() => chain(x, y, 60), workspace);
  expect(workspace).toHaveLength(2);
  plan.run();
  longer.run();
  await gpu.finish();
  plan.destroy();
  longer.destroy();
  gpu.release(...workspace.map((buffer) => ({ buffer })));
  expect(gpu.counters().bytesLive).toBe(before);
  gpu.release(x, y);
});

test("a uniform given as a function is asked at each run", async () => {
  const gpu = await testGpu();
  const source = `struct Dims { n: u32, a: f32 }
@group(0) @binding(0) var<uniform> d: Dims;
@group(0) @binding(1) var<storage, read_write> y: array<f32>;
@compute @workgroup_size(1) fn main(@builtin(global_invocation_id) id: vec3u) { if (id.x < d.n) { y[id.x] += d.a; } }`;
  const kernel = defineKernel("add-constant", source);
  const y = tensor(gpu, [0, 0], [2]);
  let a = 1;
  const plan = gpu.trace(() => {
    kernel(gpu, { n: 1, a: () => a }, { y }, [1]);
    kernel(gpu, { n: 2, a: 10 }, { y }, [2]);
    kernel(gpu, { n: 2, a: () => -a }, { y }, [2]);
  });
  plan.run();
  a = 5;
  plan.run();
  expect([...(await read(y))]).toEqual([20, 14]);
  plan.destroy();
  gpu.release(y);
});

test("values written while tracing are constants, results may go to a part of a buffer", async () => {
  const gpu = await testGpu();
  const flat = tensor(gpu, new Float32Array(256), [256]);
  const plan = gpu.trace(() => {
    const ones = tensor(gpu, new Float32Array(8).fill(1), [8]);
    copyTo(scale(ones, 3), slice(flat, 64, [8]));
    const twice = scale(ones, 2);
    copyTo(twice, slice(flat, 128, [8]));
    copyTo(twice, slice(flat, 192, [8])); // a second place for the same, in the buffer it lies in
  });
  expect(plan.dispatches.map(({ pipeline }) => pipeline.name)).toEqual(["axpy", "axpy", "copy-rows", "copy-rows"]);
  plan.run();
  const values = await read(flat);
  expect([0, 63, 64, 71, 72, 128, 192, 199, 200].map((i) => values[i])).toEqual([0, 0, 3, 3, 0, 2, 2, 2, 0]);
  plan.destroy();
  gpu.release(flat);
});

test("in-place kernels work on what was there before and on what the step made", async () => {
  const gpu = await testGpu();
  const [x, y] = [tensor(gpu, ramp, [N]), tensor(gpu, new Float32Array(N), [N])];
  const plan = gpu.trace(() => {
    const z = scale(x, 2);
    addInto(x, z);
    addInto(z, y);
  });
  plan.run();
  plan.run();
  expect(await read(y)).toEqual(ramp.map((v) => 6 * v));
  plan.destroy();
  gpu.release(x, y);
});

test("what a traced step may not do is refused, and tracing ends", async () => {
  const gpu = await testGpu();
  const x = tensor(gpu, ramp, [N]);
  expect(() => gpu.trace(() => gpu.write(x, ramp))).toThrow(
    new GpuError("trace: a traced step may write values only to what it has just made. Write inputs before it runs"),
  );
  expect(() => gpu.trace(() => void gpu.trace(() => {}))).toThrow(
    new GpuError("trace: steps are traced one at a time, got a trace within a trace"),
  );
  let reading: Promise<unknown> = Promise.resolve();
  gpu.trace(() => {
    reading = gpu.read([x]);
    reading.catch(() => {});
  });
  await expect(reading).rejects.toThrow(new GpuError("read: a traced step reads nothing back. Read after it has run"));
  expect(await read(x)).toEqual(ramp);
  gpu.release(x);
});

// Compiles every rung of the ladders, as it stands and as it is sent, in a page or in Deno: see scripts/portable.ts.
import { openGpu } from "../src/gpu/gpu.ts";
import { unroll } from "../src/gpu/unroll.ts";
import { compileErrors } from "./compile.ts";

const FILES = [
  "bench/matmul/1-naive.wgsl",
  "bench/matmul/2-coalesced.wgsl",
  "bench/matmul/3-shared-tile.wgsl",
  "bench/matmul/4-register-block.wgsl",
  "bench/matmul/5-vec4.wgsl",
  "bench/lora/0-product.wgsl",
  "bench/lora/1-three-products.wgsl",
  "bench/lora/2-two-passes.wgsl",
  "bench/lora/3-columns.wgsl",
];

try {
  const shaders = await Promise.all(
    FILES.map(async (name) => ({ name, source: new TextDecoder().decode(await readRepoFile(name)) })),
  );
  const { device } = await openGpu();
  const unrolled = shaders.map(({ name, source }) => ({ name: `${name}, unrolled`, source: unroll(source) }));
  const errors = await compileErrors(device, [...shaders, ...unrolled]);
  finish(JSON.stringify({ ok: errors.length === 0, compiled: shaders.length + unrolled.length, errors }));
} catch (error) {
  finish(JSON.stringify({ ok: false, error: String(error) }));
}

// Makes dist/: JavaScript by esbuild (kernels inlined as text), declarations by tsc.
import { execFileSync } from "node:child_process";
import { chmodSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { build } from "esbuild";

rmSync("dist", { recursive: true, force: true });
await build({
  entryPoints: ["src/index.ts", "src/node.ts", "src/tokenizer.ts", "src/cli/main.ts"],
  outdir: "dist",
  outbase: "src",
  bundle: true,
  splitting: true,
  chunkNames: "chunks/[name]-[hash]",
  format: "esm",
  platform: "neutral",
  packages: "external",
  target: "es2022",
  loader: { ".wgsl": "text" },
  // Says that a kernel nobody calls may be dropped, so that a bundler leaves out its WGSL too.
  pure: ["defineKernel"],
  logLevel: "warning",
});
chmodSync("dist/cli/main.js", 0o755);

const typescript = dirname(createRequire(import.meta.url).resolve("typescript/package.json"));
execFileSync(process.execPath, [join(typescript, "bin/tsc"), "-p", "tsconfig.build.json"], { stdio: "inherit" });

// Bundles the built engine for a web page: it must need nothing from outside, and stay small. Run `npm run build` first.
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

const BUDGET_KB = 80;

const { outputFiles, metafile } = await build({
  stdin: { contents: 'export * from "./dist/index.js";', resolveDir: "." },
  bundle: true,
  minify: true,
  format: "esm",
  platform: "browser",
  packages: "external",
  external: ["node:*"],
  write: false,
  metafile: true,
  logLevel: "warning",
});
const outside = Object.values(metafile.outputs).flatMap(({ imports }) => imports.map(({ path }) => path));
if (outside.length > 0) {
  console.error(`check-browser: the engine must import nothing from outside, got ${[...new Set(outside)].join(", ")}`);
  process.exit(1);
}
const kb = (bytes: number): string => (bytes / 1000).toFixed(1);
const sizeBytes = outputFiles.reduce((n, { contents }) => n + contents.length, 0);
const gzBytes = outputFiles.reduce((n, { contents }) => n + gzipSync(contents, { level: 9 }).length, 0);
console.log(`browser bundle: ${kb(sizeBytes)} kB, ${kb(gzBytes)} kB gz of ${BUDGET_KB}`);
if (gzBytes > BUDGET_KB * 1000) {
  console.error(`check-browser: the bundle must be at most ${BUDGET_KB} kB gz, got ${kb(gzBytes)}`);
  process.exit(1);
}

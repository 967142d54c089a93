// Bundles the built entries that a web page can load: they must need nothing from outside, and stay small. Run `npm run build` first.
import { gzipSync } from "node:zlib";
import { build } from "esbuild";

/** kB, by gzip, of each entry alone. */
const BUDGETS_KB = { index: 120, serve: 60, browser: 8 };

const kb = (bytes: number): string => (bytes / 1000).toFixed(1);

function fail(message: string): never {
  console.error(`check-browser: ${message}`);
  process.exit(1);
}

for (const [entry, budget] of Object.entries(BUDGETS_KB)) {
  const { outputFiles, metafile } = await build({
    stdin: { contents: `export * from "./dist/${entry}.js";`, resolveDir: "." },
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
  if (outside.length > 0) fail(`${entry} must import nothing from outside, got ${[...new Set(outside)].join(", ")}`);
  const sizeBytes = outputFiles.reduce((n, { contents }) => n + contents.length, 0);
  const gzBytes = outputFiles.reduce((n, { contents }) => n + gzipSync(contents, { level: 9 }).length, 0);
  console.log(`browser bundle of ${entry}: ${kb(sizeBytes)} kB, ${kb(gzBytes)} kB gz of ${budget}`);
  if (gzBytes > budget * 1000) fail(`${entry} must be at most ${budget} kB gz, got ${kb(gzBytes)}`);
}

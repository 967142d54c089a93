// Makes dist/: JavaScript by esbuild (kernels inlined as text), declarations by tsc.
import { execFileSync } from "node:child_process";
import { chmodSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { build, type Plugin } from "esbuild";

/** Kernels as text, without what a compiler skips: the comments are for the repository. A space of indentation stays: it tells declarations apart. */
const kernels: Plugin = {
  name: "kernels",
  setup: ({ onLoad }) => {
    onLoad({ filter: /\.wgsl$/ }, ({ path }) => {
      const lines = readFileSync(path, "utf8")
        .split("\n")
        .map((line) =>
          line
            .replace(/\/\/.*$/, "")
            .trimEnd()
            .replace(/^ +/, " "),
        );
      return { contents: lines.filter(Boolean).join("\n"), loader: "text" };
    });
  },
};

rmSync("dist", { recursive: true, force: true });
await build({
  entryPoints: [
    ...[
      "src/index.ts",
      "src/node.ts",
      "src/hub.ts",
      "src/browser.ts",
      "src/tokenizer.ts",
      "src/data.ts",
      "src/serve.ts",
      "src/server.ts",
    ],
    "src/cli/main.ts",
  ],
  outdir: "dist",
  outbase: "src",
  bundle: true,
  splitting: true,
  chunkNames: "chunks/[name]-[hash]",
  format: "esm",
  platform: "neutral",
  packages: "external",
  target: "es2022",
  plugins: [kernels],
  logLevel: "warning",
});
chmodSync("dist/cli/main.js", 0o755);

const typescript = dirname(createRequire(import.meta.url).resolve("typescript/package.json"));
execFileSync(process.execPath, [join(typescript, "bin/tsc"), "-p", "tsconfig.build.json"], { stdio: "inherit" });
// tsc leaves ".ts" in a declaration's imports; the files that they mean are the built ones.
for (const file of readdirSync("dist", { recursive: true, encoding: "utf8" })) {
  if (!file.endsWith(".d.ts")) continue;
  const text = readFileSync(join("dist", file), "utf8");
  writeFileSync(join("dist", file), text.replace(/((?:from |import\()"\.{1,2}\/[^"]*)\.ts"/g, '$1.js"'));
}

import { readFile } from "node:fs/promises";
import { defineConfig, type ViteUserConfig } from "vitest/config";

const config: ViteUserConfig = defineConfig({
  plugins: [
    {
      name: "wgsl",
      enforce: "pre",
      async load(id) {
        if (id.endsWith(".wgsl")) return `export default ${JSON.stringify(await readFile(id, "utf8"))};`;
      },
    },
  ],
  test: {
    include: ["test/**/*.test.ts"],
    pool: "forks",
    maxWorkers: 2,
    env: { LOWRANK_TUNE: "off" },
    // A software GPU is slow, and the first use of a kernel compiles it.
    testTimeout: 120_000,
    hookTimeout: 120_000,
  },
});
export default config;

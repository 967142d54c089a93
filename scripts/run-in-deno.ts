// Runs a TypeScript file of this repository in Deno: tsx scripts/run-in-deno.ts SCRIPT.ts [args]. See portable.ts.
import { spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { unpackSoftwareAdapter } from "../src/gpu/software.ts";
import { adapterWish, bundle, parseRun } from "./portable.ts";

const run = parseRun("run-in-deno", process.argv.slice(2));
const deno = join(dirname(createRequire(import.meta.url).resolve("deno/package.json")), "bin.cjs");
const start = (args: readonly string[], env: NodeJS.ProcessEnv, stdio: "inherit" | "ignore"): number =>
  spawnSync(process.execPath, [deno, ...args], { env, stdio }).status ?? 1;

const directory = mkdtempSync(join(tmpdir(), "lowrank-deno-"));
try {
  const script = join(directory, "script.js");
  const prologue = `
globalThis.scriptArgs = ${JSON.stringify(run.args)};
const mounts = new Map(${JSON.stringify([...run.mounts])});
globalThis.readRepoFile = (path) => {
  const [, name, rest] = /^\\/([^/]+)\\/(.+)$/.exec(path) ?? [];
  return Deno.readFile(name === undefined ? path : (mounts.get(name) ?? "/" + name) + "/" + rest);
};
globalThis.finish = (json) => { console.log(json); Deno.exit(JSON.parse(json).ok ? 0 : 1); };
`;
  writeFileSync(join(directory, "prologue.js"), prologue);
  writeFileSync(script, `import "./prologue.js";\n${await bundle(run.script, "browser")}`);
  process.exitCode = start(["run", "--no-config", "-A", script, ...run.args], adapterEnvironment(), "inherit");
} finally {
  rmSync(directory, { recursive: true, force: true });
}

/** The environment in which Deno finds an adapter: this one, or one that names the software driver. */
function adapterEnvironment(): NodeJS.ProcessEnv {
  // Without XDG_RUNTIME_DIR, Vulkan loaders complain.
  const quiet = { XDG_RUNTIME_DIR: directory, ...process.env, DENO_NO_UPDATE_CHECK: "1" };
  const wish = adapterWish();
  const probe = "Deno.exit((await navigator.gpu?.requestAdapter()) ? 0 : 1)";
  if (wish === "hardware" || (wish === "auto" && start(["eval", probe], quiet, "ignore") === 0)) return quiet;
  const software = unpackSoftwareAdapter();
  return {
    ...quiet,
    VK_ICD_FILENAMES: software.icd,
    VK_DRIVER_FILES: software.icd,
    LD_LIBRARY_PATH: [software.directory, process.env.LD_LIBRARY_PATH].filter(Boolean).join(":"),
  };
}

/**
 * What `run-in-deno.ts` and `run-in-chromium.ts` share.
 *
 * A portable script finds three things on `globalThis`, whatever runs it: `finish(json)`, called once at the end with a
 * JSON object whose `ok` decides the exit code; `scriptArgs`, the arguments after the script's name; and
 * `readRepoFile(path)`, which reads a file by its path from the repository root or, after `--mount /name=DIR`, by
 * `/name/path`.
 */
import { resolve } from "node:path";
import { build } from "esbuild";

declare global {
  var finish: (json: string) => void;
  var scriptArgs: readonly string[];
  var readRepoFile: (path: string) => Promise<Uint8Array<ArrayBuffer>>;
}

export interface PortableRun {
  readonly script: string;
  readonly args: readonly string[];
  /** Directory by the first segment of a path: `/shared/x` is `x` in the directory of `shared`. */
  readonly mounts: ReadonlyMap<string, string>;
}

/** Reads `[--mount /name=DIR]... SCRIPT.ts [args]`. */
export function parseRun(command: string, argv: readonly string[]): PortableRun {
  const mounts = new Map<string, string>();
  const rest = [...argv];
  for (let first = rest.shift(); first !== undefined; first = rest.shift()) {
    if (first !== "--mount") return { script: first, args: rest, mounts };
    const [, name, directory] = /^\/([\w.-]+)=(.+)$/.exec(rest.shift() ?? "") ?? [];
    if (name === undefined || directory === undefined) break;
    mounts.set(name, resolve(directory));
  }
  console.error(`Usage: tsx scripts/${command}.ts [--mount /name=DIR]... SCRIPT.ts [args]`);
  process.exit(2);
}

/** The script and all it imports as one ES module; `node:` modules stay imports. */
export async function bundle(script: string, platform: "neutral" | "browser"): Promise<string> {
  const { outputFiles } = await build({
    entryPoints: [script],
    bundle: true,
    write: false,
    format: "esm",
    target: "es2022",
    platform,
    mainFields: ["module", "main"],
    external: ["node:*"],
    loader: { ".wgsl": "text" },
    logLevel: "warning",
  });
  return outputFiles[0]?.text ?? "";
}

/** Which adapter the environment asks for: `LOWRANK_ADAPTER` is auto (the default), hardware or software. */
export function adapterWish(): "auto" | "hardware" | "software" {
  const wish = process.env.LOWRANK_ADAPTER ?? "auto";
  if (wish === "auto" || wish === "hardware" || wish === "software") return wish;
  throw new Error(`LOWRANK_ADAPTER must be auto, software or hardware, got "${wish}"`);
}

// Lets Node import a .wgsl file as a string: node --import tsx --import ./scripts/wgsl.mjs FILE
import { readFile } from "node:fs/promises";
import { register } from "node:module";

export async function load(url, context, next) {
  if (!url.endsWith(".wgsl")) return next(url, context);
  const text = await readFile(new URL(url), "utf8");
  return { format: "module", shortCircuit: true, source: `export default ${JSON.stringify(text)};` };
}

// This file is evaluated twice: once by --import, and once on the hooks thread, which must not register itself again.
if (!import.meta.url.includes("?hooks")) register(`${import.meta.url}?hooks`);

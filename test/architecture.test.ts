// The building: a file may import from any floor below its own, or from its own room. Never up, never next door.
// Outside packages have their places too, so that the engine runs in a page.
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { dirname, join, normalize } from "node:path";
import { expect, test } from "vitest";

const FLOORS = [
  ["gpu", "io"],
  ["tensor"],
  ["kernels"],
  ["autograd"],
  ["nn"],
  ["models", "lora", "train"],
  ["serve"],
  ["cli"],
];
/** Which files may name which outside modules; every other import from outside is an error. */
const OUTSIDE: readonly [file: RegExp, modules: RegExp][] = [
  [/^src\/(io\/files|node)\.ts$/, /^node:/],
  [/^src\/io\/(hub|lock)\.ts$/, /^node:/],
  [/^src\/io\/tokenizer\.ts$/, /^@huggingface\/tokenizers$/],
  [/^src\/io\/chat-template\.ts$/, /^@huggingface\/jinja$/],
  [/^src\/io\/tables\.ts$/, /^(csv-parse\/sync|hyparquet|hyparquet-compressors)$/],
  [/^src\/serve\/http\//, /^hono(\/|$)/],
  [/^src\/cli\//, /^(node:|commander$|yaml$)/],
  [/^src\/cli\/serve-node\.ts$/, /^@hono\/node-server$/],
];

const files = readdirSync("src", { recursive: true, encoding: "utf8" })
  .map((file) => `src/${file.replaceAll("\\", "/")}`)
  .filter((file) => file.endsWith(".ts") && !file.endsWith(".d.ts"));
const floor = (name: string): number => FLOORS.findIndex((rooms) => rooms.includes(name));
const room = (file: string): string => (file.split("/").length > 2 ? (file.split("/")[1] ?? "") : "");
const resolved = (file: string, path: string): string => normalize(join(dirname(file), path)).replaceAll("\\", "/");

interface Import {
  readonly path: string;
  /** Erased by the compiler: `import type`, `export type`. */
  readonly typeOnly: boolean;
}

/** Every module that a source names: static, side-effect and dynamic imports, and re-exports. */
function importsOf(source: string): Import[] {
  const code = source.replace(/\/\*[\s\S]*?\*\//g, "").replace(/^\s*\/\/.*$/gm, "");
  const statements =
    /^(?:import|export)\b(\s+type\b(?!\s*from\b))?(?:[^"';]*?\bfrom)?\s*"([^"]+)"|\bimport\(\s*["'`]([^"'`]+)["'`]/gm;
  return [...code.matchAll(statements)].map(([, type, path, dynamic]) => ({
    path: path ?? dynamic ?? "",
    typeOnly: type !== undefined,
  }));
}

/** What is wrong with the imports of one file, in words. */
function complaints(file: string, source: string): string[] {
  const from = room(file);
  const wrong: string[] = [];
  if (from !== "" && floor(from) < 0) wrong.push(`src/${from} is on no floor: add it to FLOORS`);
  for (const { path } of importsOf(source)) {
    if (!path.startsWith(".")) {
      const allowed = OUTSIDE.some(([who, what]) => who.test(file) && what.test(path));
      if (!allowed) wrong.push(`${file} imports ${path}: it may not name that module`);
      continue;
    }
    const target = resolved(file, path);
    const to = room(target);
    if (!target.startsWith("src/")) wrong.push(`${file} imports ${target}: it is outside src/`);
    else if (to === "" && from !== "" && from !== "cli")
      wrong.push(`${file} imports ${target}: an entry point is above it`);
    else if (from !== "" && to !== "" && to !== from && floor(to) >= floor(from))
      wrong.push(`${file} imports ${target}: ${from} may import only floors below it`);
  }
  return wrong;
}

/** The file and all it loads when it runs, outside modules included. */
function loadedBy(file: string, seen: Set<string> = new Set()): Set<string> {
  if (seen.has(file)) return seen;
  seen.add(file);
  for (const { path, typeOnly } of importsOf(file.endsWith(".ts") ? readFileSync(file, "utf8") : "")) {
    if (typeOnly) continue;
    if (path.startsWith(".")) loadedBy(resolved(file, path), seen);
    else seen.add(path);
  }
  return seen;
}

test.each(files)("%s imports only what it may", (file) => {
  expect(complaints(file, readFileSync(file, "utf8"))).toEqual([]);
});

test.each(["src/index.ts", "src/serve.ts", "src/browser.ts"])("%s loads nothing from outside src/", (entry) => {
  expect([...loadedBy(entry)].filter((file) => !file.startsWith("src/"))).toEqual([]);
});

test("src/server.ts loads nothing from outside src/ but hono", () => {
  const outside = [...loadedBy("src/server.ts")].filter((file) => !file.startsWith("src/"));
  expect(outside.toSorted()).toEqual(["hono", "hono/secure-headers"]);
});

test("every import names a file that exists, with its extension", () => {
  const missing = files.flatMap((file) =>
    importsOf(readFileSync(file, "utf8"))
      .filter(({ path }) => path.startsWith(".") && !existsSync(resolved(file, path)))
      .map(({ path }) => `${file}: ${path}`),
  );
  expect(missing).toEqual([]);
});

test("an import is found in every form it can take", () => {
  const source = `import "./a.ts";
import b from "./b.wgsl";
import {
  c,
  type D,
} from "./c.ts";
import type { E } from "./e.ts";
export type { F } from "./f.ts";
export * from "./g.ts";
export const h = "./not-an-import.ts";
const i = await import("node:fs");
// import "./comment.ts";
`;
  expect(importsOf(source).map(({ path, typeOnly }) => (typeOnly ? `type ${path}` : path))).toEqual([
    "./a.ts",
    "./b.wgsl",
    "./c.ts",
    "type ./e.ts",
    "type ./f.ts",
    "./g.ts",
    "node:fs",
  ]);
});

test.each([
  [
    "src/tensor/t.ts",
    "../kernels/k.ts",
    "src/tensor/t.ts imports src/kernels/k.ts: tensor may import only floors below it",
  ],
  ["src/models/m.ts", "../lora/l.ts", "src/models/m.ts imports src/lora/l.ts: models may import only floors below it"],
  ["src/io/i.ts", "../gpu/g.ts", "src/io/i.ts imports src/gpu/g.ts: io may import only floors below it"],
  ["src/serve/s.ts", "../index.ts", "src/serve/s.ts imports src/index.ts: an entry point is above it"],
  ["src/nn/n.ts", "../../test/reference.ts", "src/nn/n.ts imports test/reference.ts: it is outside src/"],
  ["src/gpu/g.ts", "node:fs", "src/gpu/g.ts imports node:fs: it may not name that module"],
  ["src/index.ts", "commander", "src/index.ts imports commander: it may not name that module"],
  ["src/attic/a.ts", "./b.ts", "src/attic is on no floor: add it to FLOORS"],
])("%s may not import %s", (file, path, complaint) => {
  expect(complaints(file, `import { x } from "${path}";`)).toEqual([complaint]);
});

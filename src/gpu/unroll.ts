/**
 * Unrolls WGSL text: loops of constant length are written out and the small arrays they index become plain variables.
 *
 * Register tiles read best as arrays in loops, but some compilers then keep them in memory (SwiftShader ran 20 times slower).
 * The `.wgsl` file stays the source and stays valid; this only rewrites it on its way to the compiler. What is rewritten:
 * `for (var i = 0u; i < N; i++) { … }` and `var a: array<T, N>;` (nested too) within a function, with N a top-level
 * `const N: u32`.
 */
export function unroll(source: string): string {
  const constants = new Map<string, number>();
  for (const [, id, expression] of source.matchAll(/^const\s+(\w+)\s*:\s*u32\s*=\s*([^;]+);/gm)) {
    const value = fold(String(expression).replace(/\b[A-Za-z]\w*\b/g, (name) => `${constants.get(name) ?? name}u`));
    if (/^\d+u?$/.test(value)) constants.set(String(id), Number.parseInt(value, 10));
  }
  return arraysToVariables(unrollLoops(source, constants), constants);
}

function unrollLoops(source: string, constants: ReadonlyMap<string, number>): string {
  const loop = /for \(var (\w+) = 0u; \1 < (\w+); \1\+\+\) \{/g;
  for (let found = loop.exec(source); found; found = loop.exec(source)) {
    const [head, index, bound] = found;
    const length = constants.get(String(bound));
    if (length === undefined) continue;
    const start = found.index + head.length;
    const end = closingBrace(source, start);
    const body = source.slice(start, end);
    const name = new RegExp(`\\b${index}\\b`, "g");
    const copies = Array.from({ length }, (_, n) => `{${body.replace(name, `${n}u`)}}`);
    source = `${source.slice(0, found.index)}${copies.join("\n")}${source.slice(end + 1)}`;
    loop.lastIndex = found.index;
  }
  return source;
}

function closingBrace(source: string, from: number): number {
  let depth = 1;
  for (let at = from; at < source.length; at++) {
    if (source[at] === "{") depth++;
    else if (source[at] === "}" && --depth === 0) return at;
  }
  throw new Error("unroll: a loop has no closing brace");
}

function arraysToVariables(source: string, constants: ReadonlyMap<string, number>): string {
  let text = source;
  for (const [declaration, indent, id, type] of source.matchAll(/^( +)var (\w+): (array<.+>);$/gm)) {
    const lengths: number[] = [];
    let element = String(type);
    for (let inner = /^array<(.+), (\w+)>$/.exec(element); inner; inner = /^array<(.+), (\w+)>$/.exec(element)) {
      lengths.push(constants.get(String(inner[2])) ?? Number.NaN);
      element = String(inner[1]);
    }
    if (lengths.length === 0 || lengths.some(Number.isNaN)) continue;
    const names = lengths.reduce<string[]>(
      (all, n) => all.flatMap((name) => Array.from({ length: n }, (_, i) => `${name}_${i}`)),
      [String(id)],
    );
    text = text
      .replace(declaration, names.map((name) => `${indent}var ${name}: ${element};`).join("\n"))
      .replace(new RegExp(`\\b${id}((?:\\[[^\\][]+\\]){${lengths.length}})`, "g"), (_, indices: string) =>
        [
          String(id),
          ...[...indices.matchAll(/\[([^\]]+)\]/g)].map(([, index]) => Number.parseInt(fold(String(index)), 10)),
        ].join("_"),
      );
  }
  return text;
}

/** Works out `a op b` of literals, left to right: enough for an index. */
function fold(expression: string): string {
  const step = /(\d+)u?\s*([*/%+-])\s*(\d+)u?/;
  let text = expression;
  for (let found = step.exec(text); found; found = step.exec(text)) {
    const [a, b] = [Number(found[1]), Number(found[3])];
    const value = { "*": a * b, "/": Math.floor(a / b), "%": a % b, "+": a + b, "-": a - b }[String(found[2])] ?? 0;
    text = text.replace(step, `${value}u`);
  }
  return text;
}

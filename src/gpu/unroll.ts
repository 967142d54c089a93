/**
 * Unrolls WGSL text: loops of constant length are written out and the small arrays they index become plain variables.
 *
 * Register tiles read best as arrays in loops, but some compilers then keep them in memory (SwiftShader ran 20 times slower).
 * The `.wgsl` file stays the source and stays valid; this only rewrites it on its way to the compiler. What is rewritten:
 * `for (var i = 0u; i < N; i++) { … }` and `var a: array<T, N>;` (nested too) within a function, with N a top-level
 * `const N: u32`. A loop that is better left to the compiler says `i += 1u`.
 */
export function unroll(source: string): string {
  const constants = new Map<string, number>();
  for (const [, id, expression] of source.matchAll(/^const\s+(\w+)\s*:\s*u32\s*=\s*([^;]+);/gm)) {
    const value = evaluate(String(expression).replace(/\b[A-Za-z]\w*\b/g, (name) => `${constants.get(name) ?? name}`));
    if (value !== undefined) constants.set(String(id), value);
  }
  return arraysToVariables(unrollLoops(source, constants), constants);
}

/** The index after the brace that closes what was opened just before `from`, less one. */
export function closingBrace(source: string, from: number): number {
  let depth = 1;
  for (let at = from; at < source.length; at++) {
    if (source[at] === "{") depth++;
    else if (source[at] === "}" && --depth === 0) return at;
  }
  throw new Error("wgsl: a block has no closing brace");
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
      .replace(new RegExp(`\\b${id}((?:\\[[^\\][]+\\]){${lengths.length}})`, "g"), (use, indices: string) => {
        const values = [...indices.matchAll(/\[([^\]]+)\]/g)].map(([, index]) =>
          evaluate(String(index).replace(/\b[A-Za-z]\w*\b/g, (name) => `${constants.get(name) ?? name}`)),
        );
        return values.includes(undefined) ? use : [String(id), ...values].join("_");
      });
  }
  return text;
}

/** The value of a sum, difference, product, quotient or remainder of u32 literals, with brackets; undefined if it is anything else. */
function evaluate(expression: string): number | undefined {
  const tokens = expression.match(/\d+|[()+\-*/%]|[^\s\du]+/g) ?? [];
  let at = 0;
  const binary = (operators: string, operand: () => number): number => {
    let left = operand();
    for (let operator = tokens[at]; operator !== undefined && operators.includes(operator); operator = tokens[at]) {
      at++;
      const right = operand();
      if (operator === "+") left += right;
      else if (operator === "-") left -= right;
      else if (operator === "*") left *= right;
      else if (operator === "/") left = Math.floor(left / right);
      else left %= right;
    }
    return left;
  };
  const sum = (): number => binary("+-", () => binary("*/%", atom));
  const atom = (): number => {
    const token = tokens[at++];
    if (token !== "(") return Number(token);
    const value = sum();
    return tokens[at++] === ")" ? value : Number.NaN;
  };
  const value = sum();
  return at === tokens.length && Number.isInteger(value) ? value : undefined;
}

// Which texts a schema lets through, character by character.
import fc from "fast-check";
import { describe, expect, test, vi } from "vitest";
import { TextState } from "../../src/serve/grammar.ts";
import { jsonMachine } from "../../src/serve/json-schema.ts";
import { patternGrammar } from "../../src/serve/pattern.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { freshSeed } from "../harness.ts";

/** Where the text dies, or whether it is whole at its end. */
function read(start: TextState, text: string): number | "whole" | "begun" {
  let state: TextState | undefined = start;
  for (const [at, character] of [...text].entries()) {
    state = state.step(character);
    if (!state) return at;
  }
  return state.isComplete ? "whole" : "begun";
}

const person = {
  type: "object",
  properties: {
    name: { type: "string" },
    age: { type: "integer" },
    tags: { type: "array", items: { enum: ["a", "ab"] } },
  },
  required: ["name"],
};
const tree = { type: "object", properties: { v: { type: "null" }, next: { $ref: "#" } }, required: ["v"] };
const linked = { $ref: "#/$defs/list", $defs: { list: { type: "array", items: { $ref: "#/$defs/list" } } } };

const valid: readonly (readonly [schema: unknown, texts: readonly string[]])[] = [
  [person, ['{"name":"x"}', ' {"name": "x", "age": -12, "tags": ["ab", "a","ab"]}', '{"name":"","tags":[]}']],
  [{}, ["null", "true", '"a\\n\\u00e9\\ud83d\\ude00é😀"', "-0.5e-7", '{"a":[1,{}],"b":{"c":""}}', "[]", "[[], 1]"]],
  [true, ["1", "{}"]],
  [tree, ['{"v":null}', '{"v":null,"next":{"v":null,"next":{"v": null}}}']],
  [linked, ["[]", "[[],[[]]]", "[".repeat(2000) + "]".repeat(2000)]],
  [{ type: ["string", "null"], maxLength: 2 }, ["null", '"😀\\ud83d\\ude00"', '""']],
  [{ type: "integer" }, ["0", "-7", "120"]],
  [{ type: "integer", minimum: -15, exclusiveMaximum: 329 }, ["-15", "-9", "0", "7", "99", "100", "328"]],
  [{ type: "integer", exclusiveMinimum: 9, maximum: 1e3 }, ["10", "999", "1000"]],
  [{ type: "number" }, ["0", "-0.25", "1e-5", "1.5E+300", "123456789012345678901"]],
  [{ type: "boolean" }, ["true", "false"]],
  [{ const: { a: [1, "é"] } }, ['{"a":[1,"é"]}', '{"a": [1, "é"]}']],
  [{ enum: ["😀", "😁", "a", "ab", 1, 12, null, [1]] }, ['"😁"', '"😀"', '"a"', '"ab"', "1", "12", "null", "[1]"]],
  [{ type: "string", enum: ["a", 1] }, ['"a"']],
  [{ anyOf: [{ type: "null" }, { type: "array", maxItems: 1 }] }, ["null", "[]", "[null]"]],
  [{ allOf: [{ type: "null" }], description: "nothing" }, ["null"]],
  [
    { prefixItems: [{ type: "null" }, { type: "boolean" }], items: false, type: "array" },
    ["[]", "[null]", "[null,true]"],
  ],
  [{ type: "array", prefixItems: [{ const: 1 }], items: { const: 2 }, minItems: 2, maxItems: 3 }, ["[1,2]", "[1,2,2]"]],
  [{ type: "array", items: { const: 1 }, minItems: 2, maxItems: 2 }, ["[1,1]"]],
  [{ type: "string", pattern: "^[A-Z]{2}-\\d+$" }, ['"AB-1"', '"ZZ-007"']],
  [{ type: "string", pattern: 'a"|b\\\\' }, ['"xa\\"x"', '"b\\\\"', '"\\n b\\\\\\n"']],
  [{ type: "string", format: "date" }, ['"2026-02-28"', '"2024-12-31"', '"2024-04-30"']],
  [{ type: "string", format: "date-time" }, ['"2026-02-28T23:59:00.5Z"', '"2026-02-28T00:00:00+01:30"']],
  [{ type: "string", format: "uuid" }, ['"123e4567-e89b-12d3-a456-426614174000"']],
  [{ type: "object", required: ["b", "a"] }, ['{"b":1,"a":2}', '{"b":1,"a":2,"ab":3,"":4}']],
  [
    { type: "object", properties: { a: true }, additionalProperties: { const: 1 } },
    ["{}", '{"a":"x","aa":1, "b":1}', '{"b":1}', '{"\\n":1}'],
  ],
  // Of what cannot end, nothing can be begun.
  [{ anyOf: [{ $ref: "#" }, { type: "object", properties: { a: { $ref: "#/anyOf/1" } } }] }, ["{}", '{"a":{}}']],
];

test.each(valid)("%j lets its texts through, and they may end only whole", (schema, texts) => {
  const start = jsonMachine(schema);
  for (const text of texts) {
    expect(read(start, text), text).toBe("whole");
    expect(() => JSON.parse(text)).not.toThrow();
    // Any beginning is alive; what of it may end is JSON.
    const characters = [...text].slice(0, 200);
    for (const at of characters.keys()) {
      const begun = characters.slice(0, at).join("");
      const found = read(start, begun);
      expect(typeof found, begun).toBe("string");
      if (found === "whole") expect(() => JSON.parse(begun), begun).not.toThrow();
    }
  }
});

const invalid: readonly (readonly [schema: unknown, text: string, at: number | "begun"])[] = [
  [person, '{"age', 2],
  [person, '{"name":1', 8],
  [person, '{"name":"x","tags":["b', 21],
  [person, '{"name":"x","tags":["a"],"age', 24],
  [person, '{"name":"x",}', 12],
  [person, '{ "', 1],
  [person, '{"name":  ', 9],
  [person, '{"name":"x"} ', 12],
  [person, '{"name":"x","other', 13],
  [{}, "  1", 1],
  [{}, "01", 1],
  [{}, "1.", "begun"],
  [{}, "1e", "begun"],
  [{}, "1e308", 4],
  [{}, "+1", 0],
  [{}, '"\n', 1],
  [{}, '"\\x', 2],
  [{}, '"\\ud83d"', 7],
  [{}, '"\\ude00', 4],
  [{}, '{"a":1,"b"}', 10],
  [{}, "[1,]", 3],
  [{ type: "integer" }, "1.0", 1],
  [{ type: "integer" }, "-0", 1],
  [{ type: "integer", minimum: -15, exclusiveMaximum: 329 }, "-16", 2],
  [{ type: "integer", minimum: -15, exclusiveMaximum: 329 }, "329", 2],
  [{ type: "integer", exclusiveMinimum: 9 }, "9", "begun"],
  [{ type: "string", maxLength: 2 }, '"abc', 3],
  [{ type: "string", minLength: 2 }, '"a"', 2],
  [{ const: "é" }, '"e', 1],
  [{ const: 12 }, "1", "begun"],
  [{ type: "string", enum: ["a", 1] }, "1", 0],
  [{ type: "string", format: "date" }, '"2026-02-29"', 10],
  [{ type: "array", items: { const: 1 }, minItems: 2, maxItems: 2 }, "[1]", 2],
  [{ type: "array", items: { const: 1 }, minItems: 2, maxItems: 2 }, "[1,1,", 4],
  [{ type: "array", maxItems: 0 }, "[1", 1],
  [{ type: "object", properties: { a: true }, additionalProperties: { const: 1 } }, '{"b":1,"a"', 9],
  [{ type: "object", properties: { a: false } }, '{"', 1],
  [tree, '{"v":null,"next":null', 17],
];

test.each(invalid)("%j does not let %j through", (schema, text, at) => {
  expect(read(jsonMachine(schema), text)).toBe(at);
});

describe("patterns", () => {
  const patterns = [
    ..."a|ab+c|^x$ ^(a|b)*c$ ^a{2,3}b?$ [^a-c] ^[\\w-]+@\\w+\\.com$ ^(?:a?){3}$ ^a+?b*?$ \\d$ ^\\S+$ ^[\\]\\\\-]$ ^.$".split(
      " ",
    ),
    ...["^a{0}$", "^\\u{1F600}\\x41\\u00e9$", "^[😀-😂]$", "^\\s$", "", "^(a{2,}|b){2}$", "^[^]$", "a||b"],
  ];

  test("find in a text what RegExp finds", () => {
    const letters = ["a", "b", "c", "x", "7", "@", ".", "com", "-", "]", "\\", "\n", " ", "😀", "😁", "A", "é", "_"];
    const text = fc.array(fc.constantFrom(...letters), { maxLength: 8 }).map((all) => all.join(""));
    const compiled = patterns.map((pattern) => [pattern, TextState.of(patternGrammar(pattern))] as const);
    fc.assert(
      fc.property(
        fc.constantFrom(...compiled),
        fc.oneof(text, fc.string({ unit: "binary" })),
        ([pattern, start], given) => {
          fc.pre(given.isWellFormed());
          const found = start ? read(start, given) === "whole" : false;
          expect(found, `${pattern} in ${JSON.stringify(given)}`).toBe(new RegExp(pattern, "u").test(given));
        },
      ),
      { numRuns: 3000 },
    );
  });

  test.each([
    ["a^b", "^ within"],
    ["(^a)", "^ within"],
    ["\\bx", "\\b"],
    ["(a)\\1", "\\1"],
    ["(?=a)", "(?="],
    ["(?<n>a)", "(?<"],
    ["\\p{L}", "\\p"],
    ["\\ud83d", "the surrogate \\ud83d"],
  ])("of what is not regular or not known are refused: %s", (pattern, what) => {
    expect(() => patternGrammar(pattern)).toThrow(
      new ShapeError(
        `pattern: must be of literals, classes, groups, |, quantifiers, and ^ and $ at its ends, got ${what} in ${JSON.stringify(pattern)}`,
      ),
    );
  });
});

type Schema = Record<string, unknown>;
interface Case {
  readonly schema: Schema;
  readonly instance: fc.Arbitrary<unknown>;
}

const KEYS = ["a", "ab", "b", 'é"', ""];
const number = fc.double({ noNaN: true, min: -1e20, max: 1e20 }).map((x) => (Math.abs(x) < 1e-300 ? 0 : x));
const { any: anyJson } = fc.letrec((tie) => ({
  any: fc.oneof(
    { maxDepth: 3 },
    fc.oneof(fc.constant(null), fc.boolean(), fc.integer(), number, fc.string()),
    fc.array(tie("any"), { maxLength: 3 }),
    fc.dictionary(fc.constantFrom(...KEYS), tie("any"), { maxKeys: 3, noNullPrototype: true }),
  ),
}));
const limits = (most: number): fc.Arbitrary<[number, number]> =>
  fc.tuple(fc.nat(most), fc.nat(most)).map(([a, b]) => [a, a + b]);

const simple: fc.Arbitrary<Case> = fc.oneof(
  fc.constant({ schema: {}, instance: anyJson }),
  fc.constant({ schema: { type: "null" }, instance: fc.constant(null) }),
  fc.constant({ schema: { type: "number" }, instance: fc.oneof(number, fc.integer()) }),
  fc.constant({ schema: { type: ["boolean", "string"] }, instance: fc.oneof(fc.boolean(), fc.string()) }),
  limits(4).map(([minLength, maxLength]) => ({
    schema: { type: "string", minLength, maxLength },
    instance: fc.string({ minLength, maxLength, unit: "grapheme-ascii" }),
  })),
  fc.tuple(fc.integer(), fc.nat()).map(([minimum, more]) => ({
    schema: { type: "integer", minimum, maximum: minimum + more },
    instance: fc.integer({ min: minimum, max: minimum + more }),
  })),
  fc
    .array(anyJson, { minLength: 1, maxLength: 4 })
    .map((all) => ({ schema: { enum: all }, instance: fc.constantFrom(...all) })),
);
const { schema: anyCase } = fc.letrec<{ schema: Case }>((tie) => ({
  schema: fc.oneof(
    { maxDepth: 3 },
    simple,
    fc.tuple(tie("schema"), limits(2)).map(([{ schema, instance }, [minItems, maxItems]]) => ({
      schema: { type: "array", items: schema, minItems, maxItems },
      instance: fc.array(instance, { minLength: minItems, maxLength: maxItems }),
    })),
    fc.tuple(fc.array(tie("schema"), { minLength: 1, maxLength: 3 }), tie("schema")).map(([prefix, rest]) => ({
      schema: { type: "array", prefixItems: prefix.map(({ schema }) => schema), items: rest.schema, minItems: 1 },
      instance: fc
        .tuple(fc.tuple(...prefix.map(({ instance }) => instance)), fc.array(rest.instance, { maxLength: 2 }))
        .map((all) => all.flat(1)),
    })),
    fc.array(tie("schema"), { minLength: 1, maxLength: 3 }).map((all) => ({
      schema: { anyOf: all.map(({ schema }) => schema) },
      instance: fc.oneof(...all.map(({ instance }) => instance)),
    })),
    fc
      .tuple(
        fc.uniqueArray(fc.tuple(fc.constantFrom(...KEYS), tie("schema"), fc.boolean()), {
          maxLength: 3,
          selector: ([k]) => k,
        }),
        fc.boolean(),
      )
      .map(([all, isOpen]) => ({
        schema: {
          type: "object",
          properties: Object.fromEntries(all.map(([name, { schema }]) => [name, schema])),
          required: all.filter(([, , isRequired]) => isRequired).map(([name]) => name),
          ...(isOpen && { additionalProperties: { type: "null" } }),
        },
        instance: fc
          .tuple(
            ...all.map(([name, { instance }, isRequired]) =>
              isRequired
                ? instance.map((x) => [[name, x]])
                : fc.option(instance).map((x) => (x === null ? [] : [[name, x]])),
            ),
            fc.constant(isOpen && !all.some(([name]) => name === "z") ? [["z", null]] : []),
          )
          .map((entries) => Object.fromEntries(entries.flat(1) as [string, unknown][])),
      })),
  ),
}));

/** Plainly by the book, and the properties in order. */
function fits(schema: Schema | boolean, value: unknown): boolean {
  if (typeof schema === "boolean") return schema;
  if (schema.enum) return (schema.enum as unknown[]).some((one) => JSON.stringify(one) === JSON.stringify(value));
  if (schema.anyOf) return (schema.anyOf as Schema[]).some((one) => fits(one, value));
  const types = schema.type === undefined ? undefined : [schema.type].flat();
  const isOf: Record<string, boolean> = {
    null: value === null,
    boolean: typeof value === "boolean",
    number: typeof value === "number",
    integer: Number.isInteger(value),
    string: typeof value === "string",
    array: Array.isArray(value),
    object: typeof value === "object" && value !== null && !Array.isArray(value),
  };
  if (types && !types.some((type) => isOf[type as string])) return false;
  const within = (x: number, least: unknown, most: unknown): boolean =>
    x >= ((least as number) ?? -Infinity) && x <= ((most as number) ?? Infinity);
  if (typeof value === "string") return within([...value].length, schema.minLength, schema.maxLength);
  if (typeof value === "number") return within(value, schema.minimum, schema.maximum);
  if (Array.isArray(value)) {
    const prefix = (schema.prefixItems ?? []) as Schema[];
    const of = (i: number): Schema | boolean => prefix[i] ?? (schema.items as Schema) ?? true;
    return within(value.length, schema.minItems, schema.maxItems) && value.every((one, i) => fits(of(i), one));
  }
  if (!isOf.object) return true;
  const properties = (schema.properties ?? {}) as Record<string, Schema>;
  const names = Object.keys(properties);
  const others = schema.additionalProperties ?? schema.properties === undefined;
  const places = Object.keys(value as object).map((name) =>
    names.includes(name) ? names.indexOf(name) : names.length,
  );
  return (
    ((schema.required ?? []) as string[]).every((name) => Object.hasOwn(value as object, name)) &&
    places.every((place, i) => i === 0 || (places[i - 1] as number) <= place) &&
    Object.entries(value as object).every(([name, one]) =>
      fits(Object.hasOwn(properties, name) ? (properties[name] as Schema) : (others as Schema), one),
    )
  );
}

const replaced = (value: unknown, at: number, other: unknown): unknown => {
  if (typeof value !== "object" || value === null || at % 3 === 0) return other;
  const keys = Object.keys(value);
  const changed = keys[at % (keys.length || 1)];
  if (Array.isArray(value))
    return value.map((one, i) => (`${i}` === changed ? replaced(one, Math.floor(at / 2), other) : one));
  return Object.fromEntries(
    Object.entries(value)
      .filter(([name]) => name !== changed || at % 5 !== 0)
      .map(([name, one]) => [name, name === changed ? replaced(one, Math.floor(at / 2), other) : one]),
  );
};

test("what a plain validator finds valid is let through, and nothing else", () => {
  let [good, bad] = [0, 0];
  const drawn = anyCase.chain((one) =>
    fc.record({
      schema: fc.constant(one.schema),
      value: one.instance,
      other: fc.oneof(anyJson, one.instance),
      at: fc.nat(1000),
    }),
  );
  fc.assert(
    fc.property(drawn, ({ schema, value, other, at }) => {
      const start = jsonMachine(schema);
      const [given, changed] = [JSON.stringify(value), JSON.stringify(replaced(value, at, other))];
      expect(fits(schema, JSON.parse(given)), `${given} is of ${JSON.stringify(schema)}`).toBe(true);
      expect(read(start, given), `${given} of ${JSON.stringify(schema)}`).toBe("whole");
      const isFit = fits(schema, JSON.parse(changed));
      expect(read(start, changed) === "whole", `${changed} of ${JSON.stringify(schema)}`).toBe(isFit);
      if (isFit) good++;
      else bad++;
    }),
    { numRuns: 1500 },
  );
  expect(Math.min(good, bad)).toBeGreaterThan(100);
});

test.each([
  [
    { type: "array", uniqueItems: true },
    'at #: must have keywords that can be kept to, got "uniqueItems". Leave it out, and check the text afterwards',
  ],
  [
    { properties: { a: { not: {} } } },
    'at #/properties/a: must have keywords that can be kept to, got "not". Leave it out, and check the text afterwards',
  ],
  [
    { items: { type: "text" } },
    'at #/items: type must be of object, array, string, number, integer, boolean, null, got "text"',
  ],
  [{ type: "number", minimum: 0 }, 'at #: minimum must be with the type "integer", got "number"'],
  [{ maximum: 0 }, 'at #: maximum must be with the type "integer", got "no type"'],
  [{ type: "integer", minimum: "0" }, 'at #: minimum must be a number, got "0"'],
  [{ type: "string", format: "email" }, 'at #: format must be one of date, time, date-time, uuid, got "email"'],
  [
    { type: "string", pattern: "a", maxLength: 2 },
    'at #: pattern and format must be alone, got "pattern with maxLength"',
  ],
  [
    { type: "string", pattern: "\\bx" },
    'at #: pattern: must be of literals, classes, groups, |, quantifiers, and ^ and $ at its ends, got \\b in "\\\\bx"',
  ],
  [{ type: "string", minLength: -1 }, "at #: minLength must be a whole number of at least 0, got -1"],
  [{ anyOf: [true], type: "string" }, 'at #: anyOf must be without other keywords that check, got "type"'],
  [{ allOf: [true, true] }, "at #: allOf must have one schema, got 2"],
  [{ $ref: "http://x/y" }, 'at #: $ref must begin with #/, a place in this schema, got "http://x/y"'],
  [{ $ref: "#/$defs/toString" }, 'at #: $ref must be of a place that is there, got "#/$defs/toString"'],
  [{ required: "a" }, 'at #/required: must be a list, got "a"'],
  [{ items: [{}] }, "at #/items: must be an object, true or false, got [{}]"],
  [undefined, "must be JSON, got undefined"],
  [false, "must have a text that fits it, got one that none fits"],
  [{ $ref: "#" }, "must have a text that fits it, got one that none fits"],
  [{ anyOf: [{ $ref: "#" }, { $ref: "#/anyOf/0" }] }, "must have a text that fits it, got one that none fits"],
  [
    { type: "object", properties: { a: { $ref: "#" } }, required: ["a"] },
    "must have a text that fits it, got one that none fits",
  ],
  [{ type: "array", minItems: 2, maxItems: 1 }, "must have a text that fits it, got one that none fits"],
  [{ enum: Array.from({ length: 1e6 }, (_, i) => i) }, "must have at most 200000 characters, got 6888900"],
  [
    { anyOf: new Array(60_000).fill({}) },
    "must have at most 20000 schemas in it, got more. Leave out properties or alternatives",
  ],
  [
    JSON.parse(`${'{"items":'.repeat(300)}{}${"}".repeat(300)}`),
    `at #${"/items".repeat(16)}...: must be at most 200 deep`,
  ],
] as [unknown, string][])("a schema that cannot be kept to is refused: %#", (schema, message) => {
  expect(() => jsonMachine(schema)).toThrow(new ShapeError(`json schema: ${message}`));
});

test("a schema or a pattern that is made to take long is refused or quick", () => {
  const chain = Object.fromEntries(Array.from({ length: 3000 }, (_, i) => [`d${i}`, { $ref: `#/$defs/d${i + 1}` }]));
  const twins = { anyOf: [5, 6].map((maxItems) => ({ type: "array", items: { $ref: "#" }, maxItems })) };
  const nested = { type: "string", pattern: "((a{100}){100}){100}" };
  const deep = { type: "string", pattern: "(".repeat(1500) + ")".repeat(1500) };
  expect(() => jsonMachine({ $ref: "#/$defs/d0", $defs: { ...chain, d3000: {} } })).toThrow("must be at most 200 deep");
  expect(() => jsonMachine(nested)).toThrow("must have at most 10000 characters with its quantifiers written out");
  expect(() => jsonMachine(deep)).toThrow("groups must be at most 100 deep");
  expect(() => jsonMachine({ properties: { ["a".repeat(1e5)]: true } })).toThrow(
    "names must have at most 1000 characters",
  );
  expect(() => jsonMachine({ const: JSON.parse("[".repeat(2000) + "]".repeat(2000)) })).toThrow(
    "values must be at most 200 deep",
  );
  const many = Object.fromEntries(Array.from({ length: 3000 }, (_, i) => [`n${i}`, { const: 1 }]));
  const open = { type: "object", properties: many, required: Object.keys(many), additionalProperties: true };
  expect(read(jsonMachine(open), '{"n0":1,"n1":1')).toBe("begun");
  expect(() => read(jsonMachine(twins), "[".repeat(40))).toThrow(
    new ShapeError(
      "constraint: a text must be read in at most 20000 ways at a time, got more. Make alternatives differ earlier, or fewer",
    ),
  );
  expect(read(jsonMachine({ enum: Array.from({ length: 20000 }, (_, i) => `n${i}`) }), '"n19999"')).toBe("whole");
});

/** A schema around `{}` so many times. */
const deep = (around: (inner: unknown) => unknown, depth: number): unknown =>
  depth === 0 ? {} : around(deep(around, depth - 1));

/** How many schemas are looked into while one is compiled. */
function looksInto(schema: unknown): number {
  const keys = vi.spyOn(Object, "keys");
  try {
    jsonMachine(schema);
    return keys.mock.calls.length;
  } finally {
    keys.mockRestore();
  }
}

/** A pointer, a character of it written another way in each. */
const spellings = (pointer: string): string[] =>
  Array.from(pointer, (c, i) =>
    i < 2 || c === "/" ? pointer : `${pointer.slice(0, i)}%${c.charCodeAt(0).toString(16)}${pointer.slice(i + 1)}`,
  );

const referred = (depth: number): unknown => {
  const inner = spellings("#/$defs/inner").map(($ref) => ({ $ref }));
  return { anyOf: inner, $defs: { inner: deep((items) => ({ type: "array", items, prefixItems: inner }), depth) } };
};

test.each<[string, (depth: number) => unknown]>([
  [
    "names that are required and not listed",
    (depth) => deep((inner) => ({ type: "object", required: ["a", "b", "c"], additionalProperties: inner }), depth),
  ],
  [
    "types that are named more than once",
    (depth) => deep((items) => ({ type: new Array(4).fill("array"), items }), depth),
  ],
  ["places that are referred to in several ways", referred],
])("each schema is compiled once: %s", (_, schema) => {
  for (const depth of [5, 28]) {
    const objects = JSON.stringify(schema(depth)).split("{").length - 1;
    expect(looksInto(schema(depth)), `${depth} deep`).toBeLessThanOrEqual(4 * objects);
  }
});

test("names, patterns and pieces have a most", () => {
  const name = (i: number): string => `${i}`.padEnd(1000, "x");
  const named = (count: number, additionalProperties: boolean): unknown => {
    const properties = Object.fromEntries(Array.from({ length: count }, (_, i) => [name(i), true]));
    return { type: "object", properties, additionalProperties };
  };
  expect(read(jsonMachine(named(60, false)), "{}")).toBe("whole");
  const most = "patterns, and names of objects that may have others, must have at most 50000 characters in all";
  expect(() => jsonMachine(named(51, true))).toThrow(new ShapeError(`json schema: at #: ${most}, got 51000`));
  const items = { type: "string", pattern: "a".repeat(4000) };
  expect(() => jsonMachine({ prefixItems: Array.from({ length: 20 }, () => ({ ...items })) })).toThrow(
    new ShapeError(`json schema: at #/prefixItems/12: ${most}, got 52000`),
  );
  const ranged = (i: number): unknown => ({ type: "integer", minimum: 123456789 + i, maximum: 987654321987 + i });
  expect(() => jsonMachine({ prefixItems: Array.from({ length: 2000 }, (_, i) => ranged(i)) })).toThrow(
    new ShapeError(
      "json schema: must come to at most 200000 pieces of a grammar, got more. Leave out properties or alternatives",
    ),
  );
});

describe("states", () => {
  const inText = (pattern: string): TextState => jsonMachine({ type: "string", pattern }).step('"') as TextState;

  test("characters between which a grammar makes no difference lead to one state, found out once", () => {
    const open = inText("^(?:[一-龥]?){2000}龥$");
    const steps = (from: TextState, first: number): Set<TextState | undefined> =>
      new Set(Array.from({ length: 300 }, (_, i) => from.stepCode(first + i)));
    const [next, ...others] = steps(open, 0x4e00);
    expect([next?.isEnd, others]).toEqual([false, []]);
    const { work } = open;
    expect(steps(open, 0x5e00)).toEqual(new Set([next]));
    expect(open.work, "nothing more was looked at").toBe(work);
    expect(steps(next as TextState, 0x4e00).size).toBe(1);
    expect(open.work).toBeLessThan(60_000);
    expect(open.stepCode(0x9fa5), "the last one may end the text").not.toBe(next);
  });

  test("ways that lead to the same lead to one object, which is made once", () => {
    const open = inText("^(?:(?:[aä]|b|[c-e])?){300}!$");
    const states = [..."aäbcde"].map((letter) => open.step(letter));
    expect(new Set(states).size).toBe(1);
    expect(open.step("ab")).toBe(open.step("ea"));
    expect(open.step("a")).not.toBe(open.step("ab"));
    const long = jsonMachine({ type: "string" }).step('"a') as TextState;
    expect(long.step("\\n\\u00e9é")).toBe(long);
  });

  test("what was found out is forgotten after a while, and found out again", () => {
    const seed = freshSeed();
    const random = new Random(seed);
    const pattern = "[ab].{200}$";
    const start = TextState.of(patternGrammar(pattern)) as TextState;
    const first = start.step("b");
    expect(start.step("b")).toBe(first);
    let [state, text] = [start, ""];
    while (start.work < 1_500_000) {
      const letter = "abc"[random.below(3)] as string;
      state = state.step(letter) as TextState;
      text += letter;
      expect(state.isComplete, `${text} (seed ${seed})`).toBe(new RegExp(pattern, "u").test(text));
    }
    expect(text.length).toBeGreaterThan(300);
    expect(start.step("b")).not.toBe(first);
    expect([start.step("b")?.isComplete, start.step(`b${"c".repeat(200)}`)?.isComplete]).toEqual([false, true]);
    expect(start.step("b")).toBe(start.step("b"));
  });
});

import { expect, test } from "vitest";
import { unroll } from "../../src/gpu/unroll.ts";

const squash = (text: string): string => text.replace(/\s+/g, " ").trim();

test("loops of constant length are written out and their arrays become variables", () => {
  const source = `const TN: u32 = 8u;
const TN4: u32 = TN / 4u;
const TM: u32 = 2u;
fn main() {
  var acc: array<array<vec4f, TN4>, TM>;
  for (var i = 0u; i < TM; i++) {
    for (var j = 0u; j < TN4; j++) { acc[i][j] = x[i + 4u * j]; }
  }
}`;
  expect(squash(unroll(source))).toBe(
    squash(`const TN: u32 = 8u;
const TN4: u32 = TN / 4u;
const TM: u32 = 2u;
fn main() {
  var acc_0_0: vec4f;
  var acc_0_1: vec4f;
  var acc_1_0: vec4f;
  var acc_1_1: vec4f;
  { { acc_0_0 = x[0u + 4u * 0u]; } { acc_0_1 = x[0u + 4u * 1u]; } }
  { { acc_1_0 = x[1u + 4u * 0u]; } { acc_1_1 = x[1u + 4u * 1u]; } }
}`),
  );
});

test("loops whose length is not constant stay", () => {
  const source = "fn main() {\n  for (var i = 0u; i < d.n; i++) { y[i] = 0.0; }\n}";
  expect(unroll(source)).toBe(source);
});

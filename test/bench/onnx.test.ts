import { expect, test } from "vitest";
import { encodeModel } from "../../bench/peers/onnx.ts";

/** The fields of a protobuf message in their order: varints as numbers, 4 bytes and lengths as bytes. */
function fields(bytes: Uint8Array): [field: number, value: number | Uint8Array][] {
  const found: [number, number | Uint8Array][] = [];
  let at = 0;
  const varint = (): number => {
    let value = 0;
    for (let shift = 1; ; shift *= 128) {
      const byte = bytes[at++] ?? Number.NaN;
      value += (byte % 128) * shift;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const wire = tag % 8;
    if (wire === 0) found.push([tag >> 3, varint()]);
    else {
      const length = wire === 5 ? 4 : varint();
      found.push([tag >> 3, bytes.subarray(at, at + length)]);
      at += length;
    }
  }
  return found;
}

const bytesOf = (message: Uint8Array, field: number): Uint8Array[] =>
  fields(message).flatMap(([id, value]) => (id === field && typeof value !== "number" ? [value] : []));
const numbersOf = (message: Uint8Array, field: number): number[] =>
  fields(message).flatMap(([id, value]) => (id === field && typeof value === "number" ? [value] : []));
const one = (message: Uint8Array, field: number): Uint8Array => bytesOf(message, field)[0] ?? new Uint8Array();
const textsOf = (message: Uint8Array, field: number): string[] =>
  bytesOf(message, field).map((bytes) => new TextDecoder().decode(bytes));

test("a model of one node is these bytes of onnx.proto", () => {
  const value = { name: "x", shape: [3] };
  const model = encodeModel({ inputs: [value], outputs: [], nodes: [{ op: "Abs", inputs: ["x"], outputs: ["y"] }] });
  const node = [0x0a, 1, 0x78, 0x12, 1, 0x79, 0x22, 3, 0x41, 0x62, 0x73]; // input x, output y, op_type Abs
  const type = [0x0a, 8, 0x08, 1, 0x12, 4, 0x0a, 2, 0x08, 3]; // tensor_type of f32, shape with one dim_value 3
  const input = [0x0a, 1, 0x78, 0x12, type.length, ...type];
  const name = [...new TextEncoder().encode("graph")];
  const graph = [0x0a, node.length, ...node, 0x12, 5, ...name, 0x5a, input.length, ...input];
  expect([...model]).toEqual([0x08, 8, 0x3a, graph.length, ...graph, 0x42, 2, 0x10, 17]);
});

test("sizes past 127, attributes and constants can be read back", () => {
  const model = encodeModel({
    inputs: [{ name: "x", shape: [300, 14336] }],
    outputs: [{ name: "y", shape: [] }],
    scalars: { scale: 2.5 },
    axes: { axis: [1, 0] },
    nodes: [
      { op: "Gemm", inputs: ["x", "w"], outputs: ["y"], attributes: { transB: 1, alpha: Float32Array.of(0.5) } },
      { op: "Add", inputs: ["y", "scale"], outputs: ["z"] },
    ],
  });
  const graph = one(model, 7);
  const [gemm = new Uint8Array(), add = new Uint8Array()] = bytesOf(graph, 1);
  expect([textsOf(gemm, 4), textsOf(gemm, 1), textsOf(gemm, 2)]).toEqual([["Gemm"], ["x", "w"], ["y"]]);
  expect(textsOf(add, 1)).toEqual(["y", "scale"]);
  const [transB = new Uint8Array(), alpha = new Uint8Array()] = bytesOf(gemm, 5);
  expect([textsOf(transB, 1), numbersOf(transB, 3), numbersOf(transB, 20)]).toEqual([["transB"], [1], [2]]);
  expect([textsOf(alpha, 1), numbersOf(alpha, 20)]).toEqual([["alpha"], [1]]);
  expect(new Float32Array(one(alpha, 2).slice().buffer)[0]).toBe(0.5);
  const shape = one(one(one(one(graph, 11), 2), 1), 2);
  expect(bytesOf(shape, 1).flatMap((dim) => numbersOf(dim, 1))).toEqual([300, 14336]);
  const [scale = new Uint8Array(), axis = new Uint8Array()] = bytesOf(graph, 5);
  expect([textsOf(scale, 8), numbersOf(scale, 1), numbersOf(scale, 2)]).toEqual([["scale"], [], [1]]);
  expect(new Float32Array(one(scale, 9).slice().buffer)).toEqual(Float32Array.of(2.5));
  expect([textsOf(axis, 8), numbersOf(axis, 1), numbersOf(axis, 2)]).toEqual([["axis"], [2], [7]]);
  expect(new BigInt64Array(one(axis, 9).slice().buffer)).toEqual(BigInt64Array.of(1n, 0n));
});

/** Writes small ONNX models: the protobuf wire format and the few messages of onnx.proto that a graph of f32 matrices needs. */

export interface OnnxValue {
  readonly name: string;
  readonly shape: readonly number[];
}

export interface OnnxNode {
  readonly op: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  /** Whole numbers, or f32 in a Float32Array of one element. */
  readonly attributes?: Readonly<Record<string, number | Float32Array>>;
}

export interface OnnxGraph {
  readonly inputs: readonly OnnxValue[];
  readonly outputs: readonly OnnxValue[];
  /** f32 constants: scalars, shape []. */
  readonly scalars?: Readonly<Record<string, number>>;
  /** i64 constants of one axis. */
  readonly axes?: Readonly<Record<string, readonly number[]>>;
  readonly nodes: readonly OnnxNode[];
}

const IR_VERSION = 8;
const OPSET = 17;
const FLOAT = 1; // TensorProto.DataType
const INT64 = 7;
const ATTRIBUTE_FLOAT = 1; // AttributeProto.AttributeType
const ATTRIBUTE_INT = 2;

/** A ModelProto. Numbers of fields are those of onnx.proto. */
export function encodeModel({ inputs, outputs, scalars = {}, axes = {}, nodes }: OnnxGraph): Uint8Array<ArrayBuffer> {
  const constants = [
    ...Object.entries(scalars).map(([name, value]) => tensor(name, FLOAT, [], f32(value))),
    ...Object.entries(axes).map(([name, values]) => tensor(name, INT64, [values.length], i64(values))),
  ];
  const graph = [
    ...nodes.flatMap((node) => message(1, encodeNode(node))),
    ...text(2, "graph"),
    ...constants.flatMap((constant) => message(5, constant)),
    ...inputs.flatMap((value) => message(11, valueInfo(value))),
    ...outputs.flatMap((value) => message(12, valueInfo(value))),
  ];
  return Uint8Array.from([...integer(1, IR_VERSION), ...message(7, graph), ...message(8, integer(2, OPSET))]);
}

function encodeNode({ op, inputs, outputs, attributes = {} }: OnnxNode): number[] {
  const encoded = Object.entries(attributes).flatMap(([name, value]) =>
    message(5, [
      ...text(1, name),
      ...(typeof value === "number"
        ? [...integer(3, value), ...integer(20, ATTRIBUTE_INT)]
        : [...varint(tag(2, WIRE_32)), ...f32(value[0] ?? 0), ...integer(20, ATTRIBUTE_FLOAT)]),
    ]),
  );
  return [
    ...inputs.flatMap((name) => text(1, name)),
    ...outputs.flatMap((name) => text(2, name)),
    ...text(4, op),
    ...encoded,
  ];
}

/** ValueInfoProto { name, type: TypeProto { tensor_type: { elem_type, shape: { dim: { dim_value } } } } } */
function valueInfo({ name, shape }: OnnxValue): number[] {
  const dims = shape.flatMap((size) => message(1, integer(1, size)));
  return [...text(1, name), ...message(2, message(1, [...integer(1, FLOAT), ...message(2, dims)]))];
}

/** TensorProto { dims, data_type, name, raw_data } */
function tensor(name: string, type: number, shape: readonly number[], raw: readonly number[]): number[] {
  return [...shape.flatMap((size) => integer(1, size)), ...integer(2, type), ...text(8, name), ...message(9, raw)];
}

const f32 = (value: number): number[] => [...new Uint8Array(Float32Array.of(value).buffer)];
const i64 = (values: readonly number[]): number[] => [...new Uint8Array(BigInt64Array.from(values, BigInt).buffer)];

// Protobuf's encoding: a field is its tag and then a varint, 4 bytes, or a length and that many bytes.
const WIRE_VARINT = 0;
const WIRE_BYTES = 2;
const WIRE_32 = 5;
const tag = (field: number, wire: number): number => field * 8 + wire;

function varint(value: number): number[] {
  const bytes: number[] = [];
  for (let rest = value; ; rest = Math.floor(rest / 128)) {
    if (rest < 128) return [...bytes, rest];
    bytes.push((rest % 128) + 128);
  }
}

const integer = (field: number, value: number): number[] => [...varint(tag(field, WIRE_VARINT)), ...varint(value)];
const message = (field: number, bytes: readonly number[]): number[] => [
  ...varint(tag(field, WIRE_BYTES)),
  ...varint(bytes.length),
  ...bytes,
];
const text = (field: number, value: string): number[] => message(field, [...new TextEncoder().encode(value)]);

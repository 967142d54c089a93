/** Metrics as a TensorBoard event file: records of TFRecord's framing around `tensorflow.Event` messages of protocol buffers. */

/** A point of some curves, by their names. */
export interface ScalarEvent {
  readonly step: number;
  /** Seconds since 1970. */
  readonly time: number;
  readonly values: Readonly<Record<string, number>>;
}

/** "events.out.tfevents.1732600000.lowrank": TensorBoard looks for the part before the time. */
export const eventFileName = (timeSeconds: number): string =>
  `events.out.tfevents.${String(Math.floor(timeSeconds)).padStart(10, "0")}.lowrank`;

/** What an event file begins with. */
export const eventFileHeader = (timeSeconds: number): Uint8Array =>
  framed([...double(1, timeSeconds), ...text(3, "brain.Event:2")]);

/** One event, to be appended to the file. */
export function scalarEvent({ step, time, values }: ScalarEvent): Uint8Array {
  const summary = Object.entries(values).flatMap(([tag, value]) => message(1, [...text(1, tag), ...float(2, value)]));
  return framed([...double(1, time), ...integer(2, step), ...message(5, summary)]);
}

/** Length, its checksum, the data, its checksum. */
function framed(data: readonly number[]): Uint8Array {
  const record = new Uint8Array(data.length + 16);
  const words = new DataView(record.buffer);
  words.setBigUint64(0, BigInt(data.length), true);
  words.setUint32(8, masked(crc32c(record.subarray(0, 8))), true);
  record.set(data, 12);
  words.setUint32(12 + data.length, masked(crc32c(record.subarray(12, 12 + data.length))), true);
  return record;
}

/** Rotated and shifted, so that a checksum of data that holds checksums is none of them. */
const masked = (crc: number): number => (((crc >>> 15) | (crc << 17)) + 0xa282ead8) >>> 0;

/** CRC-32C (Castagnoli), reflected. */
export function crc32c(bytes: Uint8Array): number {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0x82f63b78 : 0);
  }
  return ~crc >>> 0;
}

// Fields of a protocol buffer: the number of the field and its kind, then the value.

function varint(value: number): number[] {
  const bytes: number[] = [];
  let rest = value;
  for (; rest >= 0x80; rest = Math.floor(rest / 0x80)) bytes.push((rest % 0x80) + 0x80);
  return [...bytes, rest];
}

const integer = (field: number, value: number): number[] => [8 * field, ...varint(value)];
const message = (field: number, bytes: readonly number[]): number[] => [
  8 * field + 2,
  ...varint(bytes.length),
  ...bytes,
];
const text = (field: number, value: string): number[] => message(field, [...new TextEncoder().encode(value)]);
const double = (field: number, value: number): number[] => [8 * field + 1, ...bytesOf(new Float64Array([value]))];
const float = (field: number, value: number): number[] => [8 * field + 5, ...bytesOf(new Float32Array([value]))];

/** Little-endian, as every machine with WebGPU is. */
const bytesOf = (values: Float64Array | Float32Array): Uint8Array => new Uint8Array(values.buffer);

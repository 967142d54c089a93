import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { crc32c, eventFileHeader, eventFileName, type ScalarEvent, scalarEvent } from "../../src/train/tensorboard.ts";

const golden = JSON.parse(readFileSync("test/golden/tensorboard.json", "utf8")) as {
  time: number;
  events: ScalarEvent[];
  hex: string;
};

test("an event file is byte for byte what TensorBoard's own writer makes", () => {
  const bytes = [eventFileHeader(golden.time), ...golden.events.map(scalarEvent)];
  expect(Buffer.concat(bytes).toString("hex")).toBe(golden.hex);
});

test("the checksum is CRC-32C", () => {
  expect(crc32c(new TextEncoder().encode("123456789"))).toBe(0xe3069283);
});

test("the name of the file is one that TensorBoard looks for", () => {
  expect(eventFileName(1732600000.9)).toBe("events.out.tfevents.1732600000.lowrank");
});

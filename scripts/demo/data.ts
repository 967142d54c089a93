/** Writes the demo's two fine-tuning sets to demo/data/: pirate tales and letters, each with held-out rows. */
import { mkdirSync, writeFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { letters, pirateTales, type Row } from "./language.ts";

const TRAIN_ROWS = 160;
const VALID_ROWS = 40;

const jsonl = (rows: readonly Row[]): string => rows.map((row) => `${JSON.stringify(row)}\n`).join("");

/** The files of demo/data/ by name. The same on every machine. */
export function dataFiles(): Record<string, string> {
  return {
    "pirate-train.jsonl": jsonl(pirateTales(11, TRAIN_ROWS)),
    "pirate-valid.jsonl": jsonl(pirateTales(12, VALID_ROWS, "valid")),
    "letter-train.jsonl": jsonl(letters(21, TRAIN_ROWS)),
    "letter-valid.jsonl": jsonl(letters(22, VALID_ROWS, "valid")),
  };
}

if (import.meta.url === pathToFileURL(process.argv[1] ?? "").href) {
  const directory = new URL("../../demo/data/", import.meta.url);
  mkdirSync(directory, { recursive: true });
  for (const [name, text] of Object.entries(dataFiles())) writeFileSync(new URL(name, directory), text);
}

// Snapshots survive a kill and a loss of power at every single operation, and damage of every kind is found.
import { mkdtemp, readdir, readFile, rm, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { disk as realDisk } from "../../src/io/files.ts";
import { readText } from "../../src/io/json.ts";
import {
  type Disk,
  newestSnapshot,
  removeLeftovers,
  type Snapshot,
  snapshotSteps,
  writeSnapshot,
} from "../../src/io/snapshots.ts";
import { Crash, CrashingDisk } from "./crashing-disk.ts";

const HOME = "home";

async function* pieces(...parts: string[]): AsyncGenerator<Uint8Array> {
  for (const part of parts) yield new TextEncoder().encode(part);
}

const save = (disk: Disk, step: number, keep = 2, home = HOME): Promise<void> =>
  writeSnapshot(disk, home, step, { weights: pieces("weights ", `of ${step}`), config: `${step}` }, keep);

const read = async (snapshot: Snapshot | undefined): Promise<unknown> =>
  snapshot && [
    snapshot.step,
    await readText(snapshot.directory, "weights"),
    await readText(snapshot.directory, "config"),
  ];

const newest = async (disk: Disk, warnings: string[] = [], home = HOME): Promise<unknown> =>
  read(await newestSnapshot(disk, home, (warning) => warnings.push(warning)));

const of = (step: number): unknown => [step, `weights of ${step}`, `${step}`];

test("the newest snapshots stay, and the newest is read", async () => {
  const disk = new CrashingDisk(HOME);
  expect(await newest(disk)).toBeUndefined();
  for (const step of [2, 10, 1234567, 1234568]) await save(disk, step, 3);
  expect(await snapshotSteps(disk, HOME)).toEqual([1234568, 1234567, 10]);
  expect(await newest(disk)).toEqual(of(1234568));
});

test("writing a step again puts it in the place of the old one and drops later ones", async () => {
  const disk = new CrashingDisk(HOME);
  for (const step of [1, 2, 3, 4]) await save(disk, step, 4);
  await save(disk, 3, 4);
  expect(await snapshotSteps(disk, HOME)).toEqual([3, 2, 1]);
  expect(await newest(disk)).toEqual(of(3));
});

/** How many operations it takes to save step 3 where 1 and 2 are. */
async function operationsOfSave(): Promise<number> {
  const disk = new CrashingDisk(HOME);
  await save(disk, 1);
  await save(disk, 2);
  const before = disk.operations;
  await save(disk, 3);
  return disk.operations - before;
}

describe.each([
  ["a kill", (disk: CrashingDisk) => disk.restart()],
  ["a loss of power", (disk: CrashingDisk) => disk.restartWithoutPower()],
])("after %s", (_, restart) => {
  test("at any operation of a save the snapshot before is whole, or the new one, and all goes on", async () => {
    const operations = await operationsOfSave();
    expect(operations).toBeGreaterThan(15);
    for (let n = 1; n <= operations; n++) {
      const disk = new CrashingDisk(HOME);
      await save(disk, 1);
      await save(disk, 2);
      disk.crashAt(n);
      await expect(save(disk, 3)).rejects.toThrow(Crash);
      restart(disk);
      const warnings: string[] = [];
      const found = await newest(disk, warnings);
      expect([of(2), of(3)], `operation ${n}`).toContainEqual(found);
      expect(warnings, `operation ${n}`).toEqual([]);
      await removeLeftovers(disk, HOME);
      await save(disk, 3);
      expect(await newest(disk)).toEqual(of(3));
      expect(await disk.list(`${HOME}/checkpoints`), `operation ${n}`).not.toContainEqual(expect.stringMatching("tmp"));
    }
  });

  test("behind a finished save the snapshot is there", async () => {
    const disk = new CrashingDisk(HOME);
    await save(disk, 1);
    restart(disk);
    expect(await newest(disk)).toEqual(of(1));
  });

  test("at any operation of the clean-up nothing whole is lost", async () => {
    for (let n = 1; n < 10; n++) {
      const disk = new CrashingDisk(HOME);
      await save(disk, 1);
      disk.crashAt(10);
      await save(disk, 2).catch(() => {});
      restart(disk);
      disk.crashAt(n);
      await removeLeftovers(disk, HOME).catch(() => {});
      restart(disk);
      expect(await newest(disk)).toEqual(of(1));
    }
  });
});

test("damage of any byte of any file of the newest snapshot, or a lost file, falls back to the one before and says so", async () => {
  const disk = new CrashingDisk(HOME);
  await save(disk, 1);
  await save(disk, 2);
  const files = disk.files(`${HOME}/checkpoints/step-000002`);
  expect(files).toHaveLength(3);
  for (const file of files) {
    let size = 0;
    disk.damage(file, (bytes) => {
      size = bytes.length;
      return bytes.slice();
    });
    for (let at = 0; at < size; at++) {
      const flip = (): void => disk.damage(file, (bytes) => bytes.map((byte, i) => (i === at ? byte ^ 1 : byte)));
      flip();
      const warnings: string[] = [];
      expect(await newest(disk, warnings), `${file} byte ${at}`).toEqual(of(1));
      expect(warnings).toHaveLength(1);
      flip();
    }
  }
  expect(await newest(disk)).toEqual(of(2));
});

describe("on this machine's disk", () => {
  const damaged = async (damage: (path: string) => Promise<void>): Promise<[unknown, string[]]> => {
    const home = await mkdtemp(join(tmpdir(), "lowrank-snapshots-"));
    try {
      await save(realDisk, 1, 2, home);
      await save(realDisk, 2, 2, home);
      expect(await newest(realDisk, [], home)).toEqual(of(2));
      await damage(join(home, "checkpoints", "step-000002"));
      const warnings: string[] = [];
      return [await newest(realDisk, warnings, home), warnings.map((text) => text.replaceAll(home, "home"))];
    } finally {
      await rm(home, { recursive: true });
    }
  };
  const PATH = "home/checkpoints/step-000002";

  test.each<[what: string, damage: (path: string) => Promise<void>, warning: string]>([
    ["a truncated file", (path) => truncate(join(path, "weights"), 3), "weights: must have 12 bytes, got 3"],
    ["a lost file", (path) => rm(join(path, "config")), "config: must be there, got nothing"],
    [
      "a changed file",
      (path) => writeFile(join(path, "config"), "3"),
      "config: must have the SHA-256 of its manifest, got another",
    ],
    ["a lost manifest", (path) => rm(join(path, "manifest.json")), "manifest.json: must be there, got nothing"],
    [
      "a manifest of another step",
      async (path) => {
        const manifest = await readFile(join(path, "manifest.json"), "utf8");
        await writeFile(join(path, "manifest.json"), manifest.replace('"step": 2', '"step": 3'));
      },
      "manifest.json: must be of format 1 and step 2, got 1 and 3",
    ],
  ])("%s falls back to the snapshot before, in these words", async (_, damage, warning) => {
    expect(await damaged(damage)).toEqual([of(1), [`${PATH}/${warning}`]]);
  });

  test("leftovers of writers that were cut off go, and nothing else", async () => {
    const home = await mkdtemp(join(tmpdir(), "lowrank-snapshots-"));
    await save(realDisk, 1, 2, home);
    for (const name of [`adapter_model.safetensors.${crypto.randomUUID()}.tmp`, "mine.tmp", "notes.txt"])
      await writeFile(join(home, name), "");
    await realDisk.makeDirectory(join(home, "checkpoints", "step-000002.tmp"));
    await removeLeftovers(realDisk, home);
    expect((await readdir(home)).sort()).toEqual(["checkpoints", "mine.tmp", "notes.txt"]);
    expect(await readdir(join(home, "checkpoints"))).toEqual(["step-000001"]);
    await rm(home, { recursive: true });
  });
});

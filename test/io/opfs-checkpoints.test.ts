// Two slots in OPFS survive a tab that is closed at any single change, and damage of every kind is found.
import { afterEach, beforeAll, beforeEach, describe, expect, test, vi } from "vitest";
import { listCheckpoints, newestCheckpoint, removeCheckpoints, writeCheckpoint } from "../../src/browser.ts";
import { checkpointContent, readCheckpoint, type SavedCheckpoint, startAsIn } from "../../src/checkpoint-content.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { readText } from "../../src/io/json.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { initLora } from "../../src/lora/init.ts";
import { loadModel } from "../../src/models/load.ts";
import { readAll } from "../../src/tensor/tensor.ts";
import { train } from "../../src/train/trainer.ts";
import { testGpu } from "../harness.ts";
import { Crash, type MemoryFile, MemoryOpfs } from "./memory-opfs.ts";

const RUN = "my run";

async function* pieces(...parts: string[]): AsyncGenerator<Uint8Array> {
  for (const part of parts) yield new TextEncoder().encode(part);
}

const save = (step: number, run = RUN): Promise<void> =>
  writeCheckpoint(run, {
    step,
    files: { weights: pieces("weights ", `of ${step}`), "run.json": `${step}`, none: pieces() },
  });

const of = (step: number): unknown => [step, `weights of ${step}`, `${step}`, ""];

async function newest(warnings: string[] = [], run = RUN): Promise<unknown> {
  const { step, directory } = await newestCheckpoint(run, (warning) => warnings.push(warning));
  const texts = ["weights", "run.json", "none"].map((file) => readText(directory, file));
  return [step, ...(await Promise.all(texts))];
}

let opfs: MemoryOpfs;
let gpu: Gpu;
beforeAll(async () => {
  gpu = await testGpu();
});
const filesOf = (slot: number): MemoryFile[] => opfs.files(["lowrank", "runs", "my%20run", `slot-${slot}`]);

afterEach(() => vi.unstubAllGlobals());

describe.each([
  ["a page", false],
  ["a worker", true],
])("in %s", (_, isWorker) => {
  beforeEach(() => {
    opfs = new MemoryOpfs(isWorker);
    opfs.install();
  });

  test("the newest checkpoint is read, and two are kept", async () => {
    for (const step of [2, 10, 1234567, 5]) {
      await save(step);
      expect(await newest()).toEqual(of(step));
    }
    expect([filesOf(0), filesOf(1)].map((files) => files.map(({ name }) => name))).toEqual(
      new Array(2).fill(["weights", "run.json", "none", "manifest.json"]),
    );
    for (const file of filesOf(1)) file.bytes = new Uint8Array();
    expect(await newest()).toEqual(of(1234567));
  });

  test("cut off at any change of a save the checkpoint before is whole, or the new one, and the next saves go on", async () => {
    for (const steps of [[], [1], [1, 2], [1, 2, 3]]) {
      let n = 0;
      for (let isWhole = false; !isWhole; ) {
        opfs = new MemoryOpfs(isWorker);
        opfs.install();
        for (const step of steps) await save(step);
        opfs.crashAt(++n);
        isWhole = await save(4).then(
          () => true,
          (error) => {
            expect(error).toBeInstanceOf(Crash);
            return false;
          },
        );
        opfs.restart();
        const last = steps.at(-1);
        const none = expect.stringMatching(/^my run: must have a checkpoint/);
        const before = last === undefined ? none : of(last);
        const found = await newest().catch((error: Error) => error.message);
        expect(isWhole ? [of(4)] : [before, of(4)], `change ${n}`).toContainEqual(found);
        for (const step of [5, 6]) {
          await save(step);
          const warnings: string[] = [];
          expect(await newest(warnings)).toEqual(of(step));
          expect(warnings).toEqual([]);
        }
      }
      expect(n, "changes of a save").toBeGreaterThan(10);
    }
  });

  test("a save that was cut off is told of where the checkpoint before is read", async () => {
    await save(1);
    await save(2);
    opfs.crashAt(8);
    await expect(save(3)).rejects.toThrow(Crash);
    opfs.restart();
    const warnings: string[] = [];
    expect(await newest(warnings)).toEqual(of(2));
    expect(warnings).toEqual(["my run/slot-0/manifest.json: must be there, got nothing"]);
  });

  test("a changed byte, a lost end or a lost file of the newest falls back to the one before and says so; both: a clear error", async () => {
    await save(1);
    await save(2);
    const files = filesOf(1);
    expect(files).toHaveLength(4);
    for (const file of files) {
      const { bytes } = file;
      const damages = Array.from(bytes, (_byte, at) => [
        bytes.map((byte, i) => (i === at ? byte ^ 1 : byte)),
        bytes.slice(0, at),
        new Uint8Array(bytes.length).fill(0, at),
      ]).flat();
      for (const [i, damaged] of damages.entries()) {
        file.bytes = damaged;
        const warnings: string[] = [];
        expect(await newest(warnings), `${file.name}, damage ${i}`).toEqual(of(1));
        expect(warnings, `${file.name}, damage ${i}`).toHaveLength(1);
      }
      file.bytes = bytes;
    }
    expect(await newest()).toEqual(of(2));
    for (const slot of [0, 1]) (filesOf(slot)[0] as MemoryFile).bytes = new TextEncoder().encode(`weights 0f ${slot}`);
    await expect(newest()).rejects.toThrow(
      new FormatError(
        "my run: must have a checkpoint that is whole, got 2 that are not. my run/slot-1/weights: must have the SHA-256 of its manifest, got another",
      ),
    );
    await save(7);
    expect(await newest()).toEqual(of(7));
  });

  test("an older slot that is damaged is no reason to warn, and is the one that is written over", async () => {
    await save(1);
    await save(2);
    (filesOf(0)[0] as MemoryFile).bytes = new Uint8Array();
    const warnings: string[] = [];
    expect(await newest(warnings)).toEqual(of(2));
    expect(warnings).toEqual([]);
    await save(3);
    (filesOf(0)[0] as MemoryFile).bytes = new Uint8Array();
    await save(4);
    expect(filesOf(0)[1]?.bytes).toEqual(new TextEncoder().encode("4"));
    expect(filesOf(1)[1]?.bytes).toEqual(new TextEncoder().encode("2"));
  });

  test("without room for it the save says so and the checkpoint before stays", async () => {
    await save(1);
    for (const [room, piece] of [
      [10, 4],
      [0, 8],
    ] as const) {
      opfs.room = room;
      await expect(save(2)).rejects.toThrow(
        new FormatError(
          `my run/slot-1/weights: ${piece} bytes of room must be left in the browser's storage of this site, got less. Remove other models (listCached, clearCached), free some space on the disk, or leave the private window`,
        ),
      );
      expect(await newest()).toEqual(of(1));
    }
  });

  test("runs are apart, listed and removed by their names", async () => {
    await save(1);
    await save(5, "ünlike others%");
    expect(await newest([], "ünlike others%")).toEqual(of(5));
    expect((await listCheckpoints()).map(({ run }) => run)).toEqual([RUN, "ünlike others%"]);
    expect((await listCheckpoints())[0]?.sizeBytes).toBe(filesOf(0).reduce((sum, { bytes }) => sum + bytes.length, 0));
    await removeCheckpoints(RUN);
    await removeCheckpoints("never begun");
    expect((await listCheckpoints()).map(({ run }) => run)).toEqual(["ünlike others%"]);
    await expect(newest()).rejects.toThrow(new FormatError("my run: must have a checkpoint to go on from, got none"));
  });

  test("a run that began with a part of the base goes on from there in a fresh adapter, bit for bit", async () => {
    const rows = [
      [1, 2, 3, 4],
      [5, 6, 7],
      [8, 9],
    ].map((ids) => ({ inputIds: ids, labels: ids }));
    const notes = { settings: { r: 2, init: "pissa" }, madeBy: { lowrank: "test" } };
    const run = async (from?: SavedCheckpoint): Promise<Float32Array[]> => {
      const model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
      const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: ["q_proj"], dropout: 0.1 }, 5);
      if (from) await startAsIn(from, adapter);
      else await initLora(adapter, "pissa", 5);
      const training = train({
        ...{ model, adapter, parameters: adapter.parameters, rows, steps: 4, batchSize: 2, learningRate: 1e-2 },
        ...{ shuffleSeed: 1, from: from?.state },
        checkpoint: { every: 3, save: (s) => writeCheckpoint(RUN, checkpointContent(adapter, "org/base", s, notes)) },
      });
      const steps: number[] = [];
      for await (const { step } of training) steps.push(step);
      expect(steps).toEqual(from ? [4] : [1, 2, 3, 4]);
      const values = await readAll(adapter.parameters);
      adapter.detach();
      model.destroy();
      return values;
    };
    const whole = await run();
    const saved = await readCheckpoint(await newestCheckpoint(RUN, () => {}));
    expect([saved.step, saved.settings, saved.madeBy]).toEqual([3, notes.settings, notes.madeBy]);
    expect(await run(saved)).toEqual(whole);
  });

  test("a run that is no name is refused", async () => {
    for (const run of ["", "..", "a/b"])
      await expect(save(1, run)).rejects.toThrow(
        new FormatError(`checkpoint: the name of a run must be one part of a path, got ${JSON.stringify(run)}`),
      );
  });
});

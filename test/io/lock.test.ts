import { existsSync } from "node:fs";
import { mkdtemp, readdir, rm, stat, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import { withLock } from "../../src/io/lock.ts";

let dir = "";
let path = "";
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "lowrank-lock-"));
  path = join(dir, "lock");
});
afterEach(() => rm(dir, { recursive: true, force: true }));

test("one runs after the other, and the file is gone after both", async () => {
  const order: string[] = [];
  const run = (name: string): Promise<void> =>
    withLock(path, async () => {
      order.push(`${name} begins`);
      await new Promise((resolve) => setTimeout(resolve, 20));
      order.push(`${name} ends`);
    });
  await Promise.all([run("one"), run("two"), run("three")]);
  for (let i = 0; i < 6; i += 2) expect(order[i + 1]).toBe(order[i]?.replace("begins", "ends"));
  expect(await readdir(dir)).toEqual([]);
});

test("the result is passed on, an error too, and then the lock is free", async () => {
  expect(await withLock(path, async () => 7)).toBe(7);
  const failure = new Error("failed");
  await expect(withLock(path, () => Promise.reject(failure))).rejects.toBe(failure);
  expect(existsSync(path)).toBe(false);
});

test("a lock that is held is touched again and again", async () => {
  await withLock(path, async () => {
    const times = new Set<number>();
    while (times.size < 3) {
      times.add((await stat(path)).mtimeMs);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  });
});

test("one that nobody touches is taken over", async () => {
  await writeFile(path, "");
  expect(await withLock(path, async () => "mine")).toBe("mine");
});

test("who waits can be told to stop, and leaves the lock to its holder", async () => {
  const reason = new Error("enough");
  await withLock(path, async () => {
    const stop = new AbortController();
    const waiting = withLock(path, async () => "never", stop.signal);
    stop.abort(reason);
    await expect(waiting).rejects.toBe(reason);
    expect(existsSync(path)).toBe(true);
  });
});

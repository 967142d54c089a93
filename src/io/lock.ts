/** One process at a time, by a file: Node has no other lock. */
import { open, rm, stat, utimes } from "node:fs/promises";
import { setTimeout as pause } from "node:timers/promises";

const BEAT_MS = 500;
/** A holder that was killed leaves its file, which nobody touches any more. */
const ABANDONED_MS = 5000;
const LOOK_MS = 100;

/**
 * Runs `action` while no other process that asks for the same path does. The file at `path` is touched twice a second while
 * it is held; one that keeps its time for five seconds is taken over, so a holder that was stopped for so long shares the lock:
 * what it guards must bear that. Throws `signal`'s reason when aborted while waiting.
 */
export async function withLock<T>(path: string, action: () => Promise<T>, signal?: AbortSignal): Promise<T> {
  let [time, since] = [Number.NaN, 0];
  while (!(await created(path))) {
    const found = (await stat(path).catch(() => undefined))?.mtimeMs;
    if (found !== time) [time, since] = [found ?? Number.NaN, performance.now()];
    else if (performance.now() - since > ABANDONED_MS) await rm(path, { force: true });
    await pause(LOOK_MS, undefined, { signal }).catch(() => signal?.throwIfAborted());
  }
  const beat = setInterval(() => void utimes(path, new Date(), new Date()).catch(() => undefined), BEAT_MS);
  try {
    return await action();
  } finally {
    clearInterval(beat);
    await rm(path, { force: true });
  }
}

/** Whether this call made the file. */
async function created(path: string): Promise<boolean> {
  try {
    await (await open(path, "wx")).close();
    return true;
  } catch (error) {
    if (error instanceof Error && "code" in error && error.code === "EEXIST") return false;
    throw error;
  }
}

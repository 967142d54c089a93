/** A device that has no room when it is asked for some: what is left then. */
import { expect, vi } from "vitest";
import { GpuError } from "../src/gpu/errors.ts";
import type { Gpu } from "../src/gpu/gpu.ts";

/**
 * Runs `act` with its first allocation refused, then its second and so on, until one run is refused nothing, whose result it gives. Each that was
 * refused must throw that very error and leave as many buffers as there were; `check` looks at what else must be as before.
 */
export async function refusing<T>(
  gpu: Gpu,
  act: () => T | Promise<T>,
  check: () => void | Promise<void> = () => {},
): Promise<T> {
  const allocate = gpu.allocate.bind(gpu);
  const live = () => ({ buffers: gpu.counters().buffersLive, bytes: gpu.counters().bytesLive });
  for (let refused = 0; ; refused++) {
    const before = live();
    const refusal = new GpuError(`no room for allocation ${refused}`);
    let count = 0;
    const spy = vi.spyOn(gpu, "allocate").mockImplementation((sizeBytes, label) => {
      if (count++ === refused) throw refusal;
      return allocate(sizeBytes, label);
    });
    let error: unknown;
    let result: T | undefined;
    try {
      result = await act();
    } catch (thrown) {
      error = thrown;
    } finally {
      spy.mockRestore();
    }
    if (count <= refused) {
      expect(error, "nothing was refused").toBeUndefined();
      expect(refused, "refused in all").toBeGreaterThan(0);
      return result as T;
    }
    expect(error, `allocation ${refused}`).toBe(refusal);
    expect(live(), `after allocation ${refused} was refused`).toEqual(before);
    await check();
  }
}

/**
 * Keeps Dawn in Node from taking a core while it waits.
 *
 * While any promise of Dawn's is pending it polls from `setImmediate`, without a pause. On a software adapter that core is
 * half of a small machine: a product of matrices ran 1.6 times faster with the pause below. Only Dawn's polls are touched:
 * they are the native functions among the callbacks. Short waits stay short, for the first polls of a wait are not paused.
 */
export function pauseDawnPolling(): void {
  if (installed) return;
  installed = true;
  const immediate = globalThis.setImmediate;
  const isNative = (f: unknown): boolean => Function.prototype.toString.call(f).includes("[native code]");
  let polls = 0;
  let last = 0;
  const paused = (f: (...args: unknown[]) => void, ...args: unknown[]): unknown => {
    if (!isNative(f)) return immediate(f, ...args);
    const now = performance.now();
    if (now - last > 5 * PAUSE_MS) polls = 0; // a new wait
    last = now;
    return ++polls <= EAGER_POLLS ? immediate(f, ...args) : setTimeout(f, PAUSE_MS, ...args);
  };
  globalThis.setImmediate = Object.assign(paused, immediate) as typeof setImmediate;
}

const EAGER_POLLS = 200;
const PAUSE_MS = 1;
let installed = false;

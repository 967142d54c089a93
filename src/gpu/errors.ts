/** This machine cannot do what was asked: no adapter, out of memory, device lost, a kernel it refuses. */
export class GpuError extends Error {
  override readonly name = "GpuError";
}

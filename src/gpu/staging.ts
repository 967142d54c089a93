/** What of several buffers is read back by which. */

/** Bytes of a buffer that is read back from, so that any device can have it. */
export const MOST_STAGED: number = 2 ** 28;

interface StagedPiece {
  /** Which of the sources, and from where in it. */
  readonly source: number;
  readonly at: number;
  /** Where it is among what is read back. */
  readonly from: number;
  readonly sizeBytes: number;
}

/** Sources of these sizes, one behind the other in buffers of at most so many bytes, a multiple of 4. There is at least one. */
export function stagedPieces(
  sizes: readonly number[],
  most: number,
): { readonly pieces: readonly StagedPiece[]; readonly sizeBytes: number }[] {
  let open = { pieces: [] as StagedPiece[], sizeBytes: 0 };
  const all = [open];
  for (const [source, size] of sizes.entries())
    for (let at = 0; at < size; ) {
      if (open.sizeBytes === most) {
        open = { pieces: [], sizeBytes: 0 };
        all.push(open);
      }
      const sizeBytes = Math.min(size - at, most - open.sizeBytes);
      open.pieces.push({ source, at, from: open.sizeBytes, sizeBytes });
      open.sizeBytes += Math.ceil(sizeBytes / 4) * 4;
      at += sizeBytes;
    }
  return all.map(({ pieces, sizeBytes }) => ({ pieces, sizeBytes: Math.max(4, sizeBytes) }));
}

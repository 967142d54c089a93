/** A bad file: missing, cut short, against its format, or not to be written. The message names the file. */
export class FormatError extends Error {
  override readonly name = "FormatError";
}

/** No answer from a server: what was kept of it may do. */
export class UnreachableError extends FormatError {}

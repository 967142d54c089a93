/** A bad file: missing, cut short, against its format, or not to be written. The message names the file. */
export class FormatError extends Error {
  override readonly name = "FormatError";
}

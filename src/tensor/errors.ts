/** The caller's mistake: shapes that do not fit, a setting out of range, a module that does not exist. */
export class ShapeError extends Error {
  override readonly name = "ShapeError";
}

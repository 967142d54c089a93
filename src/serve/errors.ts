/** Too many requests wait already: the same one may do later. */
export class QueueFull extends Error {
  override readonly name = "QueueFull";
}

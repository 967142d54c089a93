/** The body of a request: few bytes, in time, UTF-8, JSON of one object without surprises. */
import { FormatError } from "../../io/errors.ts";
import { parseRecord, utf8 } from "../../io/json.ts";
import { ApiError } from "./errors.ts";
import { Fields } from "./fields.ts";

export interface BodyLimits {
  readonly bodyBytes: number;
  /** How long a body may take to arrive. */
  readonly bodyMs: number;
}

/** Objects and lists in one another. A request has a handful. */
const DEEPEST = 32;

/** Throws an ApiError naming what is wrong. */
export async function readFields(request: Request, limits: BodyLimits): Promise<Fields> {
  const type = (request.headers.get("content-type") ?? "").split(";")[0]?.trim().toLowerCase();
  // A page elsewhere may send forms and plain text without asking first, but not this.
  if (type !== "application/json")
    throw new ApiError(415, `the body must be application/json, got ${type || "no type"}`);
  const encoding = request.headers.get("content-encoding") ?? "identity";
  if (encoding !== "identity") throw new ApiError(415, "the body must be sent as it is, got a Content-Encoding");
  try {
    const text = utf8(await readBytes(request, limits), "the body");
    demandShallow(text);
    return new Fields(parseRecord(text, "the body"));
  } catch (error) {
    throw error instanceof FormatError ? new ApiError(400, error.message.replace("the body: ", "the body ")) : error;
  }
}

/** Counts what comes, whatever the headers say. */
async function readBytes(request: Request, { bodyBytes, bodyMs }: BodyLimits): Promise<Uint8Array> {
  const headers = { Connection: "close" };
  const tooLarge = new ApiError(413, `the body must be at most ${bodyBytes} bytes, got more`, { headers });
  if (Number(request.headers.get("content-length")) > bodyBytes) throw tooLarge;
  const reader = request.body?.getReader();
  if (!reader) return new Uint8Array();
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    const error = new ApiError(408, `the body must be there within ${bodyMs / 1000} seconds, got a part`, { headers });
    timer = setTimeout(() => reject(error), bodyMs);
  });
  const pieces: Uint8Array[] = [];
  let size = 0;
  try {
    for (;;) {
      const { done, value } = await Promise.race([reader.read(), late]);
      if (done) break;
      size += value.byteLength;
      if (size > bodyBytes) throw tooLarge;
      pieces.push(value);
    }
  } catch (error) {
    void reader.cancel().catch(() => undefined);
    throw error instanceof ApiError ? error : new ApiError(400, "the body must arrive whole, got a part", { headers });
  } finally {
    clearTimeout(timer);
  }
  const bytes = new Uint8Array(size);
  let at = 0;
  for (const piece of pieces) {
    bytes.set(piece, at);
    at += piece.byteLength;
  }
  return bytes;
}

/** What reads values later calls itself for what is inside of them. */
function demandShallow(json: string): void {
  let [depth, isText] = [0, false];
  for (let i = 0; i < json.length; i++) {
    const c = json[i];
    if (c === '"') isText = !isText;
    else if (isText) i += c === "\\" ? 1 : 0;
    else if (c === "{" || c === "[") depth++;
    else if (c === "}" || c === "]") depth--;
    if (depth > DEEPEST)
      throw new ApiError(400, `the body must be at most ${DEEPEST} objects and lists deep, got more`);
  }
}

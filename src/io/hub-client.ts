/** Questions to a Hugging Face Hub: which commit, which files, their bytes; with retries, and refusals in plain words. Runs anywhere. */
import { type ByteSource, checkRange, isFileName } from "./bytes.ts";
import { FormatError, UnreachableError } from "./errors.ts";
import { excerpt, isObject, type JsonObject } from "./json.ts";

/** A model on a Hub. */
export interface HubModel {
  /** `org/name` */
  readonly id: string;
  readonly revision: string;
  readonly endpoint: string;
  /** Empty: none. Sent to the endpoint alone. */
  readonly token: string;
  readonly words: HubWords;
  readonly signal?: AbortSignal | undefined;
}

/** What messages call the settings, and what they advise where the network fails. */
export interface HubWords {
  readonly token: string;
  readonly endpoint: string;
  readonly again: string;
}

export interface HubFile {
  readonly path: string;
  readonly size: number;
  /** What its ETag and its blob are called: SHA-256 of a file in LFS, git's SHA-1 of another. */
  readonly oid: string;
}

/** A full commit. */
export const COMMIT: RegExp = /^[0-9a-f]{40}$/;
const RETRIES = 3;
const FIRST_PAUSE_MS = 250;

/** Whether this can be the id of a model: `org/name`. */
export const isModelId = (id: string): boolean =>
  id.length <= 96 && /^\w([\w.-]*\w)?\/\w([\w.-]*\w)?$/.test(id) && !/--|\.\.|\.git$/.test(id);

/** Throws FormatError on an id, a revision, an endpoint or a token that cannot be. */
export function checkModel({ id, revision, endpoint, token, words }: HubModel): void {
  if (!isModelId(id))
    throw new FormatError(
      `hub: a model's id must be org/name, got ${JSON.stringify(id)}. Copy it from the model's page`,
    );
  if (/[\\:]/.test(revision) || revision.split("/").some((part) => ["", ".", ".."].includes(part)))
    throw new FormatError(
      `${id}: the revision must be a branch, a tag or a full commit, got ${JSON.stringify(revision)}`,
    );
  if (!URL.canParse(endpoint) || !/^https?:/.test(endpoint))
    throw new FormatError(`hub: ${words.endpoint} must be an address such as https://huggingface.co, got ${endpoint}`);
  if (/[^\x21-\x7e]/.test(token))
    throw new FormatError(
      `hub: ${words.token} must be printable and without spaces, got other characters. Copy it anew`,
    );
}

/** The commit that the revision is at present. */
export async function currentCommit(model: HubModel): Promise<string> {
  const { id, revision, endpoint } = model;
  const url = `${endpoint}/api/models/${id}/revision/${encodeURIComponent(revision)}?expand=sha`;
  const { json } = await ask(model, url);
  const sha = isObject(json) ? json.sha : undefined;
  if (typeof sha === "string" && COMMIT.test(sha)) return sha;
  throw new FormatError(`${id}: the Hub must name a commit, got ${JSON.stringify(sha)}`);
}

/** The files of a commit by name. Names and hashes become paths, so a FormatError refuses what could lead elsewhere. */
export async function listModel(model: HubModel, commit: string): Promise<Map<string, HubFile>> {
  const files = new Map<string, HubFile>();
  const first = `${model.endpoint}/api/models/${model.id}/tree/${commit}?recursive=true`;
  for (let url: string | undefined = first; url !== undefined; ) {
    const { json, next } = await ask(model, url);
    if (!Array.isArray(json)) throw notTheHub(model, excerpt(JSON.stringify(json)));
    for (const entry of json) {
      const file = isObject(entry) && entry.type === "file" ? readEntry(model.id, entry) : undefined;
      if (file) files.set(file.path, file);
    }
    url = next;
  }
  return files;
}

/** Undefined for a name that cannot be one here: it is not among the files. */
function readEntry(id: string, { path, lfs, ...entry }: JsonObject): HubFile | undefined {
  const { oid = "", size } = isObject(lfs) ? lfs : entry;
  if (!isFileName(String(path))) return undefined;
  if (!/^([0-9a-f]{40}|[0-9a-f]{64})$/.test(String(oid)) || !(typeof size === "number" && size >= 0))
    throw new FormatError(`${id}: ${path} must be listed with hash and size, got ${JSON.stringify({ oid, size })}`);
  return { path: String(path), size, oid: String(oid) };
}

/** The bytes [from, to) of a file, all to its end unless `to` is given; from its start on where the server knows no ranges. */
export async function openFile(
  model: HubModel,
  commit: string,
  path: string,
  from: number,
  to?: number,
): Promise<{ readonly start: number; readonly bytes: AsyncIterable<Uint8Array> }> {
  const url = `${model.endpoint}/${model.id}/resolve/${commit}/${path.split("/").map(encodeURIComponent).join("/")}`;
  const range = `bytes=${from}-${to === undefined ? "" : to - 1}`;
  const response = await send(model, url, from > 0 || to !== undefined ? { range } : {});
  const start = response.status === 206 ? /^bytes (\d+)-/.exec(response.headers.get("content-range") ?? "")?.[1] : 0;
  if (!response.body || (Number(start) !== from && start !== 0))
    throw new Error(`bytes from ${start} on in place of ${from}`);
  return { start: Number(start), bytes: chunks(response.body) };
}

/** What a stream gives; Safari cannot iterate over one. */
async function* chunks(stream: ReadableStream<Uint8Array>): AsyncGenerator<Uint8Array> {
  const reader = stream.getReader();
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) yield next.value;
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

/** A file of a commit: each read asks for its range, and goes on where the connection broke. */
export function hubSource(model: HubModel, commit: string, { path, size, oid }: HubFile): ByteSource {
  const name = `${model.id}: ${path}`;
  return {
    sizeBytes: size,
    version: oid,
    ...(oid.length === 64 && { sha256: oid }),
    async read(offset, length, signal = model.signal) {
      checkRange(name, size, offset, length);
      const bytes = new Uint8Array(length);
      let done = 0;
      const goOn = async (): Promise<void> => {
        if (done === length) return;
        const opened = await openFile({ ...model, signal }, commit, path, offset + done, offset + length);
        if (opened.start !== offset + done)
          throw new FormatError(`${name}: the server must answer a request for a range, got the whole file`);
        for await (const chunk of opened.bytes) {
          if (chunk.byteLength > length - done) throw new Error("more bytes than were asked for");
          bytes.set(chunk, done);
          done += chunk.byteLength;
        }
        if (done < length) throw new Error(`${done} of ${length} bytes`);
      };
      await persist({ ...model, signal }, goOn, () => done);
      return bytes;
    },
  };
}

/** Tries again, ever later, what fails for a reason that may pass. Where `done` has grown meanwhile, the count begins anew. */
export async function persist<T>(
  { id, endpoint, words, signal }: HubModel,
  attempt: () => Promise<T>,
  done: () => number = () => 0,
): Promise<T> {
  for (let [failures, before] = [0, done()]; ; failures++) {
    try {
      return await attempt();
    } catch (error) {
      signal?.throwIfAborted();
      if (error instanceof FormatError || !(error instanceof Error) || "syscall" in error) throw error;
      if (done() > before) failures = 0;
      before = done();
      if (failures === RETRIES)
        throw new UnreachableError(
          `${id}: ${endpoint} must be reachable, got ${reasonOf(error)} after ${RETRIES} retries. Check the network and ${words.again}`,
        );
      await pause(FIRST_PAUSE_MS * 2 ** failures, signal);
    }
  }
}

const reasonOf = ({ message, cause }: Error): string =>
  String((cause as { readonly code?: string } | undefined)?.code ?? message);

/** Ends early when aborted. */
const pause = (ms: number, signal: AbortSignal | undefined): Promise<void> =>
  new Promise((resolve) => {
    const end = (): void => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(end, ms);
    signal?.addEventListener("abort", end);
  });

/** What the Hub answers, and the address of the next page if there is one. */
const ask = (model: HubModel, url: string): Promise<{ readonly json: unknown; readonly next: string | undefined }> =>
  persist(model, async () => {
    const response = await send(model, url);
    const text = await response.text();
    const next = /<([^>]+)>;\s*rel="next"/.exec(response.headers.get("link") ?? "")?.[1];
    try {
      return { json: JSON.parse(text), next: next && new URL(next, url).href };
    } catch (error) {
      throw notTheHub(model, error);
    }
  });

const notTheHub = ({ endpoint, words }: HubModel, got: unknown): FormatError =>
  new FormatError(`${endpoint}: must answer as the Hugging Face Hub does, got ${got}. Check ${words.endpoint}`);

/** A good answer. Throws FormatError where asking again is no use, Error where it may be. A redirect elsewhere loses the token. */
async function send(model: HubModel, url: string, headers: Readonly<Record<string, string>> = {}): Promise<Response> {
  const isHub = (address: string): boolean => new URL(address).origin === new URL(model.endpoint).origin;
  const authorization = model.token && isHub(url) ? { authorization: `Bearer ${model.token}` } : {};
  const response = await fetch(url, {
    headers: { "accept-encoding": "identity", ...headers, ...authorization },
    cache: "no-store", // the bytes are kept elsewhere
    signal: model.signal ?? null,
  });
  if (response.ok) return response;
  await response.body?.cancel();
  // What is elsewhere is a store of files, whose addresses expire.
  if (response.status >= 500 || response.status === 429 || !isHub(response.url))
    throw new Error(`status ${response.status}`);
  throw refusal(model, response);
}

function refusal({ id, revision, endpoint, token, words }: HubModel, { status, headers }: Response): FormatError {
  const code = headers.get("x-error-code");
  const who = token
    ? "the token that is set may not read it"
    : `it is private. Set ${words.token} to a token that may read it`;
  const message =
    code === "RevisionNotFound"
      ? `the revision must be a branch, a tag or a full commit, got ${revision}. See ${endpoint}/${id}/commits/main`
      : code === "GatedRepo" || status === 403
        ? `must be open to you, got ${status}: it is gated or private. Ask for access on ${endpoint}/${id}, and set ${words.token} to a token of that account`
        : status === 401 || status === 404
          ? `must be a model on ${endpoint}, got ${status}. Check the name: there is no such model, or ${who}`
          : `${endpoint} must give the model, got status ${status}`;
  return new FormatError(`${id}: ${message}`);
}

/** Questions to a Hugging Face Hub: which commit, which files, their bytes; with retries, and refusals in plain words. */
import { setTimeout as pause } from "node:timers/promises";
import { listFiles, modelInfo } from "@huggingface/hub";
import { checkFileName } from "./bytes.ts";
import { FormatError } from "./errors.ts";

/** A model on a Hub. */
export interface HubModel {
  /** `org/name` */
  readonly id: string;
  readonly revision: string;
  readonly endpoint: string;
  /** Empty: none. Sent to the endpoint alone. */
  readonly token: string;
  readonly signal?: AbortSignal | undefined;
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

/** The commit that the revision is now. */
export async function currentCommit(model: HubModel): Promise<string> {
  const { id: name, revision, endpoint: hubUrl } = model;
  const { sha } = await understood(model, () =>
    modelInfo({ name, revision, hubUrl, additionalFields: ["sha"], fetch: fetchFor(model) }),
  );
  if (!COMMIT.test(sha)) throw new FormatError(`${name}: the Hub must name a commit, got ${JSON.stringify(sha)}`);
  return sha;
}

/** The files of a commit by name. Names and hashes become paths, so a FormatError refuses what could lead elsewhere. */
export async function listModel(model: HubModel, commit: string): Promise<Map<string, HubFile>> {
  const { id, endpoint: hubUrl } = model;
  const repo = { type: "model", name: id } as const;
  const files = new Map<string, HubFile>();
  await understood(model, async () => {
    const listing = listFiles({ repo, revision: commit, recursive: true, hubUrl, fetch: fetchFor(model) });
    for await (const { type, path, ...entry } of listing) {
      checkFileName(id, path);
      const { oid = "", size } = entry.lfs ?? entry;
      if (!/^([0-9a-f]{40}|[0-9a-f]{64})$/.test(type === "file" ? oid : commit) || !(size >= 0))
        throw new FormatError(`${id}: ${path} must be listed with hash and size, got ${JSON.stringify({ oid, size })}`);
      if (type === "file") files.set(path, { path, size, oid });
    }
  });
  return files;
}

/** The bytes of a file from `from` on, or all of them where the server cannot do that. */
export async function openFile(
  model: HubModel,
  commit: string,
  path: string,
  from: number,
): Promise<{ readonly start: number; readonly bytes: AsyncIterable<Uint8Array> }> {
  const url = `${model.endpoint}/${model.id}/resolve/${commit}/${path.split("/").map(encodeURIComponent).join("/")}`;
  const response = await send(model, url, from > 0 ? { range: `bytes=${from}-` } : {});
  const start = response.status === 206 ? /^bytes (\d+)-/.exec(response.headers.get("content-range") ?? "")?.[1] : 0;
  if (!response.body || (Number(start) !== from && start !== 0))
    throw new Error(`bytes from ${start} on in place of ${from}`);
  return { start: Number(start), bytes: response.body };
}

/** Tries again, ever later, what fails for a reason that may pass. Where `done` has grown meanwhile, the count begins anew. */
export async function persist<T>(
  { id, endpoint, signal }: HubModel,
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
        throw new FormatError(
          `${id}: ${endpoint} must be reachable, got ${reasonOf(error)} after ${RETRIES} retries. Check the network and go on with the same command, or set HF_HUB_OFFLINE=1 to use the cache alone`,
        );
      await pause(FIRST_PAUSE_MS * 2 ** failures, undefined, { signal }).catch(() => undefined);
    }
  }
}

const reasonOf = ({ message, cause }: Error): string =>
  String((cause as { readonly code?: string } | undefined)?.code ?? message);

/** What the library made of the answers. An error of its own means that they were not the Hub's. */
async function understood<T>({ endpoint, signal }: HubModel, ask: () => Promise<T>): Promise<T> {
  try {
    return await ask();
  } catch (error) {
    signal?.throwIfAborted();
    if (error instanceof FormatError) throw error;
    throw new FormatError(`${endpoint}: must answer as the Hugging Face Hub does, got ${error}. Check HF_ENDPOINT`);
  }
}

/** `fetch` for the library, which is not told the token: it would refuse one without "hf_", and send it to any next page. */
const fetchFor =
  (model: HubModel): typeof fetch =>
  (input) =>
    persist(model, async () => {
      const response = await send(model, String(input));
      return new Response(await response.arrayBuffer(), { headers: response.headers });
    });

/** A good answer. Throws FormatError where asking again is no use, Error where it may be. A redirect elsewhere loses the token. */
async function send(model: HubModel, url: string, headers: Readonly<Record<string, string>> = {}): Promise<Response> {
  const isHub = (address: string): boolean => new URL(address).origin === new URL(model.endpoint).origin;
  const authorization = model.token && isHub(url) ? { authorization: `Bearer ${model.token}` } : {};
  const response = await fetch(url, {
    headers: { "accept-encoding": "identity", ...headers, ...authorization },
    signal: model.signal ?? null,
  });
  if (response.ok) return response;
  await response.body?.cancel();
  // What is elsewhere is a store of files, whose addresses expire.
  if (response.status >= 500 || response.status === 429 || !isHub(response.url))
    throw new Error(`status ${response.status}`);
  throw refusal(model, response);
}

function refusal({ id, revision, endpoint, token }: HubModel, { status, headers }: Response): FormatError {
  const code = headers.get("x-error-code");
  const who = token
    ? "the token that is set may not read it"
    : "it is private. Set HF_TOKEN to a token that may read it";
  const message =
    code === "RevisionNotFound"
      ? `the revision must be a branch, a tag or a full commit, got ${revision}. See ${endpoint}/${id}/commits/main`
      : code === "GatedRepo" || status === 403
        ? `must be open to you, got ${status}: it is gated or private. Ask for access on ${endpoint}/${id}, and set HF_TOKEN to a token of that account`
        : status === 401 || status === 404
          ? `must be a model on ${endpoint}, got ${status}. Check the name: there is no such model, or ${who}`
          : `${endpoint} must give the model, got status ${status}`;
  return new FormatError(`${id}: ${message}`);
}

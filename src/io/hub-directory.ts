/** Models of the Hugging Face Hub in a browser, kept in its origin private file system. */
import { type ByteSource, type Directory, memorySource } from "./bytes.ts";
import {
  COMMIT,
  checkModel,
  currentCommit,
  type HubFile,
  type HubModel,
  type HubWords,
  hubSource,
  listModel,
} from "./hub-client.ts";
import { readJson } from "./json.ts";
import { type CacheOptions, cachedDirectory, remembered } from "./opfs.ts";

export interface HubDirectoryOptions extends CacheOptions {
  /** A branch, a tag or a full commit; "main" unless given. */
  readonly revision?: string | undefined;
  /** https://huggingface.co unless given. */
  readonly endpoint?: string | undefined;
  /** Sent to the endpoint alone. Whoever can read the page's scripts can read it. */
  readonly token?: string | undefined;
}

const WORDS: HubWords = {
  token: "the option token",
  endpoint: "the option endpoint",
  again: "load again: it goes on where it stopped",
};
/** What is in the commit, kept among its files. */
const LISTING = ".files.json";
const LISTING_LIMIT_BYTES = 50e6;

/**
 * A model or adapter on the Hub as a directory for `loadModel`, by way of the cache of `cachedDirectory`, whose rules and errors are those of
 * this one: only what is opened is downloaded; files in LFS, the weights, are checked against their hash. Without network a commit that was
 * loaded before is loaded again; for a branch or a tag, the commit that it was last.
 *
 * Throws FormatError with a way out: no such model, revision, access, network or room.
 */
export async function hubDirectory(id: string, options: HubDirectoryOptions = {}): Promise<Directory> {
  const { revision = "main", token = "", root, signal } = options;
  const endpoint = (options.endpoint ?? "https://huggingface.co").replace(/\/+$/, "");
  const model: HubModel = { id, revision, endpoint, token, words: WORDS, signal };
  checkModel(model);
  const commit = COMMIT.test(revision)
    ? revision
    : await remembered(root, `${endpoint}/${id}@${revision}`, () => currentCommit(model));
  const name = `${endpoint}/${id}/resolve/${commit}`;
  const listing = await readJson(
    cachedDirectory({ name, open: () => listingSource(model, commit) }, { root, signal }),
    LISTING,
    LISTING_LIMIT_BYTES,
  );
  const files = new Map(((listing?.files ?? []) as HubFile[]).map((file) => [file.path, file]));
  const open = async (path: string): Promise<ByteSource | undefined> => {
    const file = files.get(path);
    return file && hubSource(model, commit, file);
  };
  return cachedDirectory({ name, open }, options);
}

async function listingSource(model: HubModel, commit: string): Promise<ByteSource> {
  const files = [...(await listModel(model, commit)).values()];
  return memorySource(new TextEncoder().encode(JSON.stringify({ files })));
}

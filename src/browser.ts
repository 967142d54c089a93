/** `lowrank/browser`: models and adapters of the Hub or another server, and checkpoints of training runs, kept in the browser; a chat in a Worker. */

export { isModelId } from "./io/hub-client.ts";
export { type HubDirectoryOptions, hubDirectory } from "./io/hub-directory.ts";
export {
  type CachedDirectory,
  type CacheOptions,
  type CacheProgress,
  cachedDirectory,
  clearCached,
  listCached,
} from "./io/opfs.ts";
export {
  type CheckpointOptions,
  listCheckpoints,
  newestCheckpoint,
  removeCheckpoints,
  type StoredRun,
  writeCheckpoint,
} from "./io/opfs-checkpoints.ts";
export { createChat, type RemoteChat } from "./serve/chat-client.ts";
export type { AdapterSource, ChatRequest } from "./serve/chat-messages.ts";

/** `lowrank/serve`: generation for many, each by an adapter of its own, with the models that `lowrank` loads. Needs nothing from outside. */
export { readAdapter } from "./lora/adapter-file.ts";
export { AdapterPool, type PoolCounts, type PoolOptions, poolBytes } from "./lora/adapter-pool.ts";
export type { PlainAdapter } from "./lora/plain-adapter.ts";
export { BatchEngine, type EngineOptions, engineCacheBytes, type ServedAdapters } from "./serve/batch-engine.ts";
export { type BeamAnswer, type BeamSearchOptions, beamSearch } from "./serve/beam-search.ts";
export { Chat, type ChatOptions, type ChatParts, type ChatPort, openChat, serveChat } from "./serve/chat.ts";
export type { AdapterSource, ChatRequest } from "./serve/chat-messages.ts";
export { constraintOf, jsonConstraint } from "./serve/constraint.ts";
export type { Engine, EngineStats, GenerationRequest } from "./serve/engine-types.ts";
export { QueueFull } from "./serve/errors.ts";
export type { TokenConstraint } from "./serve/sampling.ts";
export { type TextOptions, type TextPiece, type TextToken, textOf } from "./serve/text.ts";

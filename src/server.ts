/** `lowrank/server`: OpenAI's endpoints over an engine, as a function from Request to Response. */
export type { Engine, EngineStats, GenerationRequest } from "./serve/engine-types.ts";
export { QueueFull } from "./serve/errors.ts";
export { type FindAdapter, isAdapterName } from "./serve/http/adapters.ts";
export { type App, type AppOptions, createApp, type ServeLimits } from "./serve/http/app.ts";

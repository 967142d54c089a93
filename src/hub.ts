/** `lowrank/hub`: models and adapters of the Hugging Face Hub by id, in Node and Deno. */
export { downloadModel, type HubOptions, type HubProgress } from "./io/hub.ts";
export { isModelId } from "./io/hub-client.ts";

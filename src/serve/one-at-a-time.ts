/** The plainest engine: one request after the other, on one model that wears one adapter at a time. */
import type { Directory } from "../io/bytes.ts";
import type { LoraAdapter } from "../lora/adapter.ts";
import { loadPeft } from "../lora/peft.ts";
import type { CausalModel } from "../models/causal.ts";
import { ShapeError } from "../tensor/errors.ts";
import type { Engine, EngineStats, GenerationRequest } from "./engine-types.ts";
import { QueueFull } from "./errors.ts";
import { generateTokens } from "./generate.ts";
import type { SampledToken } from "./sampling.ts";

export interface OneAtATimeOptions {
  /** So many may wait. */
  readonly maxWaiting: number;
  /** Is told what is strange in an adapter's files and does no harm. */
  readonly onWarning?: (text: string) => void;
}

/** The model is the engine's as long as it is open: nothing else may enable adapters on it. */
export function oneAtATime(model: CausalModel, { maxWaiting, onWarning }: OneAtATimeOptions): Engine {
  const adapters = new Map<string, LoraAdapter>();
  let [isRunning, isClosed] = [false, false];
  let [adapterLoads, promptTokens, generatedTokens] = [0, 0, 0];
  const waiting: (() => void)[] = [];

  /** Resolves when it is one's turn, with what ends it. */
  async function turn(): Promise<() => void> {
    if (isRunning) await new Promise<void>((resolve) => waiting.push(resolve));
    isRunning = true;
    return () => {
      const next = waiting.shift();
      if (next) next();
      else isRunning = false;
    };
  }

  function adapterOf(name: string | undefined): LoraAdapter | undefined {
    const adapter = name === undefined ? undefined : adapters.get(name);
    if (name !== undefined && !adapter)
      throw new ShapeError(`generate: the adapter must be loaded, got ${JSON.stringify(name)}, which is not`);
    return adapter;
  }

  async function* generate({
    adapter: name,
    ...request
  }: GenerationRequest): AsyncGenerator<SampledToken, void, undefined> {
    if (isClosed || waiting.length >= maxWaiting)
      throw new QueueFull(`generate: at most ${isClosed ? 0 : maxWaiting} requests may wait, got one more`);
    const end = await turn();
    let adapter: LoraAdapter | undefined;
    try {
      if (request.signal?.aborted) return;
      adapter = adapterOf(name);
      adapter?.enable();
      promptTokens += request.promptIds.length;
      for await (const token of generateTokens(model, request)) {
        generatedTokens++;
        yield token;
      }
    } finally {
      adapter?.disable();
      end();
    }
  }

  return {
    contextLength: model.config.contextLength,
    get adapters() {
      return [...adapters.keys()];
    },
    generate,
    async load(name: string, directory: Directory) {
      const end = await turn();
      try {
        const adapter = await loadPeft(model, directory, onWarning && { onWarning });
        adapter.disable();
        adapters.set(name, adapter);
        adapterLoads++;
      } finally {
        end();
      }
    },
    async unload(name: string) {
      const end = await turn();
      try {
        adapterOf(name)?.detach();
        adapters.delete(name);
      } finally {
        end();
      }
    },
    stats: (): EngineStats => ({
      ...{ running: isRunning ? 1 : 0, waiting: waiting.length, kvPagesUsed: isRunning ? 1 : 0, kvPages: 1 },
      ...{ adaptersResident: adapters.size, adapterLoads, adapterEvictions: 0 },
      ...{ promptTokens, cachedPromptTokens: 0, generatedTokens, steps: generatedTokens },
    }),
    async close() {
      isClosed = true;
      (await turn())();
    },
  };
}

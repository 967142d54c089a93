/** What generates for many at once, and what it is asked. */
import type { Directory } from "../io/bytes.ts";
import type { SampledToken, SamplingOptions } from "./sampling.ts";

export interface GenerationRequest extends SamplingOptions {
  /** Name of a loaded adapter; the base alone unless given. */
  readonly adapter?: string | undefined;
  /** Ids to continue; at least one. */
  readonly promptIds: readonly number[];
  readonly maxTokens: number;
  /** Ids that end the answer beside the model's own; they are not given either. */
  readonly endIds?: readonly number[] | undefined;
  /** How many of the likeliest tokens to give with each one; none unless given. */
  readonly logprobs?: number;
  /** Is called when it leaves the queue; must not throw. */
  readonly onStart?: (() => void) | undefined;
  /** Cancels: memory is freed before the next step. */
  readonly signal?: AbortSignal | undefined;
}

export interface EngineStats {
  readonly running: number;
  readonly waiting: number;
  readonly kvPagesUsed: number;
  readonly kvPages: number;
  readonly adaptersResident: number;
  readonly adapterLoads: number;
  readonly adapterEvictions: number;
  readonly promptTokens: number;
  /** Prompt tokens whose keys and values were there already. */
  readonly cachedPromptTokens: number;
  readonly generatedTokens: number;
  readonly steps: number;
  /** Times that a request went back into the queue to make room for older ones. */
  readonly preemptions: number;
  /** Bytes on the device that are in use, weights included, without what traced steps keep for the next ones. */
  readonly gpuBytes: number;
}

/** Answers many requests at a time, each by the model alone or with an adapter: `BatchEngine`, or what stands for it. */
export interface Engine {
  readonly contextLength: number;
  /** Names of the adapters that may be asked for. */
  readonly adapters: readonly string[];
  /**
   * Tokens as they come; ends at an end-of-text token (which is not yielded), after `maxTokens`, or when the context is full. Throws QueueFull
   * when too many wait, and ShapeError as `generateTokens` or for an adapter that is not loaded.
   */
  generate(request: GenerationRequest): AsyncGenerator<SampledToken, void, undefined>;
  /** Throws FormatError or ShapeError where the files are no adapter of this model. */
  load(name: string, directory: Directory): Promise<void>;
  unload(name: string): Promise<void>;
  stats(): EngineStats;
  /** What ended it, such as a lost device: it answers nothing any more. */
  readonly failure?: unknown;
  /** Takes no more and lets those that run end. */
  close(): Promise<void>;
}

/** What a chat is asked, and what a page and the worker that has it say to each other. */
import type { JsonObject } from "../io/json.ts";
import type { EngineStats } from "./engine-types.ts";
import type { SamplingOptions } from "./sampling.ts";
import type { TextPiece } from "./text.ts";

export interface ChatRequest extends Omit<SamplingOptions, "constraint"> {
  /** The conversation, such as [{ role: "user", content: "Who are you?" }], which the chat template writes as text. */
  readonly messages?: readonly JsonObject[];
  /** In place of messages, a text to continue. */
  readonly prompt?: string;
  /** Name of a loaded adapter; the base alone unless given. */
  readonly adapter?: string | undefined;
  /** As many as the context has room for unless given. */
  readonly maxTokens?: number;
  /** The answer ends before the first of these texts. */
  readonly stop?: readonly string[] | undefined;
  /** How many of the likeliest tokens to give with each one. */
  readonly logprobs?: number;
  /** As OpenAI's `response_format`: { type: "json_object" } or { type: "json_schema", json_schema: { schema } }. */
  readonly responseFormat?: unknown;
  /** Ends the answer with what there is of it. */
  readonly signal?: AbortSignal | undefined;
}

/** The files of an adapter by name, or the address of a directory with them. */
export type AdapterSource = string | Readonly<Record<string, Blob>>;

/** Calls have a number, by which they are answered and aborted. */
export type ToChat =
  | { readonly chat: "hello" }
  | { readonly chat: "ask"; readonly id: number; readonly request: Omit<ChatRequest, "signal"> }
  | { readonly chat: "abort"; readonly id: number }
  | { readonly chat: "load"; readonly id: number; readonly name: string; readonly from: AdapterSource }
  | { readonly chat: "unload"; readonly id: number; readonly name: string }
  | { readonly chat: "adapters" | "stats" | "close"; readonly id: number };

/** A call has any number of pieces, then a value or an error. */
export type FromChat =
  | { readonly chat: "ready" }
  | { readonly chat: "piece"; readonly id: number; readonly piece: TextPiece }
  | { readonly chat: "value"; readonly id: number; readonly value: readonly string[] | EngineStats | undefined }
  | { readonly chat: "error"; readonly id: number; readonly name: string; readonly message: string };

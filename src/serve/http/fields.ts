/** Fields of a request's JSON, each checked as it is taken; what nobody takes is unknown. */
import { excerpt, isObject, type JsonObject } from "../../io/json.ts";
import { ApiError } from "./errors.ts";

export class Fields {
  readonly #values: JsonObject;
  readonly #path: string;
  readonly #taken = new Set<string>();

  /** `path` is the object's own name in the request, "" for the request. Throws a 400 unless the value is an object. */
  constructor(value: unknown, path = "") {
    this.#path = path;
    if (!isObject(value)) throw refused(path || "the body", "an object", value);
    if (Object.hasOwn(value, "__proto__")) throw refused(this.name("__proto__"), "left out", value);
    this.#values = value;
  }

  /** The field as messages and `param` name it: "messages[0].content". */
  name(field: string): string {
    return this.#path === "" ? field : `${this.#path}.${field}`;
  }

  /** The value as it is; null is as if it were not given. */
  any(field: string): unknown {
    this.#taken.add(field);
    return Object.hasOwn(this.#values, field) ? (this.#values[field] ?? undefined) : undefined;
  }

  number(field: string, rule: string, holds: (value: number) => boolean): number | undefined {
    const value = this.any(field);
    if (value === undefined) return undefined;
    if (typeof value !== "number" || !holds(value)) throw refused(this.name(field), rule, value);
    return value;
  }

  whole(field: string, least: number, most: number): number | undefined {
    const rule = `a whole number from ${least} to ${most}`;
    return this.number(field, rule, (x) => Number.isInteger(x) && x >= least && x <= most);
  }

  range(field: string, least: number, most: number): number | undefined {
    return this.number(field, `a number from ${least} to ${most}`, (x) => x >= least && x <= most);
  }

  flag(field: string): boolean | undefined {
    const value = this.any(field);
    if (value !== undefined && typeof value !== "boolean") throw refused(this.name(field), "true or false", value);
    return value;
  }

  text(field: string): string | undefined {
    const value = this.any(field);
    if (value !== undefined && typeof value !== "string") throw refused(this.name(field), "a text", value);
    return value;
  }

  object(field: string): Fields | undefined {
    const value = this.any(field);
    return value === undefined ? undefined : new Fields(value, this.name(field));
  }

  /** The own keys, all of which count as taken. */
  keys(): string[] {
    for (const key of Object.keys(this.#values)) this.#taken.add(key);
    return Object.keys(this.#values);
  }

  refuse(field: string, rule: string): ApiError {
    return refused(this.name(field), rule, this.any(field));
  }

  /** The fields that were not taken, by their whole names. */
  unknown(): string[] {
    return Object.keys(this.#values)
      .filter((key) => !this.#taken.has(key))
      .map((key) => this.name(key));
  }
}

/** "`temperature` must be a number from 0 to 2, got -1" */
export function refused(name: string, rule: string, value: unknown): ApiError {
  const got = value === undefined ? "nothing" : excerpt(JSON.stringify(value));
  const shown = name === "the body" ? name : `\`${excerpt(name)}\``;
  return new ApiError(400, `${shown} must be ${rule}, got ${got}`, { param: name === "the body" ? null : name });
}

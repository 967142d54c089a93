/** Who may ask: hosts, origins, keys, and how much at a time. */
import { ShapeError } from "../../tensor/errors.ts";
import { ApiError } from "./errors.ts";

/** "127.0.0.1" of "127.0.0.1:8080", "[::1]" of "[::1]:8080"; undefined for what is no host. */
function hostName(host: string): string | undefined {
  return /^(\[[0-9a-f:.]+\]|[a-z0-9._-]+?)\.?(:\d{1,5})?$/i.exec(host)?.[1]?.toLowerCase();
}

/**
 * Throws a 403 unless the Host header names this server: a page whose name was made to mean this machine (DNS rebinding) is of the same origin to
 * the browser, and its own name is here.
 */
export function demandHost(host: string, hosts: ReadonlySet<string>): void {
  const name = hostName(host);
  if (name === undefined || !hosts.has(name))
    throw new ApiError(403, "the Host header must name this server, got another. Its operator can allow it");
}

/** Origins of pages that may ask, none of which is "*". Throws ShapeError for what is no origin. */
export function exactOrigins(origins: readonly string[]): ReadonlySet<string> {
  for (const origin of origins)
    if (!URL.canParse(origin) || new URL(origin).origin !== origin || origin === "null")
      throw new ShapeError(
        `createApp: an origin must be scheme, host and port such as https://chat.example, got ${origin}. It is compared as it is; there is no *`,
      );
  return new Set(origins);
}

export const exactHosts = (hosts: readonly string[]): ReadonlySet<string> =>
  new Set(
    hosts.map((host) => {
      const name = hostName(host.includes(":") && !host.startsWith("[") ? `[${host}]` : host);
      if (name === undefined) throw new ShapeError(`createApp: a host must be a name or an address, got ${host}`);
      return name;
    }),
  );

const sha256 = async (text: string): Promise<Uint8Array> =>
  new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text)));

/** Keys that open the same door. */
export class Keys {
  readonly #digests: readonly Promise<Uint8Array>[];

  /** Throws ShapeError for a key that no header can hold. */
  constructor(keys: readonly string[]) {
    if (!keys.every((key) => /^[\x21-\x7e]+$/.test(key)))
      throw new ShapeError("createApp: a key must be of visible ASCII characters, got one that is not");
    this.#digests = keys.map(sha256);
  }

  get isOpen(): boolean {
    return this.#digests.length === 0;
  }

  /** Number of the key that `Authorization` carries. The time it takes says nothing of the keys: hashes are compared, each whole. Throws a 401. */
  async demand(authorization: string | undefined): Promise<number> {
    const given = await sha256(/^Bearer +([\x21-\x7e]+)$/i.exec(authorization ?? "")?.[1] ?? "");
    let found = -1;
    for (const [i, digest] of (await Promise.all(this.#digests)).entries()) {
      const difference = digest.reduce((bits, byte, at) => bits | (byte ^ (given[at] ?? 0)), 0);
      found = difference === 0 ? i : found;
    }
    if (found < 0)
      throw new ApiError(401, "the Authorization header must be Bearer and a key of this server, got none or another", {
        headers: { "WWW-Authenticate": "Bearer" },
      });
    return found;
  }
}

/** Counts what runs by key. */
export class Gate {
  readonly #most: number;
  readonly #running = new Map<number, number>();

  constructor(mostPerKey: number) {
    this.#most = mostPerKey;
  }

  /** For so many answers; gives what has to be called when they have ended. Calling it again does nothing. Throws a 429. */
  enter(key: number, count = 1): () => void {
    const running = this.#running.get(key) ?? 0;
    if (running + count > this.#most)
      throw busy(`a key must have at most ${this.#most} answers at a time, got ${running} and ${count} more`);
    this.#running.set(key, running + count);
    let isIn = true;
    return () => {
      if (isIn) this.#running.set(key, (this.#running.get(key) ?? count) - count);
      isIn = false;
    };
  }
}

export const busy = (message: string): ApiError => new ApiError(429, message, { headers: { "Retry-After": "1" } });

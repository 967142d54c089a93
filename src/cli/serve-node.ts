/** An app on a port: Node's server with its limits set, or Deno's. */
import { createServer, STATUS_CODES } from "node:http";
import type { AddressInfo } from "node:net";
import { getRequestListener } from "@hono/node-server";
import { onDisk } from "../io/files.ts";
import { ApiError } from "../serve/http/errors.ts";
import type { App } from "../server.ts";

export interface ListenOptions {
  readonly host: string;
  /** 0 takes any that is free. */
  readonly port: number;
  /** In Node: further connections are closed at once. */
  readonly maxConnections: number;
  /** In Node: how long a request's head may take to arrive, and the whole of it. Half a minute for it all unless given. */
  readonly headersMs?: number;
  readonly requestMs?: number;
}

export interface Listening {
  readonly port: number;
  /** Stops accepting. Resolves when the last connection has ended. */
  close(): Promise<void>;
  /** Ends the connections that are left. */
  cutOff(): void;
}

/** What of Deno is used. */
interface Deno {
  serve(
    options: { hostname: string; port: number; onListen: () => void },
    handler: (request: Request) => Promise<Response>,
  ): { readonly addr: { readonly port: number }; shutdown(): Promise<void> };
}

/** Throws a FormatError where the port cannot be had. */
export async function listen(app: App, options: ListenOptions): Promise<Listening> {
  const { Deno: deno } = globalThis as { Deno?: Deno };
  return deno ? listenInDeno(deno, app, options) : listenInNode(app, options);
}

async function listenInDeno(deno: Deno, app: App, { host: hostname, port }: ListenOptions): Promise<Listening> {
  const server = deno.serve({ hostname, port, onListen: () => {} }, (request) => app.fetch(request));
  return { port: server.addr.port, close: () => server.shutdown(), cutOff: () => {} };
}

async function listenInNode(app: App, options: ListenOptions): Promise<Listening> {
  const { host, port, maxConnections, headersMs = 10e3, requestMs = 30e3 } = options;
  const listener = getRequestListener((request) => app.fetch(request), {
    overrideGlobalObjects: false,
    errorHandler: () => Response.json(malformed.body, { status: 400 }),
  });
  const server = createServer(
    {
      ...{ headersTimeout: headersMs, requestTimeout: requestMs, maxHeaderSize: 2 ** 14 },
      connectionsCheckingInterval: Math.min(1000, headersMs), // of Node's own accord every 30 s
      requireHostHeader: false, // the listener says so in the app's words
    },
    listener,
  );
  server.maxConnections = maxConnections;
  server.on("clientError", (error: NodeJS.ErrnoException, socket) => {
    if (error.code === "ECONNRESET" || !socket.writable) return void socket.destroy();
    const { status, body } = CLIENT_ERRORS[error.code ?? ""] ?? malformed;
    const json = JSON.stringify(body);
    const head = [
      `HTTP/1.1 ${status} ${STATUS_CODES[status]}`,
      ...["Connection: close", "Content-Type: application/json", `Content-Length: ${json.length}`],
    ];
    socket.end(`${head.join("\r\n")}\r\n\r\n${json}`);
  });
  await onDisk(`${host}:${port}`, "must be an address and a port that are free", async () => {
    await new Promise<void>((resolve, reject) => {
      server.once("error", reject);
      server.listen(port, host, resolve);
    });
  });
  return {
    port: (server.address() as AddressInfo).port,
    close: () =>
      new Promise((resolve) => {
        server.close(() => resolve());
        // A connection that is kept for another request ends when its last answer does.
        const idle = setInterval(() => server.closeIdleConnections(), 100);
        server.once("close", () => clearInterval(idle));
      }),
    cutOff: () => server.closeAllConnections(),
  };
}

const malformed = new ApiError(400, "the request must be HTTP with a Host header, got something else");

/** By the codes of Node's parser. */
const CLIENT_ERRORS: Readonly<Record<string, ApiError>> = {
  ERR_HTTP_REQUEST_TIMEOUT: new ApiError(408, "the request must arrive in time, got a part"),
  HPE_HEADER_OVERFLOW: new ApiError(431, "the headers must be of at most 16384 bytes, got more"),
};

/** A Hugging Face Hub on this machine: the routes that a download uses, and a store of large files on another port. */
import { createHash } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

export interface Asked {
  readonly host: "hub" | "store";
  /** With its query. */
  readonly path: string;
  readonly range: string | undefined;
  readonly authorization: string | undefined;
}

/** What happens in place of the right answer. */
export interface Fault {
  readonly status?: number;
  readonly headers?: Readonly<Record<string, string>>;
  readonly body?: string | Uint8Array;
  /** The connection breaks after so many bytes of the right answer, once the client has them. */
  readonly cutAfter?: number;
  /** The whole file is sent, whatever range was asked for. */
  readonly noRange?: boolean;
}

export interface FakeModel {
  readonly commit: string;
  /** Name of a branch or tag → commit. */
  readonly refs?: Readonly<Record<string, string>>;
  readonly files: Readonly<Record<string, string | Uint8Array>>;
}

export interface FakeHub {
  readonly url: string;
  readonly store: string;
  readonly models: Map<string, FakeModel>;
  readonly asked: Asked[];
  /** Bytes of the file in question that the client has. */
  arrived: () => number;
  /** Asked before each answer. */
  fault: (asked: Asked) => Fault | undefined;
  close(): Promise<void>;
}

const PAGE = 3;

export const sha256 = (content: string | Uint8Array): string => createHash("sha256").update(content).digest("hex");

export const gitHash = (content: string | Uint8Array): string =>
  createHash("sha1")
    .update(`blob ${Buffer.byteLength(content)}\0`)
    .update(content)
    .digest("hex");

/** As the Hub does: safetensors and other large formats are in LFS, text is in git. */
export const isLfs = (path: string): boolean => /\.(safetensors|bin|gguf|model|onnx)$/.test(path);

export const blobName = (path: string, content: string | Uint8Array): string =>
  isLfs(path) ? sha256(content) : gitHash(content);

export async function startHub(): Promise<FakeHub> {
  const stored = new Map<string, Uint8Array>();
  const answering =
    (
      host: Asked["host"],
      answer: (url: URL, request: IncomingMessage, response: ServerResponse, fault: Fault) => void,
    ) =>
    (request: IncomingMessage, response: ServerResponse): void => {
      response.setHeader("access-control-allow-origin", "*");
      response.setHeader("access-control-expose-headers", "*");
      const { range, authorization } = request.headers;
      const asked = { host, path: request.url ?? "", range, authorization };
      hub.asked.push(asked);
      const fault = hub.fault(asked) ?? {};
      if (fault.status === undefined) answer(new URL(asked.path, "http://x"), request, response, fault);
      else response.writeHead(fault.status, { ...fault.headers }).end(fault.body);
    };

  const store = await listening(
    answering("store", (url, request, response, fault) => {
      const content = stored.get(url.pathname.slice(1));
      if (content) sendBytes(hub, content, request, response, fault);
      else response.writeHead(403).end();
    }),
  );
  const server = await listening(
    answering("hub", (url, request, response, fault) => {
      const [, api, id = "", route, revision = "", path = ""] =
        /^\/(api\/models\/)?([^/]+\/[^/]+)\/(revision|tree|resolve)\/([^/]+)(?:\/(.+))?$/.exec(url.pathname) ?? [];
      const model = hub.models.get(id);
      if (!model) return void response.writeHead(404, { "x-error-code": "RepoNotFound" }).end();
      const { refs = {} } = model;
      const commits = [model.commit, ...Object.values(refs)];
      const commit = refs[decodeURIComponent(revision)] ?? commits.find((known) => known === revision);
      if (!commit) return void response.writeHead(404, { "x-error-code": "RevisionNotFound" }).end();
      const json = (value: unknown, headers = {}): void =>
        void response.writeHead(200, { "content-type": "application/json", ...headers }).end(JSON.stringify(value));
      if (api && route === "revision") return json({ _id: "1", id, sha: commit, lastModified: 0 });
      if (api && route === "tree") {
        const start = Number(url.searchParams.get("cursor") ?? 0);
        const all = tree(model, url.searchParams.get("recursive") === "true");
        url.searchParams.set("cursor", `${start + PAGE}`);
        const next = { link: `<${hub.url}${url.pathname}${url.search}>; rel="next"` };
        return json(all.slice(start, start + PAGE), start + PAGE < all.length ? next : {});
      }
      const content = model.files[decodeURIComponent(path)];
      if (api || content === undefined) return void response.writeHead(404, { "x-error-code": "EntryNotFound" }).end();
      const bytes = Buffer.from(content);
      response.setHeader("x-repo-commit", commit);
      response.setHeader("etag", `"${gitHash(bytes)}"`);
      if (!isLfs(path)) return sendBytes(hub, bytes, request, response, fault);
      stored.set(sha256(bytes), bytes);
      response
        .writeHead(302, {
          location: `${hub.store}/${sha256(bytes)}?signature=1`,
          "x-linked-etag": `"${sha256(bytes)}"`,
          "x-linked-size": bytes.byteLength,
        })
        .end();
    }),
  );
  const hub: FakeHub = {
    url: address(server),
    store: address(store),
    models: new Map(),
    asked: [],
    arrived: () => 0,
    fault: () => undefined,
    async close() {
      for (const each of [server, store]) {
        each.closeAllConnections();
        await new Promise((resolve) => each.close(resolve));
      }
    },
  };
  return hub;
}

function tree({ files }: FakeModel, recursive: boolean): object[] {
  const entries = Object.entries(files).map(([path, content]) => {
    const size = Buffer.byteLength(content);
    const pointer = `version https://git-lfs.github.com/spec/v1\noid sha256:${sha256(content)}\nsize ${size}\n`;
    const lfs = { oid: sha256(content), size, pointerSize: pointer.length };
    return { type: "file", path, size, ...(isLfs(path) ? { oid: gitHash(pointer), lfs } : { oid: gitHash(content) }) };
  });
  const folders = new Set(Object.keys(files).flatMap((path) => (path.includes("/") ? [path.replace(/\/.*/, "")] : [])));
  const directories = [...folders].map((path) => ({ type: "directory", path, size: 0, oid: gitHash(path) }));
  return [...entries.filter(({ path }) => recursive || !path.includes("/")), ...directories];
}

function sendBytes(
  hub: FakeHub,
  content: Uint8Array,
  request: IncomingMessage,
  response: ServerResponse,
  { cutAfter, noRange, body }: Fault,
): void {
  const [, first, last] = /^bytes=(\d+)-(\d*)$/.exec(noRange ? "" : (request.headers.range ?? "")) ?? [];
  const from = Number(first ?? 0);
  const bytes = content.subarray(from, last ? Number(last) + 1 : undefined);
  response.setHeader("content-length", bytes.byteLength);
  if (first !== undefined) {
    response.setHeader("content-range", `bytes ${from}-${from + bytes.byteLength - 1}/${content.byteLength}`);
    response.statusCode = 206;
  }
  if (cutAfter === undefined) return void response.end(body ?? bytes);
  response.write(bytes.subarray(0, cutAfter));
  const look = setInterval(() => {
    if (hub.arrived() >= from + cutAfter) response.destroy();
  }, 5);
  response.on("close", () => clearInterval(look));
}

async function listening(answer: (request: IncomingMessage, response: ServerResponse) => void): Promise<Server> {
  const server = createServer(answer);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return server;
}

const address = (server: Server): string => `http://127.0.0.1:${(server.address() as AddressInfo).port}`;

import { createServer, type RequestListener, type Server } from "node:http";
import type { AddressInfo } from "node:net";
import { afterEach, expect, test } from "vitest";
import { blobSource, httpDirectory, memoryDirectory, memorySource } from "../../src/io/bytes.ts";
import { FormatError } from "../../src/io/errors.ts";
import { readJson, readText } from "../../src/io/json.ts";

const content = Uint8Array.from({ length: 100 }, (_, i) => i);

const servers: Server[] = [];
afterEach(() => {
  for (const server of servers.splice(0)) server.close();
});

async function serve(listener: RequestListener): Promise<string> {
  const server = createServer(listener);
  servers.push(server);
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  return `http://127.0.0.1:${(server.address() as AddressInfo).port}/model`;
}

test.each([
  ["memory", () => memorySource(content)],
  ["blob", () => blobSource(new Blob([content]))],
  ["model.bin", () => blobSource(new File([content], "model.bin"))],
] as const)("a source in %s gives the bytes asked for and refuses to read past its end", async (name, make) => {
  const source = make();
  expect(source.sizeBytes).toBe(100);
  expect([...(await source.read(97, 3))]).toEqual([97, 98, 99]);
  expect([...(await source.read(100, 0))]).toEqual([]);
  for (const [offset, length] of [
    [98, 3],
    [-1, 2],
    [0.5, 1],
    [0, Number.NaN],
  ] as const)
    await expect(source.read(offset, length)).rejects.toThrow(
      new FormatError(`${name}: a read must stay within its 100 bytes, got ${length} from ${offset} on`),
    );
});

test("a directory in memory has the files it was given and no others", async () => {
  const directory = memoryDirectory("m", { "a.txt": "é", "sub/b": content });
  expect(await readText(directory, "a.txt")).toBe("é");
  expect((await directory.open("sub/b"))?.sizeBytes).toBe(100);
  expect(await directory.open("toString")).toBeUndefined();
});

test.each(["../a", "/a", "a/../b", "a//b", "", ".", "a\\b", "C:a"])(
  "a directory refuses the file name %j",
  async (file) => {
    const message = `m: a file name must stay inside the directory, got ${JSON.stringify(file)}`;
    await expect(memoryDirectory("m", {}).open(file)).rejects.toThrow(new FormatError(message));
    await expect(httpDirectory("m/").open(file)).rejects.toThrow(new FormatError(message));
  },
);

test("a web server with ranges is asked for no more than is read", async () => {
  let sent = 0;
  const url = await serve((request, response) => {
    if (request.url !== "/model/a%20b.bin") return void response.writeHead(404).end();
    const [first = 0, last = 0] = (request.headers.range ?? "").match(/\d+/g)?.map(Number) ?? [];
    const part = content.subarray(first, last + 1);
    sent += part.length;
    response.writeHead(206, { "content-range": `bytes ${first}-${last}/100` }).end(part);
  });
  const directory = httpDirectory(`${url}/`);
  const source = await directory.open("a b.bin");
  expect(source?.sizeBytes).toBe(100);
  expect([...((await source?.read(10, 3)) ?? [])]).toEqual([10, 11, 12]);
  expect(sent).toBe(4);
  expect(await directory.open("none.bin")).toBeUndefined();
});

test.each([
  ["ignores ranges", {}, 200],
  ["hides the size", {}, 206],
] as const)("a file on a web server that %s is downloaded whole", async (_, headers, status) => {
  const url = await serve((request, response) =>
    response
      .writeHead(request.headers.range ? status : 200, headers)
      .end(status === 206 && request.headers.range ? "x" : content),
  );
  const source = await httpDirectory(url).open("a");
  expect(source?.sizeBytes).toBe(100);
  expect([...((await source?.read(98, 2)) ?? [])]).toEqual([98, 99]);
});

test("a page in place of a file, as servers of single-page apps give, means that there is none", async () => {
  const url = await serve((_, response) => response.writeHead(200, { "content-type": "text/html" }).end("<html>"));
  expect(await httpDirectory(url).open("chat_template.jinja")).toBeUndefined();
  expect((await httpDirectory(url).open("report.html"))?.sizeBytes).toBe(6);
});

test("an empty file on a web server has no bytes", async () => {
  const url = await serve((_, response) => response.writeHead(416, { "content-range": "bytes */0" }).end());
  expect((await httpDirectory(url).open("a"))?.sizeBytes).toBe(0);
});

test("a web server's error names the address and the status", async () => {
  const url = await serve((_, response) => response.writeHead(503).end());
  await expect(httpDirectory(url).open("a")).rejects.toThrow(
    new FormatError(`${url}/a: the server must answer 200 or 206, got 503`),
  );
});

test("a file that shrinks on the web server is refused", async () => {
  let size = 100;
  const url = await serve((_, response) =>
    response.writeHead(206, { "content-range": `bytes 0-0/${size}` }).end(content.subarray(0, 1)),
  );
  const source = await httpDirectory(url).open("a");
  size = 1;
  await expect(source?.read(0, 10)).rejects.toThrow(
    new FormatError(
      `${url}/a: a range of 10 bytes was asked for, got 1 and status 206. Try again: the file may have changed`,
    ),
  );
});

test("a server that is not there is named", async () => {
  await expect(httpDirectory("http://127.0.0.1:1/m").open("a")).rejects.toThrow(
    new FormatError(
      "http://127.0.0.1:1/m/a: must be reachable, got TypeError: fetch failed. Check the address and the network",
    ),
  );
});

test("a text file must be UTF-8, JSON and not too long", async () => {
  const directory = memoryDirectory("m", {
    bad: Uint8Array.of(0xc3),
    long: "x".repeat(11),
    list: "[1]",
    bom: '\ufeff{"a":1}',
  });
  const refused = (file: string, message: string, limit?: number): Promise<void> =>
    expect(readJson(directory, file, limit)).rejects.toThrow(new FormatError(message));
  await refused("bad", "m/bad: must be UTF-8 text, got bytes that are not. Save it as UTF-8");
  await refused("long", "m/long: must be at most 10 bytes, got 11", 10);
  await refused("list", "m/list: must be a JSON object, got [1]");
  expect(await readJson(directory, "bom")).toEqual({ a: 1 });
  expect(await readJson(directory, "none")).toBeUndefined();
});

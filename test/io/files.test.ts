import { spawn } from "node:child_process";
import { mkdir, mkdtemp, readdir, readFile, rm, symlink, truncate, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import { FormatError } from "../../src/io/errors.ts";
import {
  appendLine,
  directoriesIn,
  diskDirectory,
  ensureWritableDirectory,
  fileSource,
  writeFileAtomic,
} from "../../src/io/files.ts";
import { readText } from "../../src/io/json.ts";

let dir = "";
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "lowrank-io-"));
});
afterEach(async () => {
  await rm(dir, { recursive: true, force: true });
});

async function* pieces(...parts: (string | Error)[]): AsyncGenerator<Uint8Array> {
  for (const part of parts) {
    if (part instanceof Error) throw part;
    yield new TextEncoder().encode(part);
  }
}

test.each<[what: string, content: () => string | Uint8Array | AsyncIterable<Uint8Array>]>([
  ["a string", () => "héllo"],
  ["bytes", () => new TextEncoder().encode("héllo")],
  ["pieces", () => pieces("hé", "", "llo")],
])("%s is written, over the old file, and leaves no other file", async (_, content) => {
  const path = join(dir, "a");
  await writeFile(path, "something that was longer before");
  await writeFileAtomic(path, content());
  expect(await readFile(path, "utf8")).toBe("héllo");
  expect(await readdir(dir)).toEqual(["a"]);
});

test("a failure in the middle of a write leaves the old file and no other, and is passed on", async () => {
  const path = join(dir, "a");
  await writeFile(path, "old");
  const failure = new Error("device lost");
  await expect(writeFileAtomic(path, pieces("ne", failure))).rejects.toBe(failure);
  expect(await readFile(path, "utf8")).toBe("old");
  expect(await readdir(dir)).toEqual(["a"]);
});

test("a process killed in the middle of a write leaves the old file", async () => {
  const path = join(dir, "a");
  await writeFile(path, "old");
  const script = join(dir, "writer.mts");
  const files = JSON.stringify(new URL("../../src/io/files.ts", import.meta.url).href);
  await writeFile(
    script,
    `import { writeFileAtomic } from ${files};
     async function* slow() { yield new Uint8Array(1000); console.log("half"); await new Promise((r) => setTimeout(r, 60000)); }
     await writeFileAtomic(${JSON.stringify(path)}, slow());`,
  );
  const writer = spawn(process.execPath, ["--import", "tsx", script], { stdio: ["ignore", "pipe", "inherit"] });
  await new Promise((resolve) => writer.stdout.once("data", resolve));
  writer.kill("SIGKILL");
  await new Promise((resolve) => writer.once("exit", resolve));
  expect(await readFile(path, "utf8")).toBe("old");
  expect((await readdir(dir)).filter((file) => file.endsWith(".tmp"))).toHaveLength(1);
});

test("a write into a directory that is not there says so", async () => {
  const path = join(dir, "none", "a");
  await expect(writeFileAtomic(path, "x")).rejects.toThrow(
    new FormatError(`${path}: must be a file that can be written, got ENOENT (nothing there). Check the path`),
  );
});

test("a write onto a directory says so and leaves no temporary file", async () => {
  await ensureWritableDirectory(join(dir, "d"));
  await expect(writeFileAtomic(join(dir, "d"), "x")).rejects.toThrow(
    new FormatError(
      `${join(dir, "d")}: must be a file that can be written, got EISDIR (a directory has this name). Choose another path`,
    ),
  );
  expect(await readdir(dir)).toEqual(["d"]);
});

test("lines are appended", async () => {
  const path = join(dir, "metrics.jsonl");
  await appendLine(path, '{"step":1}');
  await appendLine(path, '{"step":2}');
  expect(await readFile(path, "utf8")).toBe('{"step":1}\n{"step":2}\n');
});

test("a directory is made with its parents, and one that is there is taken", async () => {
  const path = join(dir, "a", "b");
  await ensureWritableDirectory(path);
  await ensureWritableDirectory(path);
  expect(await readdir(join(dir, "a"))).toEqual(["b"]);
});

test("a directory that cannot be made names the path and the reason", async () => {
  const path = join(dir, "file");
  await writeFile(path, "");
  await expect(ensureWritableDirectory(path)).rejects.toThrow(
    new FormatError(
      `${path}: must be a directory that can be written, got EEXIST (a file has this name). Choose another path`,
    ),
  );
  await expect(ensureWritableDirectory(join(path, "sub"))).rejects.toThrow(
    new FormatError(
      `${join(path, "sub")}: must be a directory that can be written, got ENOTDIR (a part of the path is a file). Choose another path`,
    ),
  );
});

test("a directory on disk opens its files, and says when it is none itself", async () => {
  await writeFile(join(dir, "a"), "abc");
  const source = await diskDirectory(dir).open("a");
  expect(source?.sizeBytes).toBe(3);
  expect(new TextDecoder().decode(await source?.read(1, 2))).toBe("bc");
  expect(await diskDirectory(dir).open("b")).toBeUndefined();
  const hint = `Check the path; relative paths start at ${process.cwd()}`;
  expect(() => diskDirectory(join(dir, "none"))).toThrow(
    new FormatError(`${join(dir, "none")}: must be a directory, got nothing there. ${hint}`),
  );
  expect(() => diskDirectory(join(dir, "a"))).toThrow(
    new FormatError(`${join(dir, "a")}: must be a directory, got a file. ${hint}`),
  );
  await expect(diskDirectory(dir).open("../a")).rejects.toThrow(
    new FormatError(`${dir}: a file name must stay inside the directory, got "../a"`),
  );
});

test("a file that is missing, is a directory, or shrinks while it is read is refused", async () => {
  const path = join(dir, "a");
  await expect(fileSource(path)).rejects.toThrow(
    new FormatError(`${path}: must be a file that can be read, got ENOENT (nothing there). Check the path`),
  );
  await expect(fileSource(dir)).rejects.toThrow(new FormatError(`${dir}: must be a file, got a directory`));
  await writeFile(path, "abcdef");
  const source = await fileSource(path);
  await truncate(path, 4);
  await expect(source.read(2, 4)).rejects.toThrow(
    new FormatError(`${path}: must keep its 6 bytes while it is read, got 4`),
  );
});

test("a directory by its name is read, and nothing that a link leads to", async () => {
  await mkdir(join(dir, "root/good"), { recursive: true });
  await mkdir(join(dir, "outside"));
  await writeFile(join(dir, "root/good/a.txt"), "inside");
  await writeFile(join(dir, "root/plain"), "a file");
  await writeFile(join(dir, "outside/a.txt"), "outside");
  await symlink(join(dir, "outside"), join(dir, "root/link"));
  await symlink(join(dir, "root/good"), join(dir, "root/alias"));
  await symlink(join(dir, "outside/a.txt"), join(dir, "root/good/linked.txt"));
  await symlink(join(dir, "outside"), join(dir, "root/good/sub"));
  await symlink(join(dir, "root"), join(dir, "root-link"));
  const textOf = async (root: string, name: string, file: string): Promise<string | undefined> => {
    const directory = await directoriesIn(join(dir, root))(name);
    return directory && readText(directory, file);
  };
  expect(await textOf("root", "good", "a.txt")).toBe("inside");
  expect(await textOf("root-link", "good", "a.txt"), "the root itself may be a link").toBe("inside");
  for (const file of ["linked.txt", "sub/a.txt", "nothing.txt"])
    expect(await textOf("root", "good", file)).toBeUndefined();
  for (const name of ["link", "alias", "plain", "nothing"])
    expect(await directoriesIn(join(dir, "root"))(name), name).toBeUndefined();
});

test.each(["..", ".", "", "a/b", "../outside", "a\\b", "C:"])("a directory is not named %j", async (name) => {
  await expect(directoriesIn(dir)(name)).rejects.toThrow(FormatError);
});

test("what goes wrong inside a directory by its name is said without the path to it", async () => {
  await mkdir(join(dir, "good/sub"), { recursive: true });
  const directory = await directoriesIn(dir)("good");
  await expect(directory?.open("sub")).rejects.toThrow(new FormatError("good/sub: must be a file, got a directory"));
  await writeFile(join(dir, "good/a"), "1234");
  const source = await directory?.open("a");
  await expect(source?.read(2, 3)).rejects.toThrow(
    new FormatError("good/a: a read must stay within its 4 bytes, got 3 from 2 on"),
  );
  await rm(join(dir, "good/a"));
  await expect(source?.read(0, 4)).rejects.toThrow(
    new FormatError("good/a: must be a file that can be read, got ENOENT (nothing there). Check the path"),
  );
});

test("directories are looked for in a directory", () => {
  expect(() => directoriesIn(join(dir, "nothing"))).toThrow(FormatError);
});

/**
 * The software adapter: SwiftShader and a Vulkan loader, out of the npm package `@sparticuz/chromium` (Linux x64).
 *
 * Node only, yet free of `node:` imports so that browser bundles of the engine stay clean: the built-in modules come from
 * `process.getBuiltinModule`.
 */
import { GpuError } from "./errors.ts";

const PACKAGE = "@sparticuz/chromium";

export interface SoftwareAdapter {
  /** Holds `libvk_swiftshader.so`, `libvulkan.so.1` and `vk_swiftshader_icd.json`. */
  readonly directory: string;
  /** Path of the Vulkan driver manifest, for `VK_ICD_FILENAMES`. */
  readonly icd: string;
}

/** Unpacks the software adapter into the temporary directory, once per package version, and says where it is. */
export function unpackSoftwareAdapter(): SoftwareAdapter {
  const directory = unpackArchive("swiftshader.tar.br");
  return { directory, icd: `${directory}/vk_swiftshader_icd.json` };
}

/**
 * Unpacks `bin/<archive>` (a brotli-compressed tar) of `@sparticuz/chromium` and returns the directory.
 *
 * Throws GpuError where the package is absent or the machine is not Linux x64.
 */
export function unpackArchive(archive: string): string {
  const { fs, os, path, zlib, module } = builtins();
  if (process.platform !== "linux" || process.arch !== "x64")
    throw new GpuError(
      `software adapter: needs Linux on x64, got ${process.platform} on ${process.arch}. Use a machine with a GPU`,
    );
  let entry: string;
  try {
    entry = module.createRequire(path.join(process.cwd(), "package.json")).resolve(PACKAGE);
  } catch {
    try {
      entry = module.createRequire(import.meta.url).resolve(PACKAGE);
    } catch {
      throw new GpuError(
        `software adapter: needs the npm package ${PACKAGE}, which is not installed. Run: npm install ${PACKAGE}`,
      );
    }
  }
  const root = entry.slice(0, entry.lastIndexOf(`/${PACKAGE}/`) + PACKAGE.length + 1);
  const { version } = JSON.parse(fs.readFileSync(`${root}/package.json`, "utf8")) as { version: string };
  const user = os.userInfo().uid;
  const target = path.join(os.tmpdir(), `lowrank-${user}`, `${archive.split(".")[0]}-${version}`);
  if (fs.existsSync(target)) {
    // Libraries are opened from here: another user must not have put them there.
    if (fs.statSync(target).uid !== user)
      throw new GpuError(
        `software adapter: ${target} must belong to user ${user}, got user ${fs.statSync(target).uid}. Remove it`,
      );
    return target;
  }
  // Unpacked beside the target and renamed, so that two processes starting together never see half of it.
  const partial = `${target}.${process.pid}`;
  fs.mkdirSync(partial, { recursive: true, mode: 0o700 });
  const tar = zlib.brotliDecompressSync(fs.readFileSync(`${root}/bin/${archive}`));
  for (const { name, bytes } of tarFiles(tar)) {
    fs.mkdirSync(path.dirname(path.join(partial, name)), { recursive: true });
    fs.writeFileSync(path.join(partial, name), bytes, { mode: 0o755 });
  }
  try {
    fs.renameSync(partial, target);
  } catch (error) {
    fs.rmSync(partial, { recursive: true, force: true });
    if (!fs.existsSync(target)) throw error;
  }
  return target;
}

/**
 * Makes Dawn find the software adapter: loads its Vulkan loader into this process and names its driver.
 *
 * `LD_LIBRARY_PATH` is read only when a process starts, so the loader is opened here by its path. RTLD_NODELETE keeps it
 * open although Node closes what is not an add-on; Dawn's own `dlopen("libvulkan.so.1")` then finds it by name.
 */
export function useSoftwareAdapter(): SoftwareAdapter {
  const software = unpackSoftwareAdapter();
  const RTLD_NODELETE = 0x1000;
  process.env.VK_ICD_FILENAMES = software.icd;
  process.env.VK_DRIVER_FILES = software.icd;
  try {
    process.dlopen(
      { exports: {} },
      `${software.directory}/libvulkan.so.1`,
      builtins().os.constants.dlopen.RTLD_NOW | RTLD_NODELETE,
    );
  } catch (error) {
    if (!String(error).includes("did not self-register")) throw new GpuError(`software adapter: ${String(error)}`);
  }
  return software;
}

function builtins() {
  const get = process.getBuiltinModule;
  return { fs: get("fs"), os: get("os"), path: get("path"), zlib: get("zlib"), module: get("module") };
}

/** Regular files of an uncompressed tar (POSIX ustar: 512-byte blocks, name at 0, size in octal at 124, type at 156). */
function* tarFiles(tar: Uint8Array): Generator<{ name: string; bytes: Uint8Array }> {
  const text = (from: number, length: number): string =>
    new TextDecoder().decode(tar.subarray(from, from + length)).replace(/\0.*$/s, "");
  for (let at = 0; at + 512 <= tar.length && tar[at] !== 0; ) {
    const size = Number.parseInt(text(at + 124, 12), 8);
    const type = text(at + 156, 1);
    const name = [text(at + 345, 155), text(at, 100)].filter(Boolean).join("/");
    if ((type === "0" || type === "") && !name.split("/").includes(".."))
      yield { name, bytes: tar.subarray(at + 512, at + 512 + size) };
    at += 512 + Math.ceil(size / 512) * 512;
  }
}

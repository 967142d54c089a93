/** Adapters that are written over others, by whatever command, and killed before any change of the disk. */
import { statSync } from "node:fs";
import { cp, mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Command } from "commander";
import { afterAll, beforeAll, describe, expect, test, vi } from "vitest";
import { combineCommand } from "../../src/cli/combine.ts";
import { convertCommand } from "../../src/cli/convert.ts";
import { extractCommand } from "../../src/cli/extract.ts";
import { attachLora } from "../../src/lora/attach.ts";
import { loadModelFrom, savePeftTo } from "../../src/node.ts";
import { testGpu } from "../harness.ts";
import { writeTinyModel } from "../tiny-model.ts";

/** So many changes are still made, and those that were. */
const disk = vi.hoisted(() => ({ left: Number.POSITIVE_INFINITY, changes: [] as string[] }));

vi.mock("node:fs/promises", async (original) => {
  const real = await original<typeof import("node:fs/promises")>();
  const change = (what: string): void => {
    if (disk.left-- <= 0) throw new Error("killed");
    disk.changes.push(what);
  };
  const open: typeof real.open = async (path, flags, mode) => {
    if (flags === "wx") change("write");
    else if (statSync(path).isDirectory()) change("sync");
    return real.open(path, flags, mode);
  };
  const rename: typeof real.rename = async (from, to) => {
    change("rename");
    return real.rename(from, to);
  };
  const remove: typeof real.rm = async (path, options) => {
    change("remove");
    return real.rm(path, options);
  };
  return { ...real, open, rename, rm: remove };
});

const GOLDEN = "test/golden";
const CONFIG = "adapter_config.json";
const [PEFT, MLX] = ["adapter_model.safetensors", "adapters.safetensors"];
let home = "";
const at = (name: string): string => join(home, name);
const run = async (command: Command, ...args: string[]): Promise<void> => {
  await command.exitOverride().parseAsync(args, { from: "user" });
};
const convert = (adapter: string, to: string, out: string): Promise<void> =>
  run(convertCommand(), "--adapter", `${GOLDEN}/${adapter}/adapter`, "--to", to, "--out", out);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-replace-"));
  for (const stream of [process.stdout, process.stderr]) vi.spyOn(stream, "write").mockReturnValue(true);
  await convert("adapters/rslora", "peft", at("peft"));
  await convert("adapters/rslora", "mlx", at("mlx"));
  for (const [seed, name] of ["base", "tuned"].entries()) await writeTinyModel(at(name), { seed });
});
afterAll(async () => {
  vi.restoreAllMocks();
  await rm(home, { recursive: true, force: true });
});

type Content = Readonly<Record<"weights" | "settings", string>>;
const contentOf = async (path: string, weights: string): Promise<Content> => {
  const text = (file: string): Promise<string> => readFile(join(path, file), "latin1").catch(() => "none");
  return { weights: await text(weights), settings: await text(CONFIG) };
};

const ORDER = ["write", "write", "remove", "sync", "rename", "sync", "rename", "sync"];

async function saved(alpha: number, out: string): Promise<void> {
  const model = await loadModelFrom(await testGpu(), `${GOLDEN}/models/qwen2`);
  const adapter = attachLora(model, { r: 2, alpha, targetModules: ["q_proj"] });
  await savePeftTo(adapter, out, "qwen2").finally(() => {
    adapter.detach();
    model.destroy();
  });
}

describe.each<[what: string, old: string, weights: string, write: (out: string) => Promise<void>]>([
  ["savePeftTo", "peft", PEFT, (out) => saved(4, out)],
  ["convert --to peft", "peft", PEFT, (out) => convert("adapters/patterns", "peft", out)],
  ["convert --to mlx", "mlx", MLX, (out) => convert("adapters/patterns", "mlx", out)],
  [
    "combine",
    "peft",
    PEFT,
    (out) => {
      const places = ["a", "b"].flatMap((name) => ["--adapter", `${GOLDEN}/adapters/combined/${name}`]);
      return run(combineCommand(), ...places, "--out", out);
    },
  ],
  [
    "extract",
    "peft",
    PEFT,
    (out) => run(extractCommand(), "--model", at("base"), "--tuned", at("tuned"), "--rank", "2", "--out", out),
  ],
])("%s over another adapter", (_, old, weights, write) => {
  test("killed anywhere leaves the old one, the new one or none, and never the weights of one with the settings of another", async () => {
    const [out, before] = [at("out"), await contentOf(at(old), weights)];
    const states: Content[] = [];
    for (let left = 0; left <= ORDER.length; left++) {
      await rm(out, { recursive: true, force: true });
      await cp(at(old), out, { recursive: true });
      [disk.left, disk.changes] = [left, []];
      const ended = await write(out).then(
        () => "done",
        (error: Error) => error.message,
      );
      disk.left = Number.POSITIVE_INFINITY;
      expect(ended).toBe(left < ORDER.length - 1 ? "killed" : "done"); // the last sync is a favour
      expect(disk.changes).toEqual(ORDER.slice(0, left));
      states.push(await contentOf(out, weights));
    }
    const after = states.at(-1) ?? before;
    expect(after.settings).not.toBe(before.settings);
    expect(after.weights).not.toBe(before.weights);
    for (const { settings, weights: found } of states)
      if (settings !== "none")
        expect({ settings, weights: found }).toEqual(settings === before.settings ? before : after);
    expect(states.slice(0, 3), "until all is written the old one").toEqual([before, before, before]);
  });
});

test("where the settings stay the same they stay there, and weights alone are replaced", async () => {
  await saved(4, at("same"));
  disk.changes = [];
  await saved(4, at("same"));
  expect(disk.changes).toEqual(["write", "write", "rename", "sync", "rename", "sync"]);
});

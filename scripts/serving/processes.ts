/** What the checks of real servers share: adapters of the embedded model, and `lowrank serve` in processes of their own. */
import { type ChildProcess, spawn } from "node:child_process";
import { join } from "node:path";
import { attachLora, openGpu, Random } from "../../src/index.ts";
import { loadModelFrom, savePeftTo } from "../../src/node.ts";

export const BASE = "demo/base";

/** Directories of random adapters of the embedded model, of ranks 2, 5, 8, …, the third a DoRA. */
export async function randomAdapters(folder: string, names: readonly string[]): Promise<void> {
  const gpu = await openGpu();
  const model = await loadModelFrom(gpu, BASE);
  for (const [i, name] of names.entries()) {
    const random = new Random(100 + i);
    const settings = { r: 2 + 3 * (i % 5), alpha: 8, targetModules: "all-linear", useDora: i === 2 };
    const adapter = attachLora(model, settings, i);
    for (const { B } of adapter.pairs.values())
      gpu.write(
        B,
        Float32Array.from({ length: B.size }, () => random.normal(0, 0.05)),
      );
    await savePeftTo(adapter, join(folder, name), BASE);
    adapter.detach();
  }
  gpu.destroy();
}

export interface Server {
  readonly child: ChildProcess;
  readonly base: string;
  readonly port: number;
  /** Asks it to stop, and gives its exit code. */
  stop(): Promise<number | null>;
}

/** `lowrank serve` with these flags, once it takes requests, at a free port. */
export async function startServer(flags: readonly string[]): Promise<Server> {
  const command = ["--import", "tsx", "--import", "./scripts/wgsl.mjs", "src/cli/main.ts", "serve", "--port", "0"];
  const child = spawn(process.execPath, [...command, ...flags], { stdio: ["ignore", "ignore", "pipe"] });
  const port = await new Promise<number>((resolve, reject) => {
    let text = "";
    child.stderr.on("data", (piece) => {
      text += String(piece);
      const [, found] = /at http:\/\/[\d.]+:(\d+)\/v1/.exec(text) ?? [];
      if (found) resolve(Number(found));
    });
    child.once("exit", (code) => reject(new Error(`serve: it must start, got exit code ${code}: ${text}`)));
  });
  const stop = (): Promise<number | null> =>
    new Promise((done) => {
      if (child.exitCode !== null || child.signalCode !== null) done(child.exitCode);
      child.once("exit", done);
      child.kill("SIGTERM");
    });
  return { child, base: `http://127.0.0.1:${port}`, port, stop };
}

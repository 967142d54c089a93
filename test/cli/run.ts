/** Runs the command line as a user does, in a process of its own, from the sources. */
import { type ChildProcessWithoutNullStreams, spawn } from "node:child_process";

export interface Ended {
  /** Undefined when a signal ended it. */
  readonly code: number | undefined;
  readonly stdout: string;
  /** Without what graphics drivers of this machine print there on their own. */
  readonly stderr: string;
}

const DRIVER_NOISE = /^(error: XDG_RUNTIME_DIR .*|Warning: Vulkan .*| - While .*| +at InitializeImpl .*|)$/;

export interface Run {
  readonly child: ChildProcessWithoutNullStreams;
  readonly ended: Promise<Ended>;
  /** Resolves once stderr holds this text. */
  saw(text: string): Promise<void>;
}

/** Where `isAsked`, its stdin is the test's to write and to end; else it is empty. */
export function start(
  args: readonly string[],
  env: Readonly<Record<string, string>> = {},
  { isAsked = false }: { readonly isAsked?: boolean } = {},
): Run {
  const command = ["--import", "tsx", "--import", "./scripts/wgsl.mjs", "src/cli/main.ts", ...args];
  const child = spawn(process.execPath, command, { env: { ...process.env, ...env }, stdio: "pipe" });
  if (!isAsked) child.stdin.end();
  const output = { stdout: "", stderr: "" };
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    output.stdout += text;
  });
  child.stderr.setEncoding("utf8").on("data", (text: string) => {
    output.stderr += text;
  });
  const ended = new Promise<Ended>((resolve) => {
    child.on("close", (code) => {
      const lines = output.stderr.split("\n").filter((line) => !DRIVER_NOISE.test(line));
      resolve({ code: code ?? undefined, stdout: output.stdout, stderr: lines.join("\n") });
    });
  });
  const saw = (text: string): Promise<void> =>
    new Promise((resolve, reject) => {
      const look = (): void => {
        if (output.stderr.includes(text)) resolve();
      };
      child.stderr.on("data", look);
      child.on("close", () => reject(new Error(`stderr never held ${JSON.stringify(text)}:\n${output.stderr}`)));
      look();
    });
  return { child, ended, saw };
}

export const lowrank = (args: readonly string[], env?: Readonly<Record<string, string>>): Promise<Ended> =>
  start(args, env).ended;

/** The last line of stdout, as --json writes it. */
export const lastJson = ({ stdout }: Ended): Record<string, unknown> =>
  JSON.parse(stdout.trimEnd().split("\n").at(-1) ?? "") as Record<string, unknown>;

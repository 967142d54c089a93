import { execFileSync } from "node:child_process";

/** The commit at hand, marked if files that are measured differ from it. */
export function commit(): string {
  const git = (...command: string[]): string =>
    execFileSync("git", command, { encoding: "utf8", stdio: "pipe" }).trim();
  try {
    const isClean = git("status", "--porcelain", "--", "src", "bench", ":!bench/results") === "";
    return git("rev-parse", "HEAD") + (isClean ? "" : "-dirty");
  } catch {
    return "unknown";
  }
}

// Type-checks the examples of README.md, one after the other in one file, against the built package. Run `npm run build` first.
import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";

const examples = [...readFileSync("README.md", "utf8").matchAll(/^```ts\n(.*?)^```$/gms)].map(([, code]) => code);
if (examples.length < 2) throw new Error(`check-readme: README.md must have two examples, got ${examples.length}`);
mkdirSync("out/readme", { recursive: true });
writeFileSync("out/readme/examples.ts", examples.join("\n"));
const settings = ["--module", "nodenext", "--target", "es2024", "--types", "node", "--strict", "--noEmit"];
try {
  execFileSync("npx", ["tsc", "--ignoreConfig", ...settings, "out/readme/examples.ts"], { stdio: "inherit" });
  console.log(`check-readme: ${examples.length} examples fit the package`);
} finally {
  rmSync("out/readme", { recursive: true });
}

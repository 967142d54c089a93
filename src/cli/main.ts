#!/usr/bin/env node
import { Command } from "commander";
import { chatCommand } from "./chat.ts";
import { combineCommand } from "./combine.ts";
import { convertCommand } from "./convert.ts";
import { dataCommand } from "./data.ts";
import { doctorCommand } from "./doctor.ts";
import { evalCommand } from "./eval.ts";
import { extractCommand } from "./extract.ts";
import { generateCommand } from "./generate.ts";
import { inspectCommand } from "./inspect.ts";
import { logitsCommand } from "./logits.ts";
import { mergeCommand } from "./merge.ts";
import { planCommand } from "./plan.ts";
import { quantizeCommand } from "./quantize.ts";
import { withConfig } from "./run-config.ts";
import { serveCommand } from "./serve.ts";
import { exitCode, say } from "./session.ts";
import { sweepCommand } from "./sweep.ts";
import { trainCommand } from "./train.ts";
import { version } from "./version.ts";

const program = new Command("lowrank")
  .description("Fine-tune and serve LoRA adapters of Hugging Face models on any GPU, through WebGPU")
  .version(version())
  .addCommand(trainCommand())
  .addCommand(sweepCommand())
  .addCommand(dataCommand())
  .addCommand(planCommand())
  .addCommand(evalCommand())
  .addCommand(generateCommand())
  .addCommand(chatCommand())
  .addCommand(serveCommand())
  .addCommand(mergeCommand())
  .addCommand(quantizeCommand())
  .addCommand(combineCommand())
  .addCommand(convertCommand())
  .addCommand(extractCommand())
  .addCommand(inspectCommand())
  .addCommand(logitsCommand())
  .addCommand(doctorCommand())
  .addHelpText(
    "after",
    "\nLOWRANK_ADAPTER=auto|hardware|software chooses the adapter; LOWRANK_DEBUG=1 shows where an error arose.",
  );

// The reader of a pipe has seen enough, as `head` has.
process.stdout.on("error", (error: NodeJS.ErrnoException) => process.exit(error.code === "EPIPE" ? 0 : 1));

try {
  const [name = "", ...args] = process.argv.slice(2);
  const command = program.commands.find((one) => one.name() === name);
  await program.parseAsync(command ? [name, ...(await withConfig(command, args))] : process.argv.slice(2), {
    from: "user",
  });
} catch (error) {
  say(`error: ${error instanceof Error ? error.message : String(error)}`);
  if (process.env.LOWRANK_DEBUG === "1" && error instanceof Error) say(error.stack ?? "");
  process.exitCode = exitCode(error);
}

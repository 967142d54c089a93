/** How the commands that write text draw it. */
import { Option } from "commander";
import { numeric, whole } from "./options.ts";

/** What `samplingOptions` give. */
export interface SamplingArguments {
  readonly maxTokens: number;
  readonly temperature?: number;
  readonly topK?: number;
  readonly topP?: number;
  readonly minP?: number;
  readonly repetitionPenalty?: number;
  readonly stop?: readonly string[];
  readonly seed?: number;
}

export function samplingOptions(command: string, maxTokens: number): Option[] {
  const share = (flags: string, description: string, holds: (x: number) => boolean): Option =>
    numeric(command, flags, description, {
      rule: holds(0) ? "a number from 0 to 1" : "a number above 0 and at most 1",
      holds,
    });
  return [
    whole(command, "--max-tokens <n>", "stop after so many tokens", 0, maxTokens),
    numeric(
      command,
      "--temperature <t>",
      "0: always the likeliest token; above: drawn at random (default: 0, or 1 with an option that limits the draw)",
      {
        rule: "a number of at least 0",
        holds: (x) => x >= 0 && Number.isFinite(x),
      },
    ),
    whole(command, "--top-k <n>", "draw among so many of the likeliest tokens", 1),
    share("--top-p <p>", "draw among the likeliest tokens that together have this share", (x) => x > 0 && x <= 1),
    share(
      "--min-p <p>",
      "draw tokens of at least this share of the likeliest one's probability",
      (x) => x >= 0 && x <= 1,
    ),
    numeric(command, "--repetition-penalty <x>", "make tokens that were there less likely (above 1)", {
      rule: "a number above 0",
      holds: (x) => x > 0 && Number.isFinite(x),
    }),
    new Option("--stop <text...>", "end before any of these texts"),
    whole(command, "--seed <n>", "seed of the random draws (default: 0)", 0),
  ];
}

/** The temperature that is meant: 1 where it is not given and the draw is limited. */
export const temperatureOf = ({ temperature, topK, topP, minP }: SamplingArguments): number =>
  temperature ?? ([topK, topP, minP].some((limit) => limit !== undefined) ? 1 : 0);

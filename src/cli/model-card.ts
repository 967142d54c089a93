/** `README.md` beside an adapter: what the Hub shows of it. */
import { stringify } from "yaml";

export interface ModelCard {
  /** Directory or Hub id of the base. */
  readonly baseModel: string;
  readonly isOnHub: boolean;
  readonly taskType: string;
  /** What the run was and came to, by name. */
  readonly facts: readonly (readonly [name: string, value: string])[];
  /** The command that made it. */
  readonly command: string;
}

/** Markdown with the front matter that the Hub reads. The base is named there only where it is one of the Hub's. */
export function modelCard({ baseModel, isOnHub, taskType, facts, command }: ModelCard): string {
  const front = {
    ...(isOnHub && { base_model: baseModel }),
    library_name: "peft",
    pipeline_tag: taskType === "SEQ_CLS" ? "text-classification" : "text-generation",
    tags: [...(isOnHub ? [`base_model:adapter:${baseModel}`] : []), "lora", "lowrank"],
  };
  const cell = (text: string): string => text.replaceAll("|", "\\|").replaceAll("\n", " ");
  return `---
${stringify(front)}---

# LoRA adapter of ${baseModel}

Load it with PEFT, or with lowrank:

\`\`\`
${usesOf(taskType, `--model ${baseModel}`).join("\n")}
\`\`\`

|  |  |
| --- | --- |
${facts.map(([name, value]) => `| ${cell(name)} | ${cell(value)} |`).join("\n")}

Made by:

\`\`\`
${command}
\`\`\`
`;
}

const usesOf = (taskType: string, model: string): string[] =>
  taskType === "SEQ_CLS"
    ? [`lowrank eval ${model} --adapter <this directory> --data rows.jsonl`]
    : [
        `lowrank generate ${model} --adapter <this directory> --prompt "…"   # the prompt as it is`,
        `lowrank chat ${model} --adapter mine=<this directory>              # messages, by the model's chat template`,
      ];

import { createContext, runInContext } from "node:vm";
import { parseHTML } from "linkedom";
import { describe, expect, test } from "vitest";
import { parse } from "yaml";
import { modelCard } from "../../src/cli/model-card.ts";
import { type RunReport, reportPage } from "../../src/cli/report-page.ts";

const REPORT: RunReport = {
  title: "Pirates & <others>",
  facts: [["steps", "3"]],
  metrics: [1, 2, 3].map((step) => ({
    step,
    loss: 3 / step,
    learning_rate: 1e-3,
    grad_norm: step === 2 ? Number.NaN : 1,
  })),
  validation: [{ step: 3, loss: 1.25, accuracy: 0.5 }],
  norms: [
    { module: "model.layers.0.q_proj", norm: 2 },
    { module: "model.layers.0.v_proj", norm: 0.5 },
  ],
  samples: [{ step: 3, prompt: "Once", text: " there </script><b>was" }],
  tables: { Memory: [["peak", "1 MiB"]], Empty: [] },
  texts: { Configuration: "rank: 8\n", Profile: "" },
};

describe("report.html", () => {
  test("shows what the run was: facts, curves, norms, samples, tables and texts", async () => {
    const { document } = parseHTML(await reportPage(REPORT));
    expect(document.querySelector("h1")?.textContent).toBe("Pirates & <others>");
    expect([...document.querySelectorAll("figcaption")].map((e) => e.textContent)).toEqual([
      "Loss",
      "Learning rate",
      "Gradient norm",
      "Accuracy",
    ]);
    expect([...document.querySelectorAll("h2")].map((e) => e.textContent)).toEqual([
      "Norm of the update, by module",
      "Samples",
      "Memory",
      "Configuration",
    ]);
    expect([...document.querySelectorAll(".bar i")].map((e) => e.getAttribute("style"))).toEqual([
      "width:100.0%",
      "width:25.0%",
    ]);
    expect(document.querySelector("h3 + pre")?.textContent).toBe("Once there </script><b>was");
  });

  test("has each curve's numbers, a gap where one is not finite", async () => {
    const page = await reportPage(REPORT);
    const charts = JSON.parse(/const charts = (.*);\n/.exec(page)?.[1] ?? "") as { curves: unknown[] }[];
    expect(charts[0]?.curves).toEqual([
      { label: "training", steps: [1, 2, 3], values: [3, 1.5, 1] },
      { label: "validation", steps: [3], values: [1.25] },
    ]);
    expect(charts[2]?.curves).toEqual([{ label: "gradient norm", steps: [1, 2, 3], values: [1, null, 1] }]);
  });

  test("draws its curves in a browser whose language is none that numbers can be formatted in", async () => {
    const [, script = ""] = /<script>([\s\S]*?)<\/script>/.exec(await reportPage(REPORT)) ?? [];
    const { document } = parseHTML("<html></html>");
    const browser: object = { document, navigator: { language: "en-US@posix" }, devicePixelRatio: 1 };
    const window = { ...browser, addEventListener: () => {}, dispatchEvent: () => {}, matchMedia: () => window };
    const page = createContext({ ...browser, ...window, window, CustomEvent });
    expect(runInContext(`${script}; typeof uPlot`, page)).toBe("function");
  });

  test("fetches nothing and lets no text out of its place", async () => {
    const page = await reportPage(REPORT);
    const { document } = parseHTML(page);
    expect(document.querySelectorAll("script").length).toBe(2);
    expect(document.querySelectorAll("[src], link, [href]").length).toBe(0);
    expect(page.replace(/<script>[\s\S]*?<\/script>/g, "")).not.toMatch(/https?:/);
  });
});

describe("the model card", () => {
  const facts = [
    ["rank", "8"],
    ["validation loss", "1.2 | best"],
  ] as const;

  test("names a base on the Hub where the Hub looks for it", () => {
    const card = modelCard({
      baseModel: "org/base",
      isOnHub: true,
      taskType: "CAUSAL_LM",
      facts,
      command: "lowrank train --rank 8",
    });
    expect(parse(card.split("---\n")[1] ?? "")).toEqual({
      base_model: "org/base",
      library_name: "peft",
      pipeline_tag: "text-generation",
      tags: ["base_model:adapter:org/base", "lora", "lowrank"],
    });
    expect(card).toContain("| validation loss | 1.2 \\| best |");
    expect(card).toContain("```\nlowrank train --rank 8\n```");
    expect(card).toContain("lowrank chat --model org/base --adapter mine=<this directory>");
  });

  test("names no directory as one", () => {
    const card = modelCard({ baseModel: "models/base", isOnHub: false, taskType: "SEQ_CLS", facts, command: "x" });
    expect(parse(card.split("---\n")[1] ?? "")).toEqual({
      library_name: "peft",
      pipeline_tag: "text-classification",
      tags: ["lora", "lowrank"],
    });
    expect(card).toContain("```\nlowrank eval --model models/base --adapter <this directory> --data rows.jsonl\n```");
  });
});

// What each command says to bad input, word for word. In this process: a command throws what the process would print.
import { mkdtemp, open, readFile, rm, unlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import type { Command } from "commander";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test, vi } from "vitest";
import { evalCommand } from "../../src/cli/eval.ts";
import { generateCommand } from "../../src/cli/generate.ts";
import { logitsCommand } from "../../src/cli/logits.ts";
import { mergeCommand } from "../../src/cli/merge.ts";
import { planCommand } from "../../src/cli/plan.ts";
import { trainCommand } from "../../src/cli/train.ts";
import { GpuError } from "../../src/gpu/errors.ts";
import { Gpu, openGpu } from "../../src/gpu/gpu.ts";
import { FormatError } from "../../src/io/errors.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { readConfig } from "../../src/models/config.ts";
import { weightShapes } from "../../src/models/load.ts";
import { diskDirectory, loadModelFrom, savePeftTo } from "../../src/node.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { floatTensor, type TinyModelOptions, writeTinyModel } from "../tiny-model.ts";

let home = "";
const at = (name: string): string => join(home, name);
const run = (command: Command, ...args: string[]): Promise<Command> =>
  command
    .exitOverride()
    .configureOutput({ writeErr: () => {} })
    .parseAsync(args, { from: "user" });

const evaluate = (name: string, ...more: string[]): Promise<Command> =>
  run(evalCommand(), "--model", at(name), "--data", at("ids.jsonl"), ...more);
const train = (...more: string[]): Promise<Command> =>
  run(trainCommand(), "--model", at("model"), "--data", at("ids.jsonl"), "--out", at("out"), ...more);

async function model(name: string, options?: TinyModelOptions): Promise<string> {
  await writeTinyModel(at(name), options);
  return at(name);
}

/** A model without its weights. */
async function unlinkWeights(name: string): Promise<void> {
  await model(name);
  await unlink(at(`${name}/model.safetensors`));
}

async function data(name: string, ...lines: string[]): Promise<string[]> {
  await writeFile(at(name), lines.join("\n"));
  return ["--data", at(name)];
}

async function adapter(of: string, name: string, config: Partial<LoraConfig> = {}): Promise<string> {
  const gpu = await openGpu();
  const lora = attachLora(await loadModelFrom(gpu, at(of)), { r: 4, alpha: 8, targetModules: ["q_proj"], ...config });
  await savePeftTo(lora, at(name), of);
  gpu.destroy();
  return at(name);
}

beforeAll(async () => {
  vi.spyOn(process.stderr, "write").mockReturnValue(true);
  vi.spyOn(process.stdout, "write").mockReturnValue(true);
  home = await mkdtemp(join(tmpdir(), "lowrank-errors-"));
  await model("model");
  await data("ids.jsonl", '{"input_ids":[1,2,3]}', "", '{"input_ids":[4,5]}');
});
afterAll(async () => {
  vi.restoreAllMocks();
  await rm(home, { recursive: true, force: true });
});

test.each([
  ["--rank", "0", "a whole number of at least 1"],
  ["--rank", "1.5", "a whole number of at least 1"],
  ["--alpha", "0", "a number above 0"],
  ["--steps", "many", "a whole number of at least 1"],
  ["--epochs", "-1", "a whole number of at least 1"],
  ["--batch-size", "0", "a whole number of at least 1"],
  ["--grad-accumulation", "0", "a whole number of at least 1"],
  ["--learning-rate", "-1", "a number of at least 0"],
  ["--warmup", "2", "a fraction from 0 to 1"],
  ["--weight-decay", "NaN", "a number of at least 0"],
  ["--max-grad-norm", "Infinity", "a number of at least 0"],
  ["--max-length", "1", "a whole number of at least 2"],
  ["--seed", "-3", "a whole number of at least 0"],
  ["--dropout", "1", "a number of at least 0 and below 1"],
])("train %s %s is refused by the rule for it", async (flag, value, rule) => {
  await expect(train(flag, value)).rejects.toThrow(new ShapeError(`train: ${flag} must be ${rule}, got ${value}`));
});

test.each(["x", "7,", "embed_tokens=", "-3"])("train --trainable-token-indices %s is refused", async (value) => {
  await expect(train(`--trainable-token-indices=${value}`)).rejects.toThrow(
    new ShapeError(
      `train: --trainable-token-indices must be ids such as 7,9, or embed_tokens=7,9;lm_head=7, got ${value}`,
    ),
  );
});

test("eval says which settings of an adapter nobody knows, and goes on", async () => {
  const place = await adapter("model", "strange");
  const file = join(place, "adapter_config.json");
  const json = JSON.parse(await readFile(file, "utf8")) as object;
  await writeFile(file, JSON.stringify({ ...json, lora_magic: 1 }));
  await evaluate("model", "--adapter", place);
  expect(process.stderr.write).toHaveBeenCalledWith(
    "warning: adapter_config.json has keys that PEFT 0.21 does not know: lora_magic\n",
  );
});

test("a number that is missing is refused", async () => {
  await expect(train("--rank", "")).rejects.toThrow(
    new ShapeError("train: --rank must be a whole number of at least 1, got nothing"),
  );
});

test.each([
  [["--steps", "3", "--epochs", "1"], "error: option '--steps <n>' cannot be used with option '--epochs <n>'"],
  [
    ["--init-adapter", "x", "--rank", "8"],
    "error: option '--init-adapter <place>' cannot be used with option '--rank <n>'",
  ],
  [
    ["--init-adapter", "x", "--alpha", "8"],
    "error: option '--init-adapter <place>' cannot be used with option '--alpha <x>'",
  ],
  [
    ["--init-adapter", "x", "--target-modules", "q_proj"],
    "error: option '--init-adapter <place>' cannot be used with option '--target-modules <which>'",
  ],
  [
    ["--init-adapter", "x", "--dropout", "0.1"],
    "error: option '--init-adapter <place>' cannot be used with option '--dropout <p>'",
  ],
  [
    ["--schedule", "step"],
    "error: option '--schedule <name>' argument 'step' is invalid. Allowed choices are linear, cosine, constant.",
  ],
  [["--speed", "9"], "error: unknown option '--speed'\n(Did you mean --seed?)"],
])("train %s is refused", async (args, message) => {
  await expect(train(...args)).rejects.toThrow(message);
});

test("a weights file that is cut short is named, with what is missing", async () => {
  const file = join(await model("cut"), "model.safetensors");
  const whole = await readFile(file);
  await writeFile(file, whole.subarray(0, whole.length - 4));
  const bytes = whole.length - 8 - Number(whole.readBigUInt64LE(0));
  await expect(evaluate("cut")).rejects.toThrow(
    new FormatError(
      `${file}: tensor "model.norm.weight" must lie within the ${bytes - 4} bytes of data, got [${bytes - 128},${bytes}]. The file is damaged: get it again`,
    ),
  );
});

test("a header that lies about its length is refused", async () => {
  const file = join(await model("liar"), "model.safetensors");
  const handle = await open(file, "r+");
  const { size } = await handle.stat();
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(size));
  await handle.write(prefix, 0, 8, 0);
  await handle.close();
  await expect(evaluate("liar")).rejects.toThrow(
    new FormatError(
      `${file}: the header must fit into the file, got a header of ${size} bytes in a file of ${size}. The file is damaged: get it again`,
    ),
  );
});

test("a shard that is missing is named, with the index that asks for it", async () => {
  const path = await model("shards");
  await unlink(join(path, "model.safetensors"));
  const index = { weight_map: { "model.norm.weight": "model-00002-of-00002.safetensors" } };
  await writeFile(join(path, "model.safetensors.index.json"), JSON.stringify(index));
  await expect(evaluate("shards")).rejects.toThrow(
    new FormatError(
      `${path}/model-00002-of-00002.safetensors: the shard must be there by ${path}/model.safetensors.index.json, got no such file. Download the model again`,
    ),
  );
});

test("a tensor that is missing is named, with some that are there", async () => {
  const path = await model("hole", { edit: (all) => all.filter(({ name }) => name !== "model.norm.weight") });
  const names = [...weightShapes(await readConfig(diskDirectory(path))).keys()]
    .filter((n) => n !== "model.norm.weight")
    .sort();
  await expect(evaluate("hole")).rejects.toThrow(
    new FormatError(
      `${path}/model.safetensors: tensor "model.norm.weight" must be there, got ${names.slice(0, 8).join(", ")} and ${names.length - 8} more`,
    ),
  );
});

test("a tensor of a wrong shape is refused with both shapes", async () => {
  const norm = floatTensor("model.norm.weight", [16], new Float32Array(16));
  const path = await model("shape", { edit: (all) => [...all.filter(({ name }) => name !== norm.name), norm] });
  await expect(evaluate("shape")).rejects.toThrow(
    new FormatError(`${path}/model.safetensors: tensor "model.norm.weight" must be [32], got [16]`),
  );
});

test("a model of another architecture is refused before anything is loaded", async () => {
  const path = await model("mamba", { config: { model_type: "mamba" } });
  await expect(evaluate("mamba")).rejects.toThrow(
    new FormatError(
      `${path}/config.json: "model_type" must be one of llama, mistral, qwen2, qwen3, smollm3, gemma2, gemma3_text, phi3, olmo2, granite, gpt2, got "mamba"`,
    ),
  );
});

test("an adapter of another model is refused with what does not fit", async () => {
  await model("wide", { config: { hidden_size: 64 } });
  const wide = await adapter("wide", "wide-adapter");
  await expect(evaluate("model", "--adapter", wide)).rejects.toThrow(
    new FormatError(
      `${wide}/adapter_model.safetensors: tensor "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" must be [4,32], got [4,64]`,
    ),
  );
  await model("deep", { config: { num_hidden_layers: 3 } });
  const deep = await adapter("deep", "deep-adapter");
  await expect(evaluate("model", "--adapter", deep)).rejects.toThrow(
    new FormatError(
      `${deep}/adapter_model.safetensors: the tensors must be those that adapter_config.json and the model ask for, got unknown base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight, base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight. Is it an adapter of this model?`,
    ),
  );
});

test("a target that matches no module lists those there are", async () => {
  const choices = "The model has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, embed_tokens, lm_head";
  await expect(train("--target-modules", "q_proj,qkv")).rejects.toThrow(
    new ShapeError(`target modules: "qkv" must match a module, got none. ${choices}`),
  );
  await expect(train("--target-modules", "/q_proj/")).rejects.toThrow(
    new ShapeError(`target modules: "q_proj" must match a module, got none. ${choices}`),
  );
  await expect(train("--target-modules", ",")).rejects.toThrow(
    new ShapeError(`target modules: at least one is needed, got an empty list. ${choices}`),
  );
});

test("an adapter with dropout is trained on, with its dropout", async () => {
  const path = await adapter("model", "dropout", { dropout: 0.5 });
  const lossOf = async (from: string): Promise<number> => {
    await train("--init-adapter", from, "--steps", "1", "--seed", "4", "--no-shuffle");
    return JSON.parse(await readFile(at("out/metrics.jsonl"), "utf8")).grad_norm;
  };
  const without = await adapter("model", "no-dropout");
  expect(await lossOf(path)).not.toBe(await lossOf(without));
  expect(JSON.parse(await readFile(at("dropout/adapter_config.json"), "utf8"))).toMatchObject({ lora_dropout: 0.5 });
});

describe("memory", () => {
  const plan = (...more: string[]): Promise<Command> => run(planCommand(), "--model", at("model"), ...more);
  const printed = (): string =>
    vi
      .mocked(process.stdout.write)
      .mock.calls.map(([text]) => text)
      .join("");

  beforeEach(() => {
    vi.mocked(process.stdout.write).mockClear();
  });
  afterEach(() => {
    process.exitCode = undefined;
  });

  test("a run that cannot fit is refused before anything is loaded, with what would make it fit", async () => {
    await unlinkWeights("light");
    const many = await data("many.jsonl", ...new Array(4).fill(JSON.stringify({ input_ids: new Array(64).fill(1) })));
    const args = ["--model", at("light"), ...many, "--out", at("out"), "--batch-size", "4"];
    await expect(run(trainCommand(), ...args, "--budget", "1MiB")).rejects.toThrow(
      /^plan: a run must fit into 1\.0 MiB of GPU memory, got [\d.]+ MiB: weights 81\.3 KiB, adapter [\d.]+ KiB, gradients [\d.]+ KiB, optimizer [\d.]+ KiB, activations [\d.]+ MiB\. Use --checkpointing, which takes 9[\d.]+ KiB$/,
    );
    await expect(run(trainCommand(), ...args, "--budget", "600KiB")).rejects.toThrow(
      /Use --checkpointing --batch-size [12], which takes [\d.]+ KiB$/,
    );
    await expect(run(trainCommand(), ...args, "--budget", "100KiB")).rejects.toThrow(
      /^plan: .*\. Use a smaller model or another device: no batch is small enough$/,
    );
  });

  test("plan says where it goes and whether it fits", async () => {
    await plan("--budget", "1GiB", "--rank", "4", "--batch-size", "2");
    expect(printed()).toMatch(
      /^weights +[\d.]+ KiB\nadapter +[\d.]+ KiB\ngradients +[\d.]+ KiB\noptimizer +[\d.]+ KiB\nactivations +[\d.]+ .iB\nother +[\d.]+ KiB\npeak +[\d.]+ .iB\n32.00 bits a weight in the linear layers, 32.00 in the whole model\n\d+ dispatches a step of 128 tokens\nfits into 1\.0 GiB\n$/,
    );
    expect(process.exitCode).toBeUndefined();
  });

  test("plan fails where it does not fit, and says what would", async () => {
    await plan("--budget", "1000000", "--json");
    const { fits, advice, peak, budget } = JSON.parse(printed());
    expect({ fits, budget }).toEqual({ fits: false, budget: 1_000_000 });
    expect(peak).toBeGreaterThan(1_000_000);
    expect(advice).toMatch(/^Use --checkpointing.*, which takes [\d.]+ KiB$/);
    expect(process.exitCode).toBe(1);
  });

  test.each(["lots", "-1", "8GB"])("a budget of %s is refused", async (budget) => {
    await expect(plan("--budget", budget)).rejects.toThrow(
      new ShapeError(`plan: --budget must be a size such as 8GiB, 500MiB or 1000000, got ${budget}`),
    );
  });
});

describe("a device that is lost in the middle", () => {
  const gone = new GpuError("the device was lost (injected). Open a new one with openGpu");
  let spies: { mockRestore(): void }[] = [];
  /** Training loses its device in a step: from then on nothing can be read. */
  function loseDevice(inStep: number): void {
    let steps = 0;
    const { throttle, read } = Gpu.prototype;
    const isGone = (): boolean => steps >= inStep;
    spies = [
      vi.spyOn(Gpu.prototype, "throttle").mockImplementation(function (this: Gpu, most) {
        steps++;
        return isGone() ? Promise.reject(gone) : throttle.call(this, most);
      }),
      vi.spyOn(Gpu.prototype, "read").mockImplementation(function (this: Gpu, sources) {
        return isGone() ? Promise.reject(gone) : read.call(this, sources);
      }),
    ];
  }
  const restore = (): void => {
    for (const spy of spies.splice(0)) spy.mockRestore();
  };
  const said = (): string =>
    vi
      .mocked(process.stderr.write)
      .mock.calls.map(([text]) => text)
      .join("");
  afterEach(restore);

  test("leaves the last adapter that was saved, whole, and says how to go on", async () => {
    loseDevice(4);
    const settings = ["--steps", "9", "--save-every", "2", "--out", at("lost")];
    await expect(train(...settings)).rejects.toThrow(gone);
    expect(said()).toContain(
      `the adapter of step 2 is in ${at("lost")}, whole. The same command with --resume goes on from it\n`,
    );
    restore();
    await train(...settings, "--resume");
  });

  test("says what would have kept some of it where none was saved", async () => {
    loseDevice(25);
    await expect(train("--steps", "99")).rejects.toThrow(gone);
    expect(said()).toContain(
      "the adapter could not be saved: what was trained is lost. Use --save-every to keep some of it\n",
    );
  });
});

test("bad data is refused with file and line", async () => {
  const forms =
    '{"messages"}, {"prompt","completion"}, {"text"}, {"instruction","output"}, {"conversations"}, {"segments"} or {"input_ids"}';
  await expect(train(...(await data("empty.jsonl")))).rejects.toThrow(
    new FormatError(
      `${at("empty.jsonl")}: must have at least one row, got an empty file. Write one JSON object per line: ${forms}`,
    ),
  );
  await expect(train(...(await data("bad.jsonl", '{"input_ids":[1,2]}', "", '{"input_ids":[1,2}')))).rejects.toThrow(
    /^.*\/bad\.jsonl:3: must be JSON, got "\{\\"input_ids\\":\[1,2\}" \(.+\)$/,
  );
  await expect(train(...(await data("long.jsonl", '{"input_ids":[1,2],"labels":[1,2,3]}')))).rejects.toThrow(
    new FormatError(
      `${at("long.jsonl")}:1: labels must be as many as input_ids (2), got 3. Do not shift them, and write -100 where a token is not to be learned`,
    ),
  );
  await expect(train(...(await data("text.jsonl", '{"text":"hello"}')))).rejects.toThrow(
    new FormatError(
      `${at("text.jsonl")}:1: a row of text needs a tokenizer, got a model without one. Use rows of {"input_ids"}`,
    ),
  );
  await expect(train("--data", at("none.jsonl"))).rejects.toThrow(
    new FormatError(`${at("none.jsonl")}: must be a file that can be read, got ENOENT (nothing there). Check the path`),
  );
});

test("a length beyond the model's context is refused when asked for", async () => {
  const message = "readRows: maxLength must be at most the model's context of 64, got 65. Set it to 64 or less";
  await expect(train("--max-length", "65")).rejects.toThrow(new ShapeError(message));
  await expect(evaluate("model", "--max-length", "65")).rejects.toThrow(new ShapeError(message));
});

test("an output directory that cannot be written is found before the model is read", async () => {
  await writeFile(at("file"), "");
  const nowhere = ["--model", at("nowhere")];
  await expect(train(...nowhere, "--out", at("file"))).rejects.toThrow(
    new FormatError(
      `${at("file")}: must be a directory that can be written, got EEXIST (a file has this name). Choose another path`,
    ),
  );
  await expect(train(...nowhere, "--out", at("file/inside"))).rejects.toThrow(
    new FormatError(
      `${at("file/inside")}: must be a directory that can be written, got ENOTDIR (a part of the path is a file). Choose another path`,
    ),
  );
});

test("an earlier run's metrics are replaced", async () => {
  await train("--steps", "2");
  await train("--steps", "1");
  expect((await readFile(at("out/metrics.jsonl"), "utf8")).trimEnd().split("\n")).toHaveLength(1);
});

test("a row that the data has not is refused with those it has", async () => {
  const logits = (row: string): Promise<Command> =>
    run(logitsCommand(), "--model", at("model"), "--data", at("ids.jsonl"), "--out", at("l.safetensors"), "--row", row);
  await logits("1");
  await expect(logits("2")).rejects.toThrow(
    new ShapeError(`logits: --row must be from 0 to 1, the rows of ${at("ids.jsonl")}, got 2`),
  );
});

test("a row's error names its own line, and rows after it are not read", async () => {
  const file = await data("mixed.jsonl", '{"input_ids":[1]}', "", '{"input_ids":[64]}', "{");
  await expect(
    run(logitsCommand(), "--model", at("model"), ...file, "--out", at("l.safetensors"), "--row", "1"),
  ).rejects.toThrow(
    new FormatError(
      `${at("mixed.jsonl")}:3: input_ids must be whole numbers from 0 to 63, got 64 at index 0. Was this made for another model?`,
    ),
  );
});

test("a model is not merged onto itself", async () => {
  await expect(
    run(mergeCommand(), "--model", at("model"), "--adapter", at("x"), "--out", `${home}/out/../model`),
  ).rejects.toThrow(
    new ShapeError(`merge: --out must be another directory than --model, got ${home}/out/../model for both`),
  );
});

test("eval compares with unquantised weights only what is quantised", async () => {
  await expect(evaluate("model", "--against-f32")).rejects.toThrow(
    new ShapeError("eval: --against-f32 must go with --quantize, got none. There is nothing to compare"),
  );
  await evaluate("model", "--quantize", "nf4", "--against-f32", "--json");
  const {
    loss,
    unquantized_loss: unquantized,
    bits_per_weight: bits,
  } = JSON.parse(String(vi.mocked(process.stdout.write).mock.lastCall?.[0]));
  expect(unquantized).not.toBe(loss);
  expect(Math.abs(unquantized / loss - 1)).toBeLessThan(0.2);
  expect(bits.linears).toBeGreaterThan(4);
  expect(bits.all).toBeGreaterThan(bits.linears);
});

test("generate needs a tokenizer", async () => {
  await expect(run(generateCommand(), "--model", at("model"), "--prompt", "Once")).rejects.toThrow(
    new FormatError(
      `${at("model")}/tokenizer.json: must be there to turn text into ids, or vocab.json and merges.txt of GPT-2 or Qwen2, got neither. Copy it from the model, or train on rows of input_ids`,
    ),
  );
});

test("a choice of adapter that does not exist is refused", async () => {
  vi.stubEnv("LOWRANK_ADAPTER", "fast");
  await expect(evaluate("model")).rejects.toThrow(
    new GpuError('openGpu: LOWRANK_ADAPTER must be auto, software or hardware, got "fast"'),
  );
  vi.unstubAllEnvs();
});

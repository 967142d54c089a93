// `convert` and `inspect`, in this process: what they write, print and refuse, word for word.
import { cp, mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gguf } from "@huggingface/gguf";
import type { Command } from "commander";
import { afterAll, beforeAll, beforeEach, expect, test, vi } from "vitest";
import { convertCommand } from "../../src/cli/convert.ts";
import { inspectCommand } from "../../src/cli/inspect.ts";
import { FormatError } from "../../src/io/errors.ts";
import { fileSource } from "../../src/io/files.ts";
import { encodeSafetensors, openSafetensors } from "../../src/io/safetensors.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { floatTensor } from "../tiny-model.ts";
import { lowrank } from "./run.ts";

const GOLDEN = "test/golden";
const MISTRAL = `${GOLDEN}/models/mistral`;
let home = "";
let [out, err] = ["", ""];
const at = (name: string): string => join(home, name);

beforeAll(async () => {
  home = await mkdtemp(join(tmpdir(), "lowrank-convert-"));
  vi.spyOn(process.stdout, "write").mockImplementation((text) => {
    out += text;
    return true;
  });
  vi.spyOn(process.stderr, "write").mockImplementation((text) => {
    err += text;
    return true;
  });
});
beforeEach(() => {
  [out, err] = ["", ""];
});
afterAll(async () => {
  vi.restoreAllMocks();
  await rm(home, { recursive: true, force: true });
});

const run = (command: Command, ...args: string[]): Promise<Command> =>
  command
    .exitOverride()
    .configureOutput({ writeErr: () => {} })
    .parseAsync(args, { from: "user" });
const convert = (adapter: string, to: string, path: string, ...more: string[]): Promise<Command> =>
  run(convertCommand(), "--adapter", adapter, "--to", to, "--out", path, ...more);
const inspect = (...args: string[]): Promise<Command> => run(inspectCommand(), ...args);

test("an adapter goes from PEFT to mlx-lm, to GGUF and back to PEFT, bit for bit", async () => {
  const original = `${MISTRAL}/adapter`;
  await convert(original, "mlx", at("round/mlx"), "--model", MISTRAL);
  await convert(at("round/mlx"), "gguf", at("round/a.gguf"), "--model", MISTRAL);
  await convert(at("round/a.gguf"), "peft", at("round/peft"), "--model", MISTRAL);
  expect(out).toBe(
    [
      `the adapter is in ${at("round/mlx")}, 14 modules, from peft to mlx`,
      `the adapter is in ${at("round/a.gguf")}, 14 modules, from mlx to gguf`,
      `the adapter is in ${at("round/peft")}, 14 modules, from gguf to peft`,
      "",
    ].join("\n"),
  );
  expect(err).toBe("");
  expect((await readdir(at("round"))).sort()).toEqual(["a.gguf", "mlx", "peft"]);
  expect((await readdir(at("round/mlx"))).sort()).toEqual(["adapter_config.json", "adapters.safetensors"]);
  expect(JSON.parse(await readFile(at("round/mlx/adapter_config.json"), "utf8"))).toMatchObject({ num_layers: 2 });
  const [before, after] = await Promise.all(
    [original, at("round/peft")].map(async (path) => {
      const file = await openSafetensors(await fileSource(join(path, "adapter_model.safetensors")), path);
      return Promise.all([...file.tensors.keys()].sort().map(async (name) => [name, await file.read(name)]));
    }),
  );
  expect(after).toEqual(before);
  expect(JSON.parse(await readFile(at("round/peft/adapter_config.json"), "utf8"))).toMatchObject({
    ...{ peft_type: "LORA", r: 4, lora_alpha: 8, base_model_name_or_path: "mistral", layers_to_transform: [0, 1] },
  });
});

test("the GGUF file is one that @huggingface/gguf reads", async () => {
  await convert(`${GOLDEN}/adapters/rslora/adapter`, "gguf", at("r.gguf"), "--model", `${GOLDEN}/models/qwen2`);
  expect(err).toBe("note: gguf scales by alpha / rank: alpha is 16 there, from 8\n");
  const { metadata, tensorInfos } = await gguf(at("r.gguf"), { allowLocalFile: true });
  expect(metadata).toMatchObject({
    ...{ "general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora" },
    "adapter.lora.alpha": 16,
  });
  expect(tensorInfos.find(({ name }) => name === "blk.1.attn_v.weight.lora_b")?.shape).toEqual([4n, 16n]);
  expect(tensorInfos.length).toBe(28);
});

test("an adapter of the same format is written over; anything else is refused and stays as it was", async () => {
  await convert(`${MISTRAL}/adapter`, "peft", at("over/peft"));
  await convert(`${GOLDEN}/adapters/rslora/adapter`, "peft", at("over/peft"));
  expect(JSON.parse(await readFile(at("over/peft/adapter_config.json"), "utf8"))).toMatchObject({ use_rslora: true });
  await mkdir(at("over/empty"), { recursive: true });
  await convert(`${MISTRAL}/adapter`, "mlx", at("over/empty"));
  await mkdir(at("over/notes"));
  await mkdir(at("over/nothing"));
  await writeFile(at("over/notes/notes.txt"), "mine");
  await writeFile(at("over/notes.txt"), "mine");
  await convert(`${MISTRAL}/adapter`, "gguf", at("over/a.gguf"), "--model", MISTRAL);
  await convert(`${MISTRAL}/adapter`, "gguf", at("over/a.gguf"), "--model", MISTRAL);
  for (const [to, name, rest] of [
    ["mlx", "peft", "must be new, empty, or have an adapter of mlx, got a directory of peft"],
    ["peft", "empty", "must be new, empty, or have an adapter of peft, got a directory of mlx"],
    ["peft", "notes", "must be new, empty, or have an adapter of peft, got a directory of something else"],
    ["peft", "notes.txt", "must be new, empty, or have an adapter of peft, got a file of something else"],
    ["peft", "a.gguf", "must be new, empty, or have an adapter of peft, got a file of gguf"],
    ["gguf", "notes.txt", "must be new, or a GGUF file, got a file of something else"],
    ["gguf", "nothing", "must be new, or a GGUF file, got a directory of something else"],
    ["gguf", "peft", "must be new, or a GGUF file, got a directory of peft"],
  ] as const)
    await expect(convert(`${MISTRAL}/adapter`, to, at(`over/${name}`), "--model", MISTRAL)).rejects.toThrow(
      new FormatError(`${at(`over/${name}`)}: ${rest}. Choose another --out`),
    );
  expect(await readFile(at("over/notes.txt"), "utf8")).toBe("mine");
  expect(await readdir(at("over/notes"))).toEqual(["notes.txt"]);
  expect((await readdir(at("over/peft"))).sort()).toEqual(["adapter_config.json", "adapter_model.safetensors"]);
});

test("what a format cannot say is refused before anything is written", async () => {
  const model = `${GOLDEN}/models/qwen2`;
  await expect(convert(`${GOLDEN}/adapters/dora/adapter`, "gguf", at("never.gguf"), "--model", model)).rejects.toThrow(
    new FormatError(
      "gguf: an adapter must have A and B alone, got magnitude of model.layers.0.mlp.down_proj, for which the format has no words. Convert to PEFT, or merge it into the model",
    ),
  );
  await expect(convert(`${MISTRAL}/adapter`, "gguf", at("never.gguf"))).rejects.toThrow(
    new ShapeError("convert: --to gguf needs --model, got none. Give the adapter's model; its config.json is enough"),
  );
  await convert(`${MISTRAL}/adapter`, "gguf", at("m.gguf"), "--model", MISTRAL);
  await expect(convert(at("m.gguf"), "peft", at("never"))).rejects.toThrow(
    new FormatError(
      `${at("m.gguf")}: the number of heads must be known, as they give the order of the rows of model.layers.0.self_attn.k_proj, got no model. Give --model; its config.json is enough`,
    ),
  );
  expect((await readdir(home)).filter((name) => name.startsWith("never"))).toEqual([]);
});

test("a place that is no adapter is refused by name", async () => {
  await writeFile(at("text.gguf"), "GGML");
  await expect(convert(at("text.gguf"), "peft", at("never"))).rejects.toThrow(
    new FormatError(`${at("text.gguf")}: the file must begin with "GGUF", got something else. It is no GGUF file`),
  );
  await mkdir(at("nothing"));
  await expect(inspect(at("nothing"))).rejects.toThrow(
    new FormatError(
      `${at("nothing")}: must have an adapter_config.json with "peft_type" (PEFT) or "lora_parameters" (mlx-lm), got no such file. A GGUF adapter is a file`,
    ),
  );
  await expect(inspect(at("a b"))).rejects.toThrow(
    new FormatError(
      `inspect: must be a directory, or org/name of a model on the Hugging Face Hub, got ${at("a b")}, which is neither. Check the path; relative paths start at ${process.cwd()}`,
    ),
  );
});

test("inspect prints what the adapter is, its modules by kind and by layer", async () => {
  await inspect(`${GOLDEN}/adapters/patterns/adapter`);
  expect(out.split("\n")).toEqual([
    "peft: LoRA, of qwen2",
    "3,536 parameters, 13.8 KiB in F32",
    "",
    "targets           modules  rank  alpha             s    ‖A‖    ‖B‖  ‖s·B·A‖",
    "mlp.down_proj           2  3, 6      8  2.667, 1.333  4.474  7.004    19.65",
    "mlp.gate_proj           2     4      8             2  4.507  7.751    24.81",
    "mlp.up_proj             2     4    3.5         0.875  4.255  7.495      9.8",
    "self_attn.k_proj        2     4  16, 8          4, 2  4.032  4.455    20.73",
    "self_attn.o_proj        2     4      8             2  4.182  6.514    19.26",
    "self_attn.q_proj        2     2      8             4  2.884  4.336    24.95",
    "self_attn.v_proj        2     4      8             2  4.404  4.563    13.73",
    "",
    "layer  modules     rank       alpha                   s    ‖A‖    ‖B‖  ‖s·B·A‖",
    "0            7  3, 4, 2  8, 3.5, 16  2.667, 2, 0.875, 4  7.521  11.45     39.2",
    "1            7  6, 4, 2      8, 3.5  1.333, 2, 0.875, 4  7.957  11.66    34.25",
    "",
  ]);
});

test("inspect says the same of an adapter in every format, as JSON, without a model", async () => {
  await convert(`${MISTRAL}/adapter`, "mlx", at("same/mlx"));
  await convert(`${MISTRAL}/adapter`, "gguf", at("same/a.gguf"), "--model", MISTRAL);
  const reports = [];
  for (const place of [`${MISTRAL}/adapter`, at("same/mlx"), at("same/a.gguf")]) {
    out = "";
    await inspect(place, "--json");
    reports.push(JSON.parse(out));
  }
  expect(reports.map(({ format }) => format)).toEqual(["peft", "mlx", "gguf"]);
  expect(reports[0]).toMatchObject({
    ...{ method: "LoRA", base_model: "mistral", parameters: 3712, bytes: 14848, dtypes: ["F32"], warnings: [] },
    targets: ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
  });
  const sorted = reports.map(({ modules }) =>
    modules
      .map(({ module, layer, kind, rank, alpha, scale, norms }: Record<string, unknown> & { norms: object }) => [
        ...[module, layer, kind, rank, alpha, scale],
        ...Object.values(norms).map((norm: number) => norm.toPrecision(10)),
      ])
      .sort(),
  );
  expect(sorted[1]).toEqual(sorted[0]);
  expect(sorted[2]).toEqual(sorted[0]);
});

test("an adapter is found by its safetensors file, or by a directory with one GGUF file", async () => {
  await inspect(`${MISTRAL}/adapter/adapter_model.safetensors`, "--json");
  await mkdir(at("hub"));
  await convert(`${MISTRAL}/adapter`, "gguf", at("hub/a.gguf"), "--model", MISTRAL);
  await inspect(at("hub"), "--json");
  const [peft, , gguf_] = out.trimEnd().split("\n");
  expect(JSON.parse(peft ?? "")).toMatchObject({ format: "peft", parameters: 3712 });
  expect(JSON.parse(gguf_ ?? "")).toMatchObject({ format: "gguf", parameters: 3712 });
});

test("inspect shows what is trained whole, and PEFT's format keeps it", async () => {
  await convert(`${GOLDEN}/adapters/tokens/adapter`, "peft", at("tokens"));
  out = "";
  await inspect(at("tokens"));
  expect(out.split("\n")).toContain("trained whole: model.embed_tokens.token_adapter.trainable_tokens_delta [4,32]");
  await inspect(at("tokens"), "--json");
  expect(JSON.parse(out.trimEnd().split("\n").at(-1) ?? "")).toMatchObject({
    ...{ parameters: 2 * 4 * (32 + 32) + 4 * 32, warnings: [] },
    trained_whole: [{ name: "model.embed_tokens.token_adapter.trainable_tokens_delta", shape: [4, 32] }],
  });
});

test("inspect names DoRA and rsLoRA", async () => {
  await inspect(`${GOLDEN}/adapters/dora-patterns/adapter`);
  expect(out.split("\n")[0]).toBe("peft: DoRA with rsLoRA's scale, of gemma2");
});

test("inspect warns of values that are not finite, of an untrained B, of gaps, of an odd scale and of unknown keys", async () => {
  const part = (name: string, shape: number[], value: number) =>
    floatTensor(
      `base_model.model.model.layers.${name}.weight`,
      shape,
      new Float32Array(shape.reduce((a, b) => a * b, 1)).fill(value),
      "BF16",
    );
  await mkdir(at("odd"));
  await writeFile(
    at("odd/adapter_config.json"),
    JSON.stringify({ peft_type: "LORA", r: 2, lora_alpha: 400, target_modules: ["q_proj", "v_proj"], lora_magic: 1 }),
  );
  await writeFile(
    at("odd/adapter_model.safetensors"),
    encodeSafetensors([
      part("0.self_attn.q_proj.lora_A", [2, 8], Number.NaN),
      part("0.self_attn.q_proj.lora_B", [8, 2], 1),
      part("2.self_attn.q_proj.lora_A", [2, 8], 1),
      part("2.self_attn.q_proj.lora_B", [8, 2], 1),
      part("1.self_attn.v_proj.lora_A", [2, 8], 1),
      part("1.self_attn.v_proj.lora_B", [8, 2], 0),
    ]),
  );
  await inspect(at("odd"), "--json");
  expect(JSON.parse(out)).toMatchObject({
    ...{ base_model: null, dtypes: ["BF16"], bytes: 192, parameters: 96 },
    warnings: [
      "A of model.layers.0.self_attn.q_proj has 16 values that are not finite",
      "B is zero in 1 of 3 modules: they are untrained and do nothing",
      "nothing on layers 1 for self_attn.q_proj",
      "nothing on layers 0, 2 for self_attn.v_proj",
      "s of model.layers.0.self_attn.q_proj is 200, by alpha 400 and rank 2: 1/8 to 32 is usual",
      "adapter_config.json has keys that PEFT 0.21 does not know: lora_magic",
    ],
  });
  out = "";
  await inspect(at("odd"));
  expect(out.split("\n")[0]).toBe("peft: LoRA, of a model that is not named");
  expect(out.trimEnd().split("\n").slice(-7)).toEqual([
    "",
    "warning: A of model.layers.0.self_attn.q_proj has 16 values that are not finite",
    "warning: B is zero in 1 of 3 modules: they are untrained and do nothing",
    "warning: nothing on layers 1 for self_attn.q_proj",
    "warning: nothing on layers 0, 2 for self_attn.v_proj",
    "warning: s of model.layers.0.self_attn.q_proj is 200, by alpha 400 and rank 2: 1/8 to 32 is usual",
    "warning: adapter_config.json has keys that PEFT 0.21 does not know: lora_magic",
  ]);
});

test("the settings that PEFT writes are all known", async () => {
  await inspect(`${GOLDEN}/adapters/layers/adapter`, "--json");
  expect(JSON.parse(out).warnings).toEqual([
    "nothing on layers 0, 2 for mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj, self_attn.q_proj, self_attn.v_proj",
  ]);
});

test("as commands of lowrank, both need no GPU and keep stdout for results", async () => {
  await cp(`${GOLDEN}/adapters/patterns/adapter`, at("process/peft"), { recursive: true });
  const done = await lowrank(["convert", "--adapter", at("process/peft"), "--to", "mlx", "--out", at("process/mlx")]);
  expect(done).toEqual({
    code: 0,
    stdout: `the adapter is in ${at("process/mlx")}, 14 modules, from peft to mlx\n`,
    stderr:
      "note: mlx has one scale, 2: that of model.layers.0.mlp.down_proj, model.layers.0.mlp.up_proj, model.layers.0.self_attn.k_proj and 4 more went into B\n" +
      "note: mlx has one rank, 6: 13 modules were padded with zeros",
  });
  const failed = await lowrank(["inspect", at("process")]);
  expect(failed).toMatchObject({ code: 2, stdout: "" });
  expect(failed.stderr).toBe(
    `error: ${at("process")}: must have an adapter_config.json with "peft_type" (PEFT) or "lora_parameters" (mlx-lm), got no such file. A GGUF adapter is a file`,
  );
});

// Adapters between PEFT, mlx-lm and llama.cpp: what each format says is the same update ΔW = s·B·A of every module.
import { existsSync, readdirSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { memoryDirectory, memorySource } from "../../src/io/bytes.ts";
import { decodeFloats } from "../../src/io/dtype.ts";
import { FormatError } from "../../src/io/errors.ts";
import { diskDirectory, fileSource } from "../../src/io/files.ts";
import { encodeGguf, type GgufEntry, openGguf } from "../../src/io/gguf.ts";
import { encodeSafetensors, openSafetensors, type TensorToWrite } from "../../src/io/safetensors.ts";
import { type EncodedAdapter, encodeMlx, encodePeft, readAdapter } from "../../src/lora/adapter-file.ts";
import { combineAdapters } from "../../src/lora/combine.ts";
import { modulesOf, settingsOf } from "../../src/lora/config.ts";
import { encodeGgufAdapter, readGgufAdapter } from "../../src/lora/gguf-adapter.ts";
import { norms, type PlainAdapter, type PlainModule } from "../../src/lora/plain-adapter.ts";
import { type ModelConfig, readConfig } from "../../src/models/config.ts";
import { ShapeError } from "../../src/tensor/errors.ts";
import { Random } from "../../src/tensor/random.ts";
import { collect } from "../collect.ts";
import { floatTensor } from "../tiny-model.ts";

const GOLDEN = "test/golden";
/** Adapters of PEFT, and the models that they are for. */
const BASES: Readonly<Record<string, string>> = {
  ...{ bias: "qwen2", dora: "qwen2", "dora-gpt2": "gpt2", "dora-patterns": "gemma2", layers: "smollm3" },
  ...{ "lora-bias": "qwen2", patterns: "qwen2", regex: "qwen3", rslora: "qwen2" },
};
const MODELS = readdirSync(`${GOLDEN}/models`).filter(
  (name) => existsSync(`${GOLDEN}/models/${name}/adapter`) && !["bert", "roberta"].includes(name),
);
const ALL: [name: string, path: string, model: string][] = [
  ...Object.entries(BASES).map(([name, model]): [string, string, string] => [name, `adapters/${name}`, model]),
  ...MODELS.map((name): [string, string, string] => [name, `models/${name}`, name]),
];
const readGolden = (path: string): Promise<PlainAdapter> => readAdapter(diskDirectory(`${GOLDEN}/${path}/adapter`));
const baseOf = (model: string): Promise<ModelConfig> => readConfig(diskDirectory(`${GOLDEN}/models/${model}`));

async function inMemory({ files }: EncodedAdapter, name = "adapter"): Promise<ReturnType<typeof memoryDirectory>> {
  const contents = Object.entries(files).map(
    async ([file, content]) => [file, typeof content === "string" ? content : await collect(content)] as const,
  );
  return memoryDirectory(name, Object.fromEntries(await Promise.all(contents)));
}
const bytesOf = ({ files }: EncodedAdapter): Promise<Uint8Array> => collect(files[""] as AsyncIterable<Uint8Array>);
const viaPeft = async (adapter: PlainAdapter): Promise<PlainAdapter> =>
  readAdapter(await inMemory(encodePeft(adapter)));

/** s·B·A, by its definition. */
function delta({ config, modules }: Pick<PlainAdapter, "config" | "modules">, name: string): number[] {
  const { A, B } = modules.get(name) as PlainModule;
  const { scale } = settingsOf(config, name);
  return Array.from({ length: B.rows * A.columns }, (_, at) => {
    const [n, k] = [Math.floor(at / A.columns), at % A.columns];
    let sum = 0;
    for (let i = 0; i < A.rows; i++) sum += (B.values[n * A.rows + i] ?? 0) * (A.values[i * A.columns + k] ?? 0);
    return scale * sum;
  });
}

function expectSame(found: PlainAdapter, wanted: PlainAdapter): void {
  expect([...found.modules.keys()].sort()).toEqual([...wanted.modules.keys()].sort());
  expect(found.baseModel).toBe(wanted.baseModel);
  for (const [name, { magnitude }] of wanted.modules) {
    const [a, b] = [delta(found, name), delta(wanted, name)];
    const largest = Math.max(...b.map(Math.abs));
    expect(largest, name).toBeGreaterThan(0);
    expect(a.length).toBe(b.length);
    const worst = a.reduce((most, x, i) => Math.max(most, Math.abs(x - (b[i] ?? Number.NaN))), 0);
    expect(worst / largest, name).toBeLessThan(1e-6);
    expect(found.modules.get(name)?.magnitude).toEqual(magnitude);
  }
}

test.each(ALL)("%s is written for PEFT as it was read, settings and tensors", async (_, path) => {
  const adapter = await readGolden(path);
  const again = await viaPeft(adapter);
  expect(again.config).toEqual(adapter.config);
  expect(again.modules).toEqual(adapter.modules);
});

const withBiases = ["bias", "lora-bias"];

test.each(ALL.filter(([name]) => !withBiases.includes(name)))(
  "%s has the same updates after PEFT → mlx-lm → PEFT, and names the same modules of its model",
  async (_, path, model) => {
    const adapter = await readGolden(path);
    const mlx = await readAdapter(await inMemory(encodeMlx(adapter, await baseOf(model))));
    expect(mlx.format).toBe("mlx");
    const back = await viaPeft(mlx);
    expectSame(back, adapter);
    expect(back.config.useDora).toBe(adapter.config.useDora);
    expect(back.config.fanInFanOut).toBe(model === "gpt2");
    const everything = modulesOfModel([...adapter.modules.keys()]);
    expect(modulesOf(back.config, everything).sort()).toEqual([...adapter.modules.keys()].sort());
  },
);

/** More modules than the adapter has: of more layers, and others in them. */
function modulesOfModel(adapted: readonly string[]): string[] {
  const layers = Array.from({ length: 12 }, (_, i) => `.${i}.`);
  const names = adapted.flatMap((name) => layers.map((layer) => name.replace(/\.\d+\./, layer)));
  return [...new Set([...names, "lm_head", ...layers.map((layer) => `model.layers${layer}self_attn.other_proj`)])];
}

test.each(ALL.filter(([name]) => !withBiases.includes(name) && !name.startsWith("dora")))(
  "%s has the same updates after PEFT → GGUF → PEFT",
  async (_, path, model) => {
    const adapter = await readGolden(path);
    const base = await baseOf(model);
    const bytes = await bytesOf(encodeGgufAdapter(adapter, base));
    const gguf = await readGgufAdapter(memorySource(bytes), "x.gguf", base);
    expect(gguf.format).toBe("gguf");
    expectSame(await viaPeft(gguf), adapter);
  },
);

test("mlx-lm's settings: the scale of most modules, the largest rank, names within a layer, how many layers from the last", async () => {
  const base = await baseOf("smollm3");
  const layers = encodeMlx(await readGolden("adapters/layers"), base);
  expect(JSON.parse(String(layers.files["adapter_config.json"]))).toEqual({
    fine_tune_type: "lora",
    lora_parameters: {
      dropout: 0,
      keys: "mlp.down_proj mlp.gate_proj mlp.up_proj self_attn.k_proj self_attn.q_proj self_attn.v_proj".split(" "),
      rank: 4,
      scale: 2,
    },
    model: "smollm3",
    num_layers: 3, // the adapter has layers 1 and 3 of 4
  });
  expect(layers.notes).toEqual([]);
  const patterns = encodeMlx(await readGolden("adapters/patterns"));
  expect(JSON.parse(String(patterns.files["adapter_config.json"]))).toMatchObject({
    lora_parameters: { rank: 6, scale: 2 },
    num_layers: -1,
  });
  expect(patterns.notes).toEqual([
    "mlx has one scale, 2: that of model.layers.0.mlp.down_proj, model.layers.0.mlp.up_proj, model.layers.0.self_attn.k_proj and 4 more went into B",
    "mlx has one rank, 6: 13 modules were padded with zeros",
  ]);
});

test("mlx-lm's tensors: A and B transposed and padded, magnitudes as they are, names as in its models", async () => {
  const adapter = await readGolden("adapters/dora-gpt2");
  const bytes = await collect(encodeMlx(adapter).files["adapters.safetensors"] as AsyncIterable<Uint8Array>);
  const file = await openSafetensors(memorySource(bytes), "x");
  const name = "h.1.mlp.c_fc";
  const { A, B, magnitude } = adapter.modules.get(`transformer.${name}`) as PlainModule;
  expect(file.tensors.get(`model.${name}.lora_a`)?.shape).toEqual([A.columns, 4]);
  expect(file.tensors.get(`model.${name}.lora_b`)?.shape).toEqual([4, B.rows]);
  expect(file.tensors.get(`model.${name}.m`)?.shape).toEqual([B.rows]);
  const a = decodeFloats("F32", await file.read(`model.${name}.lora_a`));
  expect(a[5 * 4 + 3]).toBe(A.values[3 * A.columns + 5]);
  expect(decodeFloats("F32", await file.read(`model.${name}.m`))).toEqual(magnitude?.values);
});

test("GGUF's metadata and tensors: those that llama.cpp asks for, alpha for the scale alpha / rank", async () => {
  const { files, notes } = encodeGgufAdapter(await readGolden("adapters/rslora"), await baseOf("qwen2"));
  const { metadata, tensors } = await openGguf(memorySource(await bytesOf({ files, notes })), "x.gguf");
  expect(Object.fromEntries([...metadata].map(([key, { type, value }]) => [key, `${type} ${value}`]))).toEqual({
    "general.architecture": "string qwen2",
    "general.type": "string adapter",
    "general.base_model.count": "u32 1",
    "general.base_model.0.name": "string qwen2",
    "adapter.type": "string lora",
    "adapter.lora.alpha": "f32 16", // 8·√4
  });
  expect(notes).toEqual(["gguf scales by alpha / rank: alpha is 16 there, from 8"]);
  expect([...tensors.keys()].filter((name) => name.startsWith("blk.1.")).sort()).toEqual(
    ["attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up"].flatMap((name) =>
      ["a", "b"].map((letter) => `blk.1.${name}.weight.lora_${letter}`),
    ),
  );
  expect(tensors.get("blk.0.attn_k.weight.lora_a")?.shape).toEqual([4, 32]);
  expect(tensors.get("blk.0.attn_k.weight.lora_b")?.shape).toEqual([16, 4]);
});

test("GGUF takes alphas that differ into B, and says of which modules", async () => {
  const adapter = await readGolden("adapters/patterns");
  const { notes } = encodeGgufAdapter(adapter, await baseOf("qwen2"));
  expect(notes).toEqual([
    "gguf has one alpha, 8: that of model.layers.0.mlp.up_proj, model.layers.0.self_attn.k_proj, model.layers.1.mlp.up_proj went into B",
  ]);
});

test.each([
  ["phi3", "blk.0.attn_qkv blk.0.attn_output blk.0.ffn_up blk.0.ffn_down"],
  ["gpt2", "blk.0.attn_qkv blk.0.attn_output blk.0.ffn_up blk.0.ffn_down"],
  ["gemma3", "blk.0.attn_q blk.0.attn_k blk.0.attn_v blk.0.attn_output blk.0.ffn_gate blk.0.ffn_up blk.0.ffn_down"],
])("the tensors of %s have llama.cpp's names", async (model, names) => {
  const bytes = await bytesOf(encodeGgufAdapter(await readGolden(`models/${model}`), await baseOf(model)));
  const { tensors } = await openGguf(memorySource(bytes), "x.gguf");
  const wanted = names.split(" ").flatMap((name) => [`${name}.weight.lora_a`, `${name}.weight.lora_b`]);
  expect([...tensors.keys()].filter((name) => name.startsWith("blk.0.")).sort()).toEqual(wanted.sort());
});

/** Turns pairs of a head by angles position·10000^(−2j/d): (x_j, x_{j+d/2}) as Hugging Face does, or (x_2j, x_{2j+1}). */
function rope(x: readonly number[], position: number, d: number, order: "halves" | "neighbours"): number[] {
  const turned = [...x];
  for (let head = 0; head < x.length; head += d)
    for (let j = 0; j < d / 2; j++) {
      const [a, b] = order === "halves" ? [head + j, head + j + d / 2] : [head + 2 * j, head + 2 * j + 1];
      const angle = position * 10000 ** ((-2 * j) / d);
      const [re, im] = [x[a] ?? 0, x[b] ?? 0];
      turned[a] = re * Math.cos(angle) - im * Math.sin(angle);
      turned[b] = re * Math.sin(angle) + im * Math.cos(angle);
    }
  return turned;
}

/** M·x. */
const times = (M: readonly number[] | Float32Array, x: readonly number[]): number[] =>
  Array.from({ length: M.length / x.length }, (_, n) =>
    x.reduce((sum, xi, k) => sum + xi * (M[n * x.length + k] ?? 0), 0),
  );

/** Scores q·k of each head of q at one position, with its head of k at another. */
const scores = (q: readonly number[], k: readonly number[], d: number, groups: number): number[] =>
  Array.from({ length: q.length / d }, (_, h) => {
    const kv = Math.floor(h / groups) * d;
    return Array.from({ length: d }, (__, i) => (q[h * d + i] ?? 0) * (k[kv + i] ?? 0)).reduce((a, b) => a + b, 0);
  });

test.each([
  ["mistral", "neighbours"],
  ["llama-yarn", "neighbours"],
  ["granite", "neighbours"],
  ["smollm3", "neighbours"],
  ["qwen2", "halves"],
  ["qwen3", "halves"],
  ["gemma2", "halves"],
  ["olmo2", "halves"],
] as const)("%s in GGUF gives the same attention scores with RoPE that turns %s", async (model, order) => {
  const adapter = await readGolden(`models/${model}`);
  const base = await baseOf(model);
  const { tensors } = await openGguf(memorySource(await bytesOf(encodeGgufAdapter(adapter, base))), "x.gguf");
  const stored = async (name: string): Promise<Float32Array> =>
    decodeFloats("F32", (await tensors.get(name)?.read()) ?? new Uint8Array());
  const [d, groups] = ["headDim" in base ? base.headDim : 0, base.heads / base.kvHeads];
  const layer = [...adapter.modules.keys()].find((name) => name.endsWith("q_proj"))?.split(".")[2] ?? "";
  const K = adapter.modules.get(`model.layers.${layer}.self_attn.q_proj`)?.A.columns ?? 0;
  const x = (phase: number): number[] => Array.from({ length: K }, (_, i) => Math.sin(i * 1.7 + phase));
  const s = settingsOf(adapter.config, "q_proj").scale;
  const llama = async (which: string, position: number): Promise<number[]> => {
    const [A, B] = [
      await stored(`blk.${layer}.attn_${which}.weight.lora_a`),
      await stored(`blk.${layer}.attn_${which}.weight.lora_b`),
    ];
    const y = times(B, times(A, x(position))).map((value) => s * value);
    return rope(y, position, d, order);
  };
  const face = (which: string, position: number): number[] =>
    rope(times(delta(adapter, `model.layers.${layer}.self_attn.${which}_proj`), x(position)), position, d, "halves");
  const found = scores(await llama("q", 7), await llama("k", 2), d, groups);
  const wanted = scores(face("q", 7), face("k", 2), d, groups);
  const largest = Math.max(...wanted.map(Math.abs));
  expect(found.length).toBe(base.heads);
  for (const [h, score] of found.entries()) expect(Math.abs(score - (wanted[h] ?? 0)) / largest).toBeLessThan(1e-5);
});

test("norms of the factors give the norm of the product, which is never made", async () => {
  const adapter = await readGolden("adapters/patterns");
  for (const [name, module] of adapter.modules) {
    const found = norms(module, settingsOf(adapter.config, name).scale);
    expect(found.BA).toBeCloseTo(Math.hypot(...delta(adapter, name)), 4);
    expect(found.A).toBeCloseTo(Math.hypot(...module.A.values), 5);
    expect(found.B).toBeCloseTo(Math.hypot(...module.B.values), 5);
  }
});

test("the norm of a product that vanishes is about zero, and never NaN", () => {
  const random = new Random(5);
  for (let trial = 0; trial < 200; trial++) {
    const [v, w] = [4, 2].map((length) => Float32Array.from({ length }, () => random.uniform(0, 1))) as [
      Float32Array,
      Float32Array,
    ];
    const c = random.uniform(0, 1);
    const A_ = { rows: 2, columns: 4, values: Float32Array.of(...v, ...v.map((x) => c * x)) };
    const B_ = {
      rows: 2,
      columns: 2,
      values: Float32Array.from([0, 1, 2, 3], (i) => (w[i >> 1] ?? 0) * (i % 2 === 0 ? c : -1)),
    };
    expect(norms({ A: A_, B: B_ }, 1).BA).toBeLessThan(1e-6);
  }
});

test("modules that are not the same in every layer are named one by one, and their ranks by pattern", async () => {
  const [q, down] = ["model.layers.0.self_attn.q_proj", "model.layers.3.mlp.down_proj"] as const;
  const part = (rows: number, columns: number, value: number) => ({
    ...{ rows, columns, values: new Float32Array(rows * columns).fill(value) },
  });
  const adapter: PlainAdapter = {
    ...(await readGolden("models/qwen2")),
    config: { r: 4, alpha: 6, targetModules: ["q_proj", "down_proj"], rankPattern: { down_proj: 2 } },
    modules: new Map([
      [q, { A: part(4, 32, 0.5), B: part(32, 4, 0.25) }],
      [down, { A: part(2, 48, 0.5), B: part(32, 2, 0.25) }],
    ]),
  };
  const base = await baseOf("qwen2");
  const gguf = await readGgufAdapter(memorySource(await bytesOf(encodeGgufAdapter(adapter, base))), "x.gguf");
  expect(gguf.config).toEqual({
    ...{ r: 4, alpha: 6, fanInFanOut: false, targetModules: [q, down] },
    rankPattern: { "model\\.layers\\.3\\.mlp\\.down_proj": 2 },
  });
  const back = await viaPeft(gguf);
  expectSame(back, adapter);
  expect(modulesOf(back.config, modulesOfModel([q, down])).sort()).toEqual([q, down]);
});

const REFUSED = "for which the format has no words. Convert to PEFT, or merge it into the model";
test.each([
  [
    "lora-bias",
    "mlx",
    `mlx: an adapter must have A and B alone, or a magnitude with them, got loraBias of model.layers.0.self_attn.k_proj, ${REFUSED}`,
  ],
  [
    "bias",
    "mlx",
    `mlx: an adapter must have A and B alone, or a magnitude with them, got bias of model.layers.0.self_attn.q_proj, ${REFUSED}`,
  ],
  [
    "lora-bias",
    "gguf",
    `gguf: an adapter must have A and B alone, got loraBias of model.layers.0.self_attn.k_proj, ${REFUSED}`,
  ],
  ["bias", "gguf", `gguf: an adapter must have A and B alone, got bias of model.layers.0.self_attn.q_proj, ${REFUSED}`],
  [
    "dora",
    "gguf",
    `gguf: an adapter must have A and B alone, got magnitude of model.layers.0.mlp.down_proj, ${REFUSED}`,
  ],
])("%s is refused for %s, with the reason", async (name, format, message) => {
  const [adapter, base] = [await readGolden(`adapters/${name}`), await baseOf("qwen2")];
  expect(() => (format === "mlx" ? encodeMlx(adapter) : encodeGgufAdapter(adapter, base))).toThrow(
    new FormatError(message),
  );
});

test("a model that llama.cpp has by no name, and one that is not the adapter's, are refused", async () => {
  const adapter = await readGolden("models/qwen2");
  const base = { modelType: "mamba", layers: 2, heads: 4, kvHeads: 2 };
  expect(() => encodeGgufAdapter(adapter, base)).toThrow(
    new FormatError(
      'gguf: "model_type" must be one of llama, mistral, granite, smollm3, qwen2, qwen3, gemma2, gemma3_text, olmo2, phi3, gpt2, got mamba. Convert to PEFT, and from there with llama.cpp\'s script',
    ),
  );
  expect(() => encodeGgufAdapter(adapter, { ...base, modelType: "phi3" })).toThrow(
    new FormatError(
      "gguf: modules must be some that phi3 has, got model.layers.0.mlp.gate_proj. Is --model its model?",
    ),
  );
  expect(() => encodeGgufAdapter(adapter, { ...base, modelType: "llama", kvHeads: 3 })).toThrow(
    new FormatError(
      "gguf: B of model.layers.0.self_attn.k_proj must have rows for 3 heads of an even size, got 16. Is --model its model?",
    ),
  );
});

describe("what is trained whole, and adapters of embeddings,", () => {
  const WHOLE: [path: string, name: string][] = [
    ["models/bert", "classifier.bias"],
    ["adapters/whole", "lm_head.weight"],
    ["adapters/tokens", "model.embed_tokens.token_adapter.trainable_tokens_delta"],
    ["adapters/bias-all", "transformer.h.0.attn.c_proj.bias"],
    ["adapters/vocabulary", "model.embed_tokens"],
  ];

  test.each(WHOLE)("stay as they are in PEFT's format: %s", async (path) => {
    const adapter = await readGolden(path);
    const folder = `${GOLDEN}/${path}/adapter/adapter_model.safetensors`;
    const original = await openSafetensors(await fileSource(folder), folder);
    const written = await collect(encodePeft(adapter).files["adapter_model.safetensors"] as AsyncIterable<Uint8Array>);
    const saved = await openSafetensors(memorySource(written), "saved");
    expect([...saved.tensors.keys()].sort()).toEqual([...original.tensors.keys()].sort());
    for (const key of original.tensors.keys())
      expect(Buffer.compare(await saved.read(key), await original.read(key)), key).toBe(0);
  });

  test.each(WHOLE)("have no words in other formats: %s", async (path, name) => {
    const adapter = await readGolden(path);
    // biases of adapted layers come first
    const first = path.endsWith("bias-all") ? "bias of transformer.h.0.attn.c_attn" : name;
    const refusal = (format: string, more: string): FormatError =>
      new FormatError(
        `${format}: an adapter must have A and B alone${more}, got ${first}, for which the format has no words. Convert to PEFT, or merge it into the model`,
      );
    const qwen = await baseOf("qwen2");
    expect(() => encodeMlx(adapter)).toThrow(refusal("mlx", ", or a magnitude with them"));
    expect(() => encodeGgufAdapter(adapter, qwen)).toThrow(refusal("gguf", ""));
    const two = [adapter, adapter].map((one) => ({ adapter: one, weight: 1 }));
    if (!path.endsWith("bias-all"))
      expect(() => combineAdapters(two, { method: "cat" })).toThrow(
        new ShapeError(`combine: adapters must be A and B alone, got ${name}. Merge it into the model instead`),
      );
  });
});

/** A PEFT or mlx-lm directory of these settings and tensors. */
async function directory(config: object, stem: string, tensors: readonly TensorToWrite[]) {
  const weights = await collect(encodeSafetensors(tensors));
  return memoryDirectory("bad", { "adapter_config.json": JSON.stringify(config), [`${stem}.safetensors`]: weights });
}
const zeros = (name: string, ...shape: number[]): TensorToWrite =>
  floatTensor(name, shape, new Float32Array(shape.reduce((a, b) => a * b, 1)));
const P = "base_model.model.model.layers.0.self_attn.q_proj";
const [A, B] = [zeros(`${P}.lora_A.weight`, 2, 8), zeros(`${P}.lora_B.weight`, 8, 2)];
const PEFT = { peft_type: "LORA", r: 2, lora_alpha: 4, target_modules: ["q_proj"] };
const FILE = "bad/adapter_model.safetensors";
const Q = "model.layers.0.self_attn.q_proj";

test.each<[what: string, config: object, tensors: TensorToWrite[], message: string]>([
  [
    "settings of no format",
    { r: 2 },
    [A, B],
    'bad: must have an adapter_config.json with "peft_type" (PEFT) or "lora_parameters" (mlx-lm), got neither in it. A GGUF adapter is a file',
  ],
  ["no tensors", PEFT, [], `${FILE}: an adapter must have a module, got none`],
  ["A alone", PEFT, [A], `${FILE}: ${Q} must have A and B, got A`],
  ["B alone", PEFT, [B], `${FILE}: ${Q} must have A and B, got B`],
  [
    "a magnitude alone",
    { ...PEFT, use_dora: true },
    [zeros(`${P}.lora_magnitude_vector`, 8)],
    `${FILE}: ${Q} must have A and B, got neither`,
  ],
  [
    "A and B of two ranks",
    PEFT,
    [A, zeros(`${P}.lora_B.weight`, 8, 3)],
    `${FILE}: A and B of ${Q} must have one rank, got 2 and 3`,
  ],
  [
    "another rank than the settings'",
    { ...PEFT, r: 3 },
    [A, B],
    `${FILE}: ${Q} must have rank 3 by its settings, got 2`,
  ],
  [
    "an A of three dimensions",
    PEFT,
    [zeros(`${P}.lora_A.weight`, 2, 8, 1), B],
    `${FILE}: tensor "${P}.lora_A.weight" must be a matrix, got [2,8,1]`,
  ],
  [
    "a magnitude of two dimensions",
    { ...PEFT, use_dora: true },
    [A, B, zeros(`${P}.lora_magnitude_vector`, 1, 8)],
    `${FILE}: tensor "${P}.lora_magnitude_vector" must be a vector, got [1,8]`,
  ],
  [
    "a magnitude that is too short",
    { ...PEFT, use_dora: true },
    [A, B, zeros(`${P}.lora_magnitude_vector`, 7)],
    `${FILE}: magnitude of ${Q} must have 8 elements, got 7`,
  ],
  [
    "DoRA without a magnitude",
    { ...PEFT, use_dora: true },
    [A, B],
    `${FILE}: ${Q} must have a magnitude by its settings, got none`,
  ],
  [
    "a bias that the settings have not",
    PEFT,
    [A, B, zeros(`${P}.lora_B.bias`, 8)],
    `${FILE}: ${Q} must have no bias of B by its settings, got one`,
  ],
  [
    "a tensor that is no part of an adapter",
    PEFT,
    [A, B, zeros("base_model.model.lm_head.weight", 4, 8)],
    `${FILE}: a tensor must be a part of a LoRA module, got "base_model.model.lm_head.weight"`,
  ],
  [
    "a tensor without PEFT's prefix",
    PEFT,
    [zeros("layers.0.q_proj.lora_A.weight", 2, 8)],
    `${FILE}: a tensor must be a part of a LoRA module, got "layers.0.q_proj.lora_A.weight"`,
  ],
  [
    "a module that is no target",
    { ...PEFT, target_modules: ["k_proj"] },
    [A, B],
    `${FILE}: every module must be a target by adapter_config.json, got ${Q} as well`,
  ],
  [
    "integers",
    PEFT,
    [A, { ...B, dtype: "I32" }],
    `${FILE}: tensor "${P}.lora_B.weight" must be F32, F16 or BF16, got I32`,
  ],
])("PEFT: %s is refused", async (_, config, tensors, message) => {
  await expect(readAdapter(await directory(config, "adapter_model", tensors))).rejects.toThrow(
    new FormatError(message),
  );
});

const MLX = { fine_tune_type: "lora", num_layers: 1, lora_parameters: { rank: 2, scale: 2, dropout: 0 } };
const [AT, BT] = [zeros(`${Q}.lora_a`, 8, 2), zeros(`${Q}.lora_b`, 2, 8)];

test.each<[what: string, config: object, tensors: TensorToWrite[], message: string]>([
  [
    "full fine-tuning",
    { ...MLX, fine_tune_type: "full" },
    [AT, BT],
    'bad/adapter_config.json: "fine_tune_type" must be "lora" or "dora", got "full"',
  ],
  [
    "no rank",
    { ...MLX, lora_parameters: { scale: 2 } },
    [AT, BT],
    'bad/adapter_config.json: "rank" of lora_parameters must be a number above 0, got undefined',
  ],
  [
    "a scale of zero",
    { ...MLX, lora_parameters: { rank: 2, scale: 0 } },
    [AT, BT],
    'bad/adapter_config.json: "scale" of lora_parameters must be a number above 0, got 0',
  ],
  [
    "another rank than the settings'",
    { ...MLX, lora_parameters: { rank: 8, scale: 2 } },
    [AT, BT],
    `bad/adapters.safetensors: ${Q} must have rank 8 by its settings, got 2`,
  ],
  [
    "a magnitude without DoRA",
    MLX,
    [AT, BT, zeros(`${Q}.m`, 8)],
    `bad/adapters.safetensors: ${Q} must have no magnitude by its settings, got one`,
  ],
  [
    "a tensor that is no part of an adapter",
    MLX,
    [AT, BT, zeros("model.norm.weight", 8)],
    'bad/adapters.safetensors: a tensor must be a part of a LoRA module, got "model.norm.weight"',
  ],
  ...["model.embed_tokens", "model.wte"].map((name): [string, object, TensorToWrite[], string] => [
    `an embedding, ${name},`,
    MLX,
    [AT, BT, zeros(`${name}.lora_a`, 64, 2), zeros(`${name}.lora_b`, 2, 8)],
    `bad/adapters.safetensors: modules must be linear layers, for mlx-lm's LoRA of an embedding changes a tied head too, unlike PEFT's, got ${name}. Fuse it into its model with mlx_lm.fuse`,
  ]),
])("mlx-lm: %s is refused", async (_, config, tensors, message) => {
  await expect(readAdapter(await directory(config, "adapters", tensors))).rejects.toThrow(new FormatError(message));
});

const GGUF: readonly [string, GgufEntry][] = [
  ["general.architecture", { type: "string", value: "llama" }],
  ["general.type", { type: "string", value: "adapter" }],
  ["adapter.type", { type: "string", value: "lora" }],
  ["adapter.lora.alpha", { type: "f32", value: 4 }],
];
const [GA, GB] = [zeros("blk.0.attn_q.weight.lora_a", 2, 8), zeros("blk.0.attn_q.weight.lora_b", 8, 2)];

test.each<[what: string, change: [string, GgufEntry] | undefined, tensors: TensorToWrite[], message: string]>([
  [
    "a model",
    ["general.type", { type: "string", value: "model" }],
    [GA, GB],
    '"general.type" must be adapter, got model',
  ],
  [
    "a control vector",
    ["adapter.type", { type: "string", value: "cvec" }],
    [GA, GB],
    '"adapter.type" must be lora, got cvec',
  ],
  [
    "another architecture",
    ["general.architecture", { type: "string", value: "mamba" }],
    [GA, GB],
    '"general.architecture" must be one of llama, granite, smollm3, qwen2, qwen3, gemma2, gemma3, olmo2, phi3, gpt2, got mamba',
  ],
  [
    "an alpha of zero",
    ["adapter.lora.alpha", { type: "f32", value: 0 }],
    [GA, GB],
    '"adapter.lora.alpha" must be a number above 0, got 0',
  ],
  [
    "a tensor of a norm",
    undefined,
    [GA, GB, zeros("blk.0.attn_norm.weight", 8)],
    'a tensor must be a part of a LoRA module, got "blk.0.attn_norm.weight"',
  ],
  [
    "a tensor of a mixture of experts",
    undefined,
    [zeros("blk.0.ffn_gate_exps.weight.lora_a", 2, 8)],
    'a tensor must be a part of a LoRA module, got "blk.0.ffn_gate_exps.weight.lora_a"',
  ],
  [
    "rows in an order by heads, without a model",
    undefined,
    [GA, GB],
    `the number of heads must be known, as they give the order of the rows of ${Q}, got no model. Give --model; its config.json is enough`,
  ],
])("GGUF: %s is refused", async (_, change, tensors, message) => {
  const metadata = new Map<string, GgufEntry>([...GGUF, ...(change ? [change] : [])]);
  const bytes = await collect(encodeGguf(metadata, tensors));
  await expect(readGgufAdapter(memorySource(bytes), "x.gguf")).rejects.toThrow(new FormatError(`x.gguf: ${message}`));
});

test("GGUF without alpha is refused", async () => {
  const bytes = await collect(encodeGguf(new Map(GGUF.slice(0, 3)), [GA, GB]));
  await expect(readGgufAdapter(memorySource(bytes), "x.gguf")).rejects.toThrow(
    new FormatError('x.gguf: "adapter.lora.alpha" must be a number above 0, got none'),
  );
});

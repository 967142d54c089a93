// What LoRA promises: frozen weights cost nothing in training. Shown by counting, with a full fine-tune for contrast.
import { beforeAll, describe, expect, test } from "vitest";
import { backward, type Gradients } from "../../src/autograd/engine.ts";
import type { Gpu } from "../../src/gpu/gpu.ts";
import { openGpu } from "../../src/gpu/gpu.ts";
import { diskDirectory } from "../../src/io/files.ts";
import { attachLora } from "../../src/lora/attach.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import { loadModel } from "../../src/models/load.ts";
import type { Tensor } from "../../src/tensor/tensor.ts";
import { AdamW } from "../../src/train/adamw.ts";
import { type Batch, collate } from "../../src/train/batches.ts";
import { batchInputs, batchLoss } from "../../src/train/loss.ts";

interface Cost {
  readonly dispatches: ReadonlyMap<string, number>;
  readonly total: number;
  readonly gradients: number;
  readonly gradientBytes: number;
  readonly optimizerBytes: number;
  readonly stepBytes: number;
}

const ids = [5, 9, 2, 33, 7, 1, 40, 12];
const batch: Batch = collate([{ inputIds: ids, labels: ids }], 0);

describe("one training step", () => {
  let gpu: Gpu;
  let model: CausalModel;

  beforeAll(async () => {
    gpu = await openGpu();
    model = await loadModel(gpu, diskDirectory("test/golden/llama-default"));
  });

  /** Forward, backward and update of `parameters`: what it dispatched and allocated. */
  function step(parameters: readonly Tensor[]): Cost {
    const before = gpu.counters().bytesLive;
    const optimizer = new AdamW(parameters);
    gpu.resetCounters();
    const live = gpu.counters().bytesLive;
    let gradients: Gradients = new Map();
    gpu.scope(() => {
      gradients = backward(batchLoss(model, batchInputs(gpu, batch), 1 / batch.tokens));
      optimizer.step(gradients, 1e-3);
    });
    const { dispatches, bytesPeak } = gpu.counters();
    const cost = {
      dispatches,
      total: [...dispatches.values()].reduce((a, b) => a + b, 0),
      gradients: gradients.size,
      gradientBytes: [...gradients.values()].reduce((sum, g) => sum + g.sizeBytes, 0),
      optimizerBytes: optimizer.sizeBytes,
      stepBytes: bytesPeak - live,
    };
    optimizer.destroy();
    expect(gpu.counters().bytesLive).toBe(before);
    return cost;
  }

  /** LoRA of rank 2 on one module. */
  function loraStep(module: string): { cost: Cost; sizeBytes: number } {
    const adapter = attachLora(model, { r: 2, alpha: 4, targetModules: [module] });
    const cost = step(adapter.parameters);
    const sizeBytes = adapter.parameters.reduce((sum, t) => sum + t.sizeBytes, 0);
    adapter.detach();
    return { cost, sizeBytes };
  }

  function fullStep(): Cost {
    const weights = [...model.weights.values()];
    for (const t of weights) t.requiresGrad = true;
    const cost = step(weights);
    for (const t of weights) t.requiresGrad = false;
    return cost;
  }

  const products = ({ dispatches }: Cost): number =>
    [...dispatches].reduce((sum, [name, n]) => sum + (/^matmul-(?!splits)/.test(name) ? n : 0), 0);

  test("with LoRA on one layer has gradients and optimizer state for its A and B alone", () => {
    const { cost, sizeBytes } = loraStep("model.layers.1.self_attn.q_proj");
    expect(cost.gradients).toBe(2);
    expect(cost.gradientBytes).toBe(sizeBytes);
    expect(cost.optimizerBytes).toBe(2 * sizeBytes);
    expect(cost.dispatches.get("adamw")).toBe(1); // A and B lie side by side
  });

  test("with LoRA dispatches no weight gradient of a frozen weight", () => {
    const forward = 7 * model.config.layers + 1; // linear layers and the head
    const { cost } = loraStep("model.layers.1.self_attn.q_proj");
    // Above the adapted layer only dx: o, gate, up, down of block 1 and the head. In it: u, v, dA, dB and no dx, for nothing below
    // needs one.
    expect(products(cost)).toBe(forward + 5 + 4);
    expect(cost.dispatches.has("embedding-backward")).toBe(false);
    expect([...cost.dispatches.keys()].filter((name) => /weight/.test(name))).toEqual([]);
  });

  test("records no graph below the lowest adapted layer", () => {
    const upper = loraStep("model.layers.1.self_attn.q_proj").cost;
    const lower = loraStep("model.layers.0.self_attn.q_proj").cost;
    const backwardOf = ({ dispatches }: Cost, name: string): number => dispatches.get(name) ?? 0;
    expect(backwardOf(upper, "attention-backward-q")).toBe(1);
    expect(backwardOf(lower, "attention-backward-q")).toBe(2);
    // q_proj of block 1 is adapted: its keys and values come from frozen layers on a frozen input.
    expect(backwardOf(upper, "attention-backward-kv")).toBe(0);
    expect(backwardOf(lower, "attention-backward-kv")).toBe(1);
    expect(lower.total).toBeGreaterThan(upper.total);
  });

  test("of a full fine-tune has a gradient and two moments per weight", () => {
    const full = fullStep();
    const { cost: lora } = loraStep("model.layers.1.self_attn.q_proj");
    const bytes = [...model.weights.values()].reduce((sum, t) => sum + t.sizeBytes, 0);
    expect(full.gradients).toBe(model.weights.size);
    expect(full.gradientBytes).toBe(bytes);
    expect(full.optimizerBytes).toBe(2 * bytes);
    expect(full.total).toBeGreaterThan(lora.total);
    expect(products(full)).toBe(3 * (7 * model.config.layers + 1));
    expect(full.stepBytes).toBeGreaterThan(lora.stepBytes);
  });

  test("of a model without anything trainable records nothing", () => {
    gpu.scope(() => {
      const loss = batchLoss(model, batchInputs(gpu, batch), 1);
      expect(loss.requiresGrad).toBe(false);
      expect(loss.node).toBeUndefined();
    });
  });
});

/** Adapters of random parts. */
import { attachLora } from "../../src/lora/attach.ts";
import type { LoraConfig } from "../../src/lora/config.ts";
import { savePeft } from "../../src/lora/peft.ts";
import type { CausalModel } from "../../src/models/causal.ts";
import type { Random } from "../../src/tensor/random.ts";
import { collect } from "../collect.ts";

/** By file name. */
export type AdapterFiles = Readonly<Record<string, Uint8Array | string>>;

/** The files of an adapter that changes what the model says; the model stays as it is. */
export async function randomAdapter(model: CausalModel, config: LoraConfig, random: Random): Promise<AdapterFiles> {
  const adapter = attachLora(model, config, 3);
  const mean = config.useDora ? 0.3 : 0; // magnitudes are above 0
  for (const parameter of adapter.parameters)
    model.gpu.write(
      parameter,
      Float32Array.from({ length: parameter.size }, () => random.normal(mean, 0.25)),
    );
  const files = savePeft(adapter, "base");
  const weights = await collect(files["adapter_model.safetensors"]);
  adapter.detach();
  return { ...files, "adapter_model.safetensors": weights };
}

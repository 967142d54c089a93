"""Makes test/golden/llama-{default,rope3,bias,sharded}/: tiny random Llama models with logits, losses and gradients.

    python scripts/golden/llama.py

Each directory holds
- config.json and the weights, as transformers' save_pretrained writes them (llama-sharded: config.json in the form that
  transformers 4 wrote; llama-rope3: config.v4.json says the same as its config.json in that older form);
- adapter/: a LoRA adapter (r 4, alpha 8, A and B both random) on all seven linear layers, as PEFT writes it;
- expected.json: the input rows, and losses (mean over the tokens with a label, labels shifted by one). No attention
  mask: padding follows the tokens of its row, and a causal model's logits are defined there too;
- expected.safetensors: `base.logits` and `lora.logits` [B,T,V], and `lora.grad.<key>`: the gradient of `lora_loss` for
  each key of adapter_model.safetensors;
- expected-full.safetensors: `grad.<key>`: the gradient of `base_loss` for weights of the model, no adapter attached
  (embedding, norms, head and biases; all weights where `all_grads`).
Values are f32 throughout; half-precision weights are widened exactly when they are read.
"""

import json
import shutil
import sys

from common import (
    GOLDEN,
    MADE_WITH,
    backward,
    causal_batch,
    deterministic,
    old_config,
    randomize,
    trainable,
    write_adapter,
    write_json,
    write_tensors,
)

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROPE3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

MODELS = {
    "llama-default": {
        "config": {
            "num_key_value_heads": 2,
            "head_dim": 12,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
        "all_grads": True,
    },
    "llama-rope3": {
        "config": {"num_key_value_heads": 4, "rope_parameters": ROPE3, "tie_word_embeddings": True},
        "tokens": 40,
    },
    "llama-bias": {
        "config": {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
        "dtype": torch.bfloat16,
    },
    "llama-sharded": {
        "config": {"num_key_value_heads": 2, "rms_norm_eps": 1e-5},
        "dtype": torch.float16,
        "max_shard_size": "16KB",
    },
}


def make(name: str, spec: dict) -> None:
    directory = GOLDEN / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        **spec["config"],
    )
    dtype = spec.get("dtype", torch.float32)
    model = LlamaForCausalLM(config)
    randomize(model)
    model.to(dtype).save_pretrained(directory, max_shard_size=spec.get("max_shard_size", "1GB"))
    (directory / "generation_config.json").unlink()
    saved = json.loads((directory / "config.json").read_text())
    if name == "llama-sharded":
        (directory / "config.json").write_text(json.dumps(old_config(saved, {"head_dim"}), indent=2) + "\n")

    def load() -> LlamaForCausalLM:
        loaded = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        assert loaded.config.rope_parameters == config.rope_parameters
        return loaded.train()

    batch = causal_batch(spec.get("tokens", 11))

    model = load()
    base_logits, base_loss = backward(model, batch)
    grads = {
        f"grad.{key}": weight.grad
        for key, weight in model.named_parameters()
        if spec.get("all_grads") or not any(f"{linear}.weight" in key for linear in LINEARS)
    }
    assert all(grad.abs().max() > 1e-4 for grad in grads.values())
    write_tensors(directory / "expected-full.safetensors", grads)

    adapted = get_peft_model(load(), LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM"))
    randomize(adapted)
    write_adapter(adapted, directory / "adapter", name)

    adapted = PeftModel.from_pretrained(load(), directory / "adapter", is_trainable=True).train()
    lora_logits, lora_loss = backward(adapted, batch)
    keys = set(load_file(directory / "adapter" / "adapter_model.safetensors"))
    lora_grads = {f"lora.grad.{key}": weight.grad for key, weight in trainable(adapted).items()}
    assert {f"lora.grad.{key}" for key in keys} == set(lora_grads)
    assert all(grad.abs().max() > 1e-4 for grad in lora_grads.values())
    assert (lora_logits - base_logits).abs().max() > 0.1
    logits = {"base.logits": base_logits, "lora.logits": lora_logits}
    write_tensors(directory / "expected.safetensors", {**logits, **lora_grads})
    write_json(
        directory / "expected.json",
        {
            "made_with": MADE_WITH,
            "input_ids": batch["input_ids"].tolist(),
            "labels": batch["labels"].tolist(),
            "loss_tokens": int((batch["labels"][:, 1:] != -100).sum()),
            "base_loss": base_loss,
            "lora_loss": lora_loss,
        },
    )

    if name == "llama-rope3":
        check_rope3(model)
        (directory / "config.v4.json").write_text(json.dumps(old_config(saved, {"head_dim"}), indent=2) + "\n")
        config_v4 = LlamaConfig.from_json_file(directory / "config.v4.json")
        older = LlamaForCausalLM.from_pretrained(directory, config=config_v4, dtype=torch.float32)
        assert older.config.rope_parameters == config.rope_parameters
        assert torch.allclose(older(batch["input_ids"]).logits, base_logits, atol=1e-5)
    for file in directory.rglob("*.safetensors"):
        file.chmod(0o644)
    print(f"{name}: loss {base_loss:.6f}, with the adapter {lora_loss:.6f}")


def check_rope3(model: LlamaForCausalLM) -> None:
    """All three branches of the llama3 rule must occur: kept, blended, divided by the factor."""
    dim = model.config.head_dim
    plain = ROPE3["rope_theta"] ** (-torch.arange(0, dim, 2) / dim)
    ratio = model.model.rotary_emb.inv_freq / plain
    kept, divided = (ratio - 1).abs() < 1e-6, (ratio * ROPE3["factor"] - 1).abs() < 1e-6
    assert kept.any() and divided.any() and (~kept & ~divided).any(), ratio


if __name__ == "__main__":
    for index, (name, spec) in enumerate(MODELS.items()):
        if len(sys.argv) == 1 or name in sys.argv[1:]:
            deterministic(100 + index)
            make(name, spec)

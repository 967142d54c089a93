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

from common import GOLDEN, MADE_WITH, deterministic, write_json

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
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


def randomize(model: torch.nn.Module) -> None:
    """Trainable weights so large that attention is far from uniform and every gradient is far from zero."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            if name.endswith("norm.weight"):
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            elif name.endswith("bias"):
                weight.copy_(0.3 * torch.randn_like(weight))
            elif "embed_tokens" in name or ".lora_B." in name:
                weight.copy_(0.4 * torch.randn_like(weight))
            else:
                weight.copy_(1.5 * torch.randn_like(weight) / weight.shape[1] ** 0.5)


def old_config(config: dict) -> dict:
    """The same configuration with the keys that transformers 4 wrote."""
    rope = dict(config["rope_parameters"])
    theta = rope.pop("rope_theta")
    drop = {"rope_parameters", "dtype", "head_dim", "transformers_version"}
    older = {key: value for key, value in config.items() if key not in drop}
    older["rope_theta"] = theta
    older["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    older["torch_dtype"] = config["dtype"]
    older["transformers_version"] = "4.51.0"
    return dict(sorted(older.items()))


def backward(model: torch.nn.Module, input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, float]:
    model.zero_grad()
    out = model(input_ids=input_ids, labels=labels)
    mean = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert abs(mean.item() - out.loss.item()) < 1e-6
    out.loss.backward()
    return out.logits.detach().contiguous(), out.loss.item()


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
        (directory / "config.json").write_text(json.dumps(old_config(saved), indent=2) + "\n")

    def load() -> LlamaForCausalLM:
        loaded = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
        assert loaded.config.rope_parameters == config.rope_parameters
        return loaded.train()

    tokens = spec.get("tokens", 11)
    valid = tokens - 4  # of the second row, which ends in padding; the first is a prompt of 4 tokens and its answer
    input_ids = torch.randint(3, 64, (2, tokens))
    input_ids[:, 0] = 1
    input_ids[1, valid:] = 0
    labels = input_ids.clone()
    labels[0, :4] = -100
    labels[1, valid:] = -100

    model = load()
    base_logits, base_loss = backward(model, input_ids, labels)
    grads = {
        f"grad.{key}": weight.grad
        for key, weight in model.named_parameters()
        if spec.get("all_grads") or not any(f"{linear}.weight" in key for linear in LINEARS)
    }
    assert all(grad.abs().max() > 1e-4 for grad in grads.values())
    save_file(grads, directory / "expected-full.safetensors")

    adapted = get_peft_model(load(), LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, task_type="CAUSAL_LM"))
    randomize(adapted)
    adapted.save_pretrained(directory / "adapter", save_embedding_layers=False)
    (directory / "adapter" / "README.md").unlink()
    config_path = directory / "adapter" / "adapter_config.json"
    adapter_config = json.loads(config_path.read_text())
    adapter_config["base_model_name_or_path"] = name
    adapter_config["target_modules"] = sorted(adapter_config["target_modules"])  # a set: its order changes by run
    config_path.write_text(json.dumps(adapter_config, indent=2) + "\n")

    adapted = PeftModel.from_pretrained(load(), directory / "adapter", is_trainable=True).train()
    lora_logits, lora_loss = backward(adapted, input_ids, labels)
    keys = set(load_file(directory / "adapter" / "adapter_model.safetensors"))
    # PEFT leaves the adapter's name out on disk: lora_A.default.weight is lora_A.weight there.
    lora_grads = {
        f"lora.grad.{key.replace('.default.', '.')}": weight.grad
        for key, weight in adapted.named_parameters()
        if weight.requires_grad
    }
    assert {f"lora.grad.{key}" for key in keys} == set(lora_grads)
    assert all(grad.abs().max() > 1e-4 for grad in lora_grads.values())
    assert (lora_logits - base_logits).abs().max() > 0.1
    logits = {"base.logits": base_logits, "lora.logits": lora_logits}
    save_file({**logits, **lora_grads}, directory / "expected.safetensors")
    write_json(
        directory / "expected.json",
        {
            "made_with": MADE_WITH,
            "input_ids": input_ids.tolist(),
            "labels": labels.tolist(),
            "loss_tokens": int((labels[:, 1:] != -100).sum()),
            "base_loss": base_loss,
            "lora_loss": lora_loss,
        },
    )

    if name == "llama-rope3":
        check_rope3(model)
        (directory / "config.v4.json").write_text(json.dumps(old_config(saved), indent=2) + "\n")
        config_v4 = LlamaConfig.from_json_file(directory / "config.v4.json")
        older = LlamaForCausalLM.from_pretrained(directory, config=config_v4, dtype=torch.float32)
        assert older.config.rope_parameters == config.rope_parameters
        assert torch.allclose(older(input_ids).logits, base_logits, atol=1e-5)
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

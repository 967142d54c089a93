"""Makes test/golden/models/<name>/: tiny random models of every architecture, with logits, losses, gradients, steps.

    python scripts/golden/models.py [name ...]

Each directory holds
- config.json and model.safetensors (f32), as transformers' save_pretrained writes them; where present, config.v4.json
  says the same as config.json in the form that transformers 4 wrote;
- adapter/: a LoRA adapter (r 4, alpha 8, A and B both random) on every linear layer but the head, as PEFT writes it; a
  classifier's adapter also holds a trained copy of the classifier (`modules_to_save`), other than the model's own;
- expected.json: the batch, `base_loss` and `lora_loss`, and `steps.losses`: the loss before each of 5 steps of AdamW on
  the adapter with that batch (learning rate `steps.lr`, betas 0.9 and 0.999, eps 1e-8, no weight decay, no clipping).
  Decoders: the loss is the mean over the tokens with a label, labels shifted by one, and there is no attention mask:
  padding follows the tokens of its row. bert and roberta: `labels` has one class per row, the loss is the mean over the
  rows, and padding is where `attention_mask` is 0;
- expected.safetensors: `base.logits` and `lora.logits` ([B,T,V], of a classifier [B,labels]), and for each key of
  adapter_model.safetensors `lora.grad.<key>`, the gradient of `lora_loss`, and `lora.final.<key>`, the weight after the
  5 steps. llama-dynamic and phi3-longrope, whose positions depend on the batch's length, also have `short.logits`: the
  base model's for the first `short_tokens` columns of the batch;
- expected-full.safetensors: `grad.<key>`: the gradient of `base_loss` for the weights of the model that no adapter adds
  to (embeddings, norms, biases, head), no adapter attached. Not there: the biases of bert's and roberta's keys, which
  softmax cancels, so that their gradients are zero but for rounding.
Values are f32 throughout.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable

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
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import PreTrainedModel

SEED = 228  # of every model: one for which rounding hardly moves the 5 steps of any of them
LR, STEPS = 0.01, 5
SHORT = 11  # columns of the batch for `short.logits`

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PHI3_LINEARS = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
GPT2_LINEARS = ["c_attn", "c_proj", "c_fc"]
BERT_LINEARS = ["query", "key", "value", "dense"]

DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def rope(theta: float, kind: str = "default", **parameters: object) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **parameters}


PLAIN = rope(100.0)
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA3_ROPE = {SLIDING: rope(10.0), FULL: rope(1000.0, "linear", factor=4.0)}
LONGROPE = rope(
    100.0,
    "longrope",
    partial_rotary_factor=0.5,
    short_factor=[1.0, 1.25, 1.5, 2.0],
    long_factor=[1.0, 2.0, 3.0, 4.5],
    original_max_position_embeddings=16,
)


def v4_gemma2(config: dict) -> dict:
    newer = {"_sliding_window_pattern", "layer_types", "tie_word_embeddings", "use_bidirectional_attention"}
    return old_config(config, newer)


def v4_gemma3(config: dict) -> dict:
    return {**v4_gemma2(config), "sliding_window_pattern": 3}


def v4_qwen2(config: dict) -> dict:
    """Published configurations name a window that `use_sliding_window` switches off."""
    return {**old_config(config, {"layer_types"}), "sliding_window": 4}


def v4_smollm3(config: dict) -> dict:
    return old_config(config, {"tie_word_embeddings"})


def v4_longrope(config: dict) -> dict:
    older = old_config(config)
    factors = {key: older["rope_scaling"][key] for key in ("long_factor", "short_factor")}
    return {**older, "rope_scaling": {**factors, "type": "longrope"}}


# `matters`: changes of the configuration that must each change the logits, so that a reader which misses the key fails.
# `windows`: of each layer, where any is limited. `shapes`: of weights of layer 0 that tell one mechanism from another.
MODELS = {
    "llama-linear": {
        "class": "Llama",
        "config": {"rope_parameters": rope(100.0, "linear", factor=4.0)},
        "matters": [{"rope_parameters": PLAIN}],
    },
    "llama-dynamic": {
        "class": "Llama",
        "config": {"rope_parameters": rope(100.0, "dynamic", factor=2.0), "max_position_embeddings": 16},
        "matters": [{"rope_parameters": PLAIN}, {"max_position_embeddings": 18}],
        "tokens": 24,
    },
    "llama-yarn": {
        "class": "Llama",
        "config": {
            "head_dim": 12,
            "rope_parameters": rope(
                10.0, "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=1.5, beta_slow=0.5
            ),
        },
        "matters": [{"rope_parameters": PLAIN}],
        "tokens": 24,
    },
    "smollm3": {
        "class": "SmolLM3",
        "config": {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 4,
            "rope_parameters": PLAIN,
        },
        "matters": [{"no_rope_layers": [1, 1, 1, 1]}, {"no_rope_layers": [0, 1, 1, 1]}],
        "v4": v4_smollm3,
    },
    "mistral": {
        "class": "Mistral",
        "config": {"sliding_window": 4, "rope_parameters": PLAIN},
        "windows": [4, 4],
        "matters": [{"sliding_window": None}, {"sliding_window": 5}],
    },
    "qwen2": {
        "class": "Qwen2",
        "config": {"rope_parameters": PLAIN},
        "matters": [{"use_sliding_window": True, "sliding_window": 4, "layer_types": [SLIDING] * 2}],
        "v4": v4_qwen2,
    },
    "qwen2-window": {
        "class": "Qwen2",
        "config": {
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
            "rope_parameters": PLAIN,
        },
        "windows": [None, 4],
        "matters": [{"layer_types": [FULL] * 2}, {"layer_types": [SLIDING] * 2}],
        "v4": v4_qwen2,
    },
    "qwen3": {
        "class": "Qwen3",
        "config": {"head_dim": 12, "rope_parameters": PLAIN},
        "shapes": {"self_attn.q_norm.weight": [12], "self_attn.k_norm.weight": [12]},
        "matters": [{"rms_norm_eps": 0.1}],
    },
    "gemma2": {
        "class": "Gemma2",
        "config": {
            "head_dim": 12,
            "query_pre_attn_scalar": 5,
            "sliding_window": 4,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "rope_parameters": PLAIN,
        },
        "norm_mean": 0.0,
        "windows": [4, None],
        "matters": [
            {"query_pre_attn_scalar": 12},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"layer_types": [FULL, SLIDING]},
            {"hidden_activation": "gelu"},
        ],
        "v4": v4_gemma2,
    },
    "gemma3": {
        "class": "Gemma3",
        "config_class": "Gemma3TextConfig",
        "config": {
            "intermediate_size": 32,
            "num_hidden_layers": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 5,
            "sliding_window": 4,
            "layer_types": [SLIDING, SLIDING, FULL],
            "rope_parameters": GEMMA3_ROPE,
        },
        "norm_mean": 0.0,
        "windows": [4, 4, None],
        "shapes": {"self_attn.q_norm.weight": [12], "self_attn.k_norm.weight": [12]},
        "matters": [
            {"query_pre_attn_scalar": 12},
            {"layer_types": [FULL, SLIDING, SLIDING]},
            {"rope_parameters": {SLIDING: GEMMA3_ROPE[FULL], FULL: GEMMA3_ROPE[FULL]}},
            {"rope_parameters": {SLIDING: GEMMA3_ROPE[SLIDING], FULL: GEMMA3_ROPE[SLIDING]}},
            {"rope_parameters": {SLIDING: GEMMA3_ROPE[SLIDING], FULL: rope(1000.0)}},
        ],
        "v4": v4_gemma3,
    },
    "phi3": {
        "class": "Phi3",
        "config": {"sliding_window": 6, "rope_parameters": rope(100.0, partial_rotary_factor=0.5)},
        "targets": PHI3_LINEARS,
        "windows": [6, 6],
        "shapes": {"self_attn.qkv_proj.weight": [64, 32], "mlp.gate_up_proj.weight": [96, 32]},
        "matters": [{"sliding_window": None}, {"rope_parameters": rope(100.0, partial_rotary_factor=1.0)}],
        "v4": old_config,
    },
    "phi3-longrope": {
        "class": "Phi3",
        "config": {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONGROPE,
        },
        "targets": PHI3_LINEARS,
        "matters": [
            {"rope_parameters": {**LONGROPE, "long_factor": LONGROPE["short_factor"]}},
            {"rope_parameters": {**LONGROPE, "attention_factor": 1.0}},
            {"rope_parameters": rope(100.0, partial_rotary_factor=0.5)},
        ],
        "tokens": 24,
        "v4": v4_longrope,
    },
    "olmo2": {
        "class": "Olmo2",
        "config": {"rope_parameters": PLAIN},
        "shapes": {"self_attn.q_norm.weight": [32], "self_attn.k_norm.weight": [16]},
        "matters": [{"rms_norm_eps": 0.1}],
    },
    "granite": {
        "class": "Granite",
        "config": {
            "embedding_multiplier": 2.5,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.6,
            "logits_scaling": 1.5,
            "rope_parameters": PLAIN,
        },
        "matters": [
            {"embedding_multiplier": 1.0},
            {"attention_multiplier": 8**-0.5},
            {"residual_multiplier": 1.0},
            {"logits_scaling": 1.0},
        ],
    },
    "gpt2": {
        "class": "GPT2",
        "head": "LMHeadModel",
        "config": {
            "vocab_size": 64,
            "n_positions": 64,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "targets": GPT2_LINEARS,
        "matters": [{"activation_function": "gelu"}, {"scale_attn_weights": False}],
    },
    "bert": {
        "class": "Bert",
        "head": "ForSequenceClassification",
        "config": {"num_labels": 3, "max_position_embeddings": 32},
        "targets": BERT_LINEARS,
        "matters": [{"hidden_act": "gelu_new"}],
    },
    "roberta": {
        "class": "Roberta",
        "head": "ForSequenceClassification",
        "config": {"num_labels": 2, "max_position_embeddings": 34, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "targets": BERT_LINEARS,
        "matters": [{"hidden_act": "gelu_new"}],
    },
}


def classes(spec: dict) -> tuple[type, type]:
    model_class = getattr(transformers, spec["class"] + spec.get("head", "ForCausalLM"))
    return model_class, getattr(transformers, spec.get("config_class", spec["class"] + "Config"))


def encoder_batch(config: transformers.PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Three rows of 11, 8 and 5 tokens. bert's are pairs: the second text has token type 1, padding has 0."""
    lengths = torch.tensor([11, 8, 5])
    attention_mask = (torch.arange(11) < lengths[:, None]).long()
    input_ids = torch.randint(5, 64, (3, 11))
    input_ids[:, 0] = 4
    batch = {
        "input_ids": input_ids.where(attention_mask == 1, config.pad_token_id),
        "attention_mask": attention_mask,
        "labels": torch.tensor([config.num_labels - 1, 0, 1]),
    }
    if config.type_vocab_size > 1:
        batch["token_type_ids"] = (torch.arange(11) >= torch.tensor([6, 3, 4])[:, None]).long() * attention_mask
    return batch


def make(name: str, spec: dict) -> None:
    directory = GOLDEN / "models" / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    model_class, config_class = classes(spec)
    encoder = spec.get("head") == "ForSequenceClassification"
    shared = ENCODER if encoder else {} if spec["class"] == "GPT2" else DECODER
    created = model_class(config_class(**{**shared, **spec["config"]}))
    randomize(created, spec.get("norm_mean", 1.0))
    created.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    saved = json.loads((directory / "config.json").read_text())
    stored = load_file(directory / "model.safetensors")
    assert set(stored) == {key for key, _ in created.named_parameters()}  # a tied head once, as the embedding

    def load(config: dict = saved) -> PreTrainedModel:
        loaded = model_class.from_pretrained(
            directory, config=config_class.from_dict(config), dtype=torch.float32, attn_implementation="eager"
        )
        return loaded.train()

    def attach() -> PeftModel:
        return PeftModel.from_pretrained(load(), directory / "adapter", is_trainable=True).train()

    model = load()
    batch = encoder_batch(model.config) if encoder else causal_batch(spec.get("tokens", 11))
    base_logits, base_loss = backward(model, batch)
    targets = spec.get("targets", LLAMA_LINEARS)
    lora = {
        "r": 4,
        "lora_alpha": 8,
        "fan_in_fan_out": spec["class"] == "GPT2",
        "task_type": "SEQ_CLS" if encoder else "CAUSAL_LM",
    }
    adapted = get_peft_model(load(), LoraConfig(**lora, target_modules=targets))
    every = get_peft_model(load(), LoraConfig(**lora, target_modules="all-linear"))
    assert set(adapted.targeted_module_names) == set(every.targeted_module_names)
    write_tensors(directory / "expected-full.safetensors", full_grads(model, adapted.targeted_module_names))
    randomize(adapted)
    write_adapter(adapted, directory / "adapter", name)

    adapted = attach()
    lora_logits, lora_loss = backward(adapted, batch)
    weights = trainable(adapted)
    assert set(weights) == set(load_file(directory / "adapter" / "adapter_model.safetensors"))
    grads = {f"lora.grad.{key}": weight.grad.clone() for key, weight in weights.items()}
    assert all(grad.abs().max() > 1e-4 for grad in grads.values())
    assert (lora_logits - base_logits).abs().max() > 0.1
    losses = train(adapted, batch)
    assert losses[0] == lora_loss and losses[-1] < losses[0]
    rounding = rounding_error(attach(), batch, weights)
    assert rounding < 1e-4, rounding

    tensors = {"base.logits": base_logits, "lora.logits": lora_logits, **grads}
    tensors |= {f"lora.final.{key}": weight for key, weight in weights.items()}
    expected = {"made_with": MADE_WITH, **{key: value.tolist() for key, value in batch.items()}}
    if not encoder:
        expected["loss_tokens"] = int((batch["labels"][:, 1:] != -100).sum())
    if name in ("llama-dynamic", "phi3-longrope"):
        expected["short_tokens"] = SHORT
        tensors["short.logits"] = load()(batch["input_ids"][:, :SHORT]).logits
        assert (tensors["short.logits"] - base_logits[:, :SHORT]).abs().max() > 0.1
    expected |= {"base_loss": base_loss, "lora_loss": lora_loss, "steps": {"lr": LR, "losses": losses}}
    write_tensors(directory / "expected.safetensors", tensors)
    write_json(directory / "expected.json", expected)

    check_changes(spec, load, saved, batch, base_logits)
    check_windows(spec, load(), batch)
    for key, shape in spec.get("shapes", {}).items():
        assert list(model.get_parameter(f"model.layers.0.{key}").shape) == shape
    if name in CHECKS:
        CHECKS[name](model, batch, base_logits)
    if "v4" in spec:
        older = spec["v4"](saved)
        (directory / "config.v4.json").write_text(json.dumps(older, indent=2) + "\n")
        assert torch.equal(load(older)(**batch).logits, base_logits)
    for file in directory.rglob("*.safetensors"):
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    assert size < 250_000, size
    print(
        f"{name}: loss {base_loss:.6f}, with the adapter {lora_loss:.6f}, after {STEPS - 1} steps {losses[-1]:.6f};"
        f" rounding moves a final weight by up to {rounding:.1e}; {size} bytes"
    )


def full_grads(model: PreTrainedModel, targeted: list[str]) -> dict[str, torch.Tensor]:
    grads = {}
    for key, weight in model.named_parameters():
        if key.endswith(".key.bias"):
            assert weight.grad.abs().max() < 1e-6
        elif key.removesuffix(".weight") not in targeted:
            assert weight.grad.abs().max() > 1e-4, key
            grads[f"grad.{key}"] = weight.grad
    return grads


def train(adapted: PeftModel, batch: dict[str, torch.Tensor]) -> list[float]:
    """The losses before each step."""
    optimizer = torch.optim.AdamW(
        list(trainable(adapted).values()), lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    losses = []
    for _ in range(STEPS):
        losses.append(backward(adapted, batch)[1])
        optimizer.step()
    return losses


def rounding_error(adapted: PeftModel, batch: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> float:
    """How far the final weights are from those of f64: AdamW makes a full step of a gradient that is all rounding."""
    adapted.double()
    train(adapted, batch)
    finals = trainable(adapted)
    return max((finals[key] - weight).abs().max().item() for key, weight in weights.items())


def check_changes(spec: dict, load: Callable, saved: dict, batch: dict, logits: torch.Tensor) -> None:
    for change in spec["matters"]:
        moved = (load({**saved, **change})(**batch).logits - logits).abs().max()
        # gelu and its tanh approximation differ by less than 5e-4
        least = 2e-4 if change.keys() & {"activation_function", "hidden_act", "hidden_activation"} else 0.1
        assert moved > least, (change, moved)


def check_windows(spec: dict, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> None:
    """Each layer attends to the last `window` tokens, the query's own among them, or to all before where it is None."""
    if "attention_mask" in batch:
        return
    attentions = model(**batch, output_attentions=True).attentions
    tokens = torch.arange(batch["input_ids"].shape[1])
    distance = tokens[:, None] - tokens
    for weights, window in zip(attentions, spec.get("windows", [None] * len(attentions)), strict=True):
        wanted = (distance >= 0) & (distance < (window or len(tokens)))
        assert torch.equal((weights > 0).amax((0, 1)), wanted)


def check_dynamic(model: PreTrainedModel, batch: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
    """The base grows with the length T of the batch, padding included: θ·(f·T/max − (f − 1))^(d/(d − 2))."""
    tokens, dim = batch["input_ids"].shape[1], model.config.head_dim
    theta = 100.0 * (2.0 * tokens / 16 - 1.0) ** (dim / (dim - 2))
    assert torch.allclose(model.model.rotary_emb.inv_freq, theta ** (-torch.arange(0, dim, 2) / dim))


def check_yarn(model: PreTrainedModel, batch: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
    """Frequencies that are kept, blended and divided by the factor must all occur."""
    dim, rotary = model.config.head_dim, model.model.rotary_emb
    ratio = rotary.inv_freq / 10.0 ** (-torch.arange(0, dim, 2) / dim)
    kept, divided = (ratio - 1).abs() < 1e-6, (ratio * 4 - 1).abs() < 1e-6
    assert kept.any() and divided.any() and (~kept & ~divided).any(), ratio
    assert rotary.attention_scaling == 0.1 * math.log(4.0) + 1


def check_longrope(model: PreTrainedModel, batch: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
    rotary = model.model.rotary_emb
    kept = 100.0 ** (-torch.arange(0, 8, 2) / 8)
    assert torch.allclose(rotary.inv_freq, kept / torch.tensor(LONGROPE["long_factor"]))
    assert rotary.attention_scaling == math.sqrt(1 + math.log(64 / 16) / math.log(16))


def check_bert(model: PreTrainedModel, batch: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
    for key, value in {"token_type_ids": 0, "attention_mask": 1}.items():
        changed = model(**{**batch, key: torch.full_like(batch[key], value)}).logits
        assert (changed - logits).abs().max() > 0.1


def check_roberta(model: PreTrainedModel, batch: dict[str, torch.Tensor], logits: torch.Tensor) -> None:
    """Positions start at the padding token's id plus 1."""
    positions = torch.arange(11).expand(3, 11)
    assert (model(**batch, position_ids=positions).logits - logits).abs().max() > 0.1
    offset = (positions + 2).where(batch["attention_mask"] == 1, 1)
    assert torch.equal(model(**batch, position_ids=offset).logits, logits)


CHECKS = {
    "llama-dynamic": check_dynamic,
    "llama-yarn": check_yarn,
    "phi3-longrope": check_longrope,
    "bert": check_bert,
    "roberta": check_roberta,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or MODELS:
        deterministic(SEED)
        make(name, MODELS[name])

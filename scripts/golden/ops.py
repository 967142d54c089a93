"""Makes test/golden/ops.json: values and gradients of single operations by PyTorch, in f64.

    python scripts/golden/ops.py

Per case: `op`, `inputs`, `options`, `outputs`, `dy` (the gradient that comes in at y; inputs and dy are exact in f32)
and `grads` = the gradient of sum(dy · y) for each float input. Attention and rotary use [B,H,T,D].
"""

import math

from common import GOLDEN, MADE_WITH, deterministic, exact, plain, write_json

import peft
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

cases: dict[str, dict] = {}


def case(name: str, op: str, f, inputs: dict[str, torch.Tensor], options: dict | None = None, like=None) -> None:
    """Records f(**inputs); `like` is a second implementation that must agree to f32 rounding."""
    leaves = {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in inputs.items()}
    y = f(**leaves)
    dy = exact(*y.shape) if y.dim() > 0 else torch.ones((), dtype=torch.float64)
    floats = {key: value for key, value in leaves.items() if value.requires_grad}
    grads = torch.autograd.grad(y, list(floats.values()), dy)
    if like is not None:
        assert torch.allclose(like(**inputs).double(), y, atol=2e-6), name
    cases[name] = {
        "op": op,
        "options": options or {},
        "inputs": {key: plain(value) for key, value in inputs.items()},
        "outputs": {"y": plain(y)},
        "dy": plain(dy),
        "grads": {key: plain(grad) for key, grad in zip(floats, grads)},
    }


def rms_norm_llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = LlamaRMSNorm(x.shape[-1], eps=1e-5).double()
    norm.weight.data.copy_(weight)
    return norm(x)


def rotary(theta: float):
    """HF's split-half rotation, with cos and sin in f64 instead of LlamaRotaryEmbedding's f32."""

    def apply(x: torch.Tensor) -> torch.Tensor:
        dim, tokens = x.shape[-1], x.shape[-2]
        inv_freq = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(tokens, dtype=torch.float64)[:, None] * inv_freq
        angle = torch.cat([angle, angle], dim=-1)[None]
        return apply_rotary_pos_emb(x, x, angle.cos(), angle.sin())[0]

    return apply


def rotary_llama(theta: float):
    def apply(x: torch.Tensor) -> torch.Tensor:
        config = LlamaConfig(
            head_dim=x.shape[-1], rope_parameters={"rope_type": "default", "rope_theta": theta}, hidden_size=32
        )
        cos, sin = LlamaRotaryEmbedding(config)(x.float(), torch.arange(x.shape[-2])[None])
        return apply_rotary_pos_emb(x, x, cos, sin)[0]

    return apply


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def attention_llama(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    module = torch.nn.Module()
    module.num_key_value_groups = q.shape[1] // k.shape[1]
    mask = torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype).triu(1)[None, None]
    return eager_attention_forward(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5)[0].transpose(1, 2)


deterministic(11)

for name, shape in (("layer_norm", (2, 3, 5)), ("layer_norm_wide", (1, 33))):
    case(
        name,
        "layer_norm",
        lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5),
        {"x": exact(*shape), "weight": exact(shape[-1]), "bias": exact(shape[-1])},
        {"eps": 1e-5},
    )
for name, shape in (("rms_norm", (2, 3, 5)), ("rms_norm_wide", (1, 33))):
    case(
        name,
        "rms_norm",
        lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-5),
        {"x": exact(*shape), "weight": exact(shape[-1])},
        {"eps": 1e-5},
        like=rms_norm_llama,
    )
# Tiny rows show a wrong place for eps.
case(
    "rms_norm_tiny_rows",
    "rms_norm",
    lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-5),
    {"x": exact(2, 4) / 512, "weight": exact(4)},
    {"eps": 1e-5},
    like=rms_norm_llama,
)

case("softmax", "softmax", lambda x: x.softmax(-1), {"x": exact(3, 7, scale=2)}, {"dim": -1})
# Overflows where the row's maximum is not subtracted.
case("softmax_large", "softmax", lambda x: x.softmax(-1), {"x": exact(2, 5) + 200}, {"dim": -1})

ACTIVATIONS = torch.tensor([[-20, -3, -1, -0.5, 0, 0.5], [1, 2, 3, 20, -0.125, 0.25]], dtype=torch.float64)
case("silu", "silu", F.silu, {"input": ACTIVATIONS})
for name, approximate in (("gelu_erf", "none"), ("gelu_tanh", "tanh")):
    options = {"approximate": approximate}
    case(name, "gelu", lambda input: F.gelu(input, approximate=approximate), {"input": ACTIVATIONS}, options)

targets = torch.tensor([4, -100, 0, 8, -100])
for reduction in ("sum", "mean"):
    case(
        f"cross_entropy_{reduction}",
        "cross_entropy",
        lambda logits, targets: F.cross_entropy(logits, targets, ignore_index=-100, reduction=reduction),
        {"logits": exact(5, 9, scale=2), "targets": targets},
        {"ignore_index": -100, "reduction": reduction},
    )
case(
    "cross_entropy_large",
    "cross_entropy",
    lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum"),
    {"logits": exact(2, 5, scale=30) + 150, "targets": torch.tensor([1, 3])},
    {"ignore_index": -100, "reduction": "sum"},
)

case(
    "rotary",
    "rotary",
    rotary(10000.0),
    {"x": exact(2, 2, 5, 6)},
    {"rope_theta": 10000.0, "layout": "BHTD", "positions": list(range(5))},
    like=rotary_llama(10000.0),
)

for name, (heads, kv_heads, tokens, dim) in {
    "attention_gqa": (4, 2, 5, 6),
    "attention_single_kv_head": (3, 1, 4, 2),
    "attention_mha": (2, 2, 3, 4),
    "attention_one_token": (2, 1, 1, 4),
}.items():
    case(
        name,
        "attention",
        attention,
        {"q": exact(2, heads, tokens, dim), "k": exact(2, kv_heads, tokens, dim), "v": exact(2, kv_heads, tokens, dim)},
        {"causal": True, "scale": dim**-0.5, "layout": "BHTD"},
        like=attention_llama,
    )

for name, shape_a, shape_b in (
    ("rows", (2, 3, 4), (4,)),
    ("middle", (2, 3, 4), (3, 1)),
    ("both", (2, 1, 4), (3, 1)),
    ("scalar", (2, 3), ()),
):
    case(f"add_{name}", "add", torch.add, {"input": exact(*shape_a), "other": exact(*shape_b)})
    case(f"mul_{name}", "mul", torch.mul, {"input": exact(*shape_a), "other": exact(*shape_b)})


def masked_attention(window=None, cap=None):
    """Attention with whatever hides keys written out: scores past the window or of another segment, capped before."""

    def apply(q, k, v, starts=None):
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        row, key = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
        hidden = (key > row)[None]
        if window is not None:
            hidden = hidden | (key <= row - window)[None]
        if starts is not None:
            hidden = hidden | (key[None] < starts[:, :, None])
        return scores.masked_fill(hidden[:, None], -math.inf).softmax(-1) @ v

    return apply


def attention_gemma2(cap: float):
    def apply(q, k, v):
        module = torch.nn.Module()
        module.num_key_value_groups = q.shape[1] // k.shape[1]
        module.training = False
        mask = torch.full((q.shape[2], k.shape[2]), -math.inf, dtype=q.dtype).triu(1)[None, None]
        scaling = q.shape[-1] ** -0.5
        return gemma2_attention(module, q, k, v, mask, scaling=scaling, softcap=cap)[0].transpose(1, 2)

    return apply


def qkv(heads: int, kv_heads: int, tokens: int, dim: int) -> dict[str, torch.Tensor]:
    return {
        "q": exact(2, heads, tokens, dim, scale=1.5),
        "k": exact(2, kv_heads, tokens, dim, scale=1.5),
        "v": exact(2, kv_heads, tokens, dim),
    }


ATTENTION = {"causal": True, "scale": 0.5, "layout": "BHTD"}
case("attention_window", "attention", masked_attention(window=3), qkv(4, 2, 7, 4), {**ATTENTION, "window": 3})
case(
    "attention_cap",
    "attention",
    masked_attention(cap=1.5),
    qkv(2, 1, 6, 4),
    {**ATTENTION, "softCap": 1.5},
    like=attention_gemma2(1.5),
)
starts = torch.tensor([[0, 0, 0, 3, 3, 5], [0, 1, 1, 1, 1, 1]])
case("attention_segments", "attention", masked_attention(), {**qkv(4, 2, 6, 4), "starts": starts}, ATTENTION)


def rotary_at(theta: float):
    def apply(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        inv_freq = theta ** (-torch.arange(0, x.shape[-1], 2, dtype=torch.float64) / x.shape[-1])
        angle = positions.double()[..., None] * inv_freq
        angle = torch.cat([angle, angle], dim=-1)
        return apply_rotary_pos_emb(x, x, angle.cos(), angle.sin())[0]

    return apply


positions = torch.tensor([[0, 1, 2, 0, 1], [3, 0, 1, 2, 3]])
case(
    "rotary_positions",
    "rotary",
    rotary_at(10000.0),
    {"x": exact(2, 2, 5, 8), "positions": positions},
    {"rope_theta": 10000.0, "layout": "BHTD"},
)

for name, f in {"silu": F.silu, "geluTanh": lambda gate: F.gelu(gate, approximate="tanh")}.items():
    case(
        f"gated_{name}",
        "gated",
        lambda gate, up: f(gate) * up,
        {"gate": exact(3, 5, scale=2), "up": exact(3, 5)},
        {"activation": name},
    )

ids = torch.tensor([[3, 0, 3], [1, 6, 3]])
case("embedding", "embedding", lambda weight, ids: F.embedding(ids, weight), {"weight": exact(7, 5), "ids": ids})

case(
    "linear_bias",
    "linear",
    lambda x, weight, bias: F.linear(x, weight, bias),
    {"x": exact(2, 3, 8), "weight": exact(6, 8), "bias": exact(6)},
)

case(
    "linear_cross_entropy",
    "linear_cross_entropy",
    lambda h, weight, targets: F.cross_entropy(h @ weight.T, targets, ignore_index=-100, reduction="sum"),
    {"h": exact(5, 4), "weight": exact(9, 4), "targets": torch.tensor([4, -100, 0, 8, -100])},
)


def add_rms_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Both results go on, as in a model."""
    total = x + delta
    return total + F.rms_norm(total, total.shape[-1:], weight, 1e-5)


case(
    "add_rms_norm",
    "add_rms_norm",
    add_rms_norm,
    {"x": exact(3, 5), "delta": exact(3, 5), "weight": exact(5)},
    {"eps": 1e-5},
)


def lora_linear(x, weight, a, b) -> torch.Tensor:
    """PEFT's own layer, in f64."""
    base = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).double()
    config = peft.LoraConfig(r=a.shape[0], lora_alpha=6, target_modules=["0"], lora_dropout=0.0)
    layer = peft.get_peft_model(torch.nn.Sequential(base), config).base_model.model[0].double()
    named = {
        "base_layer.weight": weight,
        "lora_A.default.weight": a,
        "lora_B.default.weight": b,
    }
    return torch.func.functional_call(layer, named, (x,))


case(
    "lora_linear",
    "lora_linear",
    lora_linear,
    {"x": exact(2, 3, 8), "weight": exact(5, 8), "a": exact(3, 8), "b": exact(5, 3)},
    {"scale": 2.0},
)

case(
    "linear_cross_entropy_smoothed",
    "linear_cross_entropy",
    lambda h, weight, targets: F.cross_entropy(
        h @ weight.T, targets, ignore_index=-100, reduction="sum", label_smoothing=0.2
    ),
    {"h": exact(5, 4), "weight": exact(9, 4), "targets": torch.tensor([4, -100, 0, 8, -100])},
    {"label_smoothing": 0.2},
)

write_json(GOLDEN / "ops.json", {"made_with": MADE_WITH, "cases": cases})
print(f"{len(cases)} cases")

"""Floating-point operations of the model, counted from its configuration: what the compiled program executes.

A multiply-add counts 2. Attention is counted as computed, the whole S x S square, also under a causal mask; routed
blocks are counted by their slots, filled or not. Elementwise work is left out.
"""

from __future__ import annotations

from uoe_jax.config import ModelConfig

# Peak dense 16-bit FLOP/s of one device, by `device_kind`; a chip that is not listed has no MFU.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


def attention_flops(c: ModelConfig, length: int) -> float:
    """Forward pass of one attention block over one row."""
    d, dh, h, g = c.d_model, c.head_dim, c.n_heads, c.kv_heads
    if c.attention == "dense":
        return 2 * length * d * dh * (2 * h + 2 * g) + 4 * h * dh * length**2
    r = c.smha
    m = length // r.patch_size
    n, s = r.n_experts, r.slots(m) * r.patch_size
    entering = s if r.order == "gather" else length
    return 2 * m * d * n + 2 * entering * d * dh * (h + 2 * g) + 2 * s * d * dh * h + 4 * h * dh * s**2


def mlp_flops(c: ModelConfig, length: int) -> float:
    """Forward pass of one MLP block over one row."""
    into = 2 if c.activation in ("swiglu", "geglu") else 1
    if c.mlp == "dense":
        return 2 * (into + 1) * length * c.d_model * c.d_hidden
    r = c.uome
    m = length // r.patch_size
    slots = r.slots(m) * r.patch_size
    entering = slots if r.order == "gather" else length
    return 2 * m * c.d_model * r.n_experts + 2 * (into * entering + slots) * c.d_model * c.d_hidden


def forward_flops(c: ModelConfig, length: int | None = None) -> float:
    """Forward pass of the whole model over one row of `length` tokens (the context length by default)."""
    length = length or c.context_length
    per_layer = attention_flops(c, length) + mlp_flops(c, length)
    return c.n_layers * per_layer + 2 * length * c.d_model * c.vocab_size


def train_flops(c: ModelConfig, rows: int) -> float:
    """One optimizer step over `rows` rows: forward and a backward of twice that; recomputation is not counted."""
    return 3 * rows * forward_flops(c)

"""Checks of the compared architectures' keys; each raises ConfigError with the numbers and the remedy."""

from __future__ import annotations

from typing import Iterator

from uoe_jax.config.baselines import (
    ATTENTIONS,
    ENCODER_ATTENTIONS,
    ENCODER_MLPS,
    MLPS,
    SECTIONS,
    UNIONS,
)
from uoe_jax.config.schema import ModelConfig
from uoe_jax.errors import ConfigError

# Why a block is not admitted in a causal model.
NOT_CAUSAL = {
    "mosa": "which tokens a head takes depends on later ones",
    "linformer": "every key is a mean over the whole row",
    "nystromformer": "landmarks are means over the whole row",
    "performer": "it is made for encoders here, where keys of all tokens are summed up at once",
    "reformer": "the tokens that a hash puts together are sorted over the whole row",
    "long_short": "its dynamic projections are means over the whole row",
    "expert_choice": "which tokens an expert takes depends on later ones",
}
assert set(NOT_CAUSAL) == {*ENCODER_ATTENTIONS, *ENCODER_MLPS}
NEVER_LEARNS = "the weights of the chosen are rescaled, and of one alone it is always the same, so that the router never learns; give at least 2"


def check_peers(m: ModelConfig) -> None:
    """Checks the blocks of a model that are compared architectures."""
    for key, block in (("attention", m.attention), ("mlp", m.mlp)):
        if m.causal and block in NOT_CAUSAL:
            raise ConfigError(
                f"config.model.{key}",
                block,
                f"{NOT_CAUSAL[block]}, so that it cannot be causal; choose another, or causal=False",
            )
    if m.mlp in MLPS:
        _check_mixture(m)
    if m.attention in ATTENTIONS:
        _check_attention(m)


def _check_mixture(m: ModelConfig) -> None:
    c, at_once = m.moe, m.moe.k + m.moe.n_shared
    if c.k > c.n_experts:
        raise ConfigError(
            "config.model.moe.k",
            c.k,
            f"a token cannot choose more than n_experts={c.n_experts} experts",
        )
    if c.k == 1 < c.n_experts and (
        m.mlp == "skywork_moe" or m.mlp == "deepseek_moe" and c.score == "sigmoid"
    ):
        raise ConfigError("config.model.moe.k", 1, f"(mlp={m.mlp!r}) {NEVER_LEARNS}")
    if not c.d_expert and m.d_hidden % at_once:
        remedy = f"0 cuts d_hidden={m.d_hidden} in k={c.k} + n_shared={c.n_shared} parts, which leaves a rest; give a width"
        raise ConfigError("config.model.moe.d_expert", 0, remedy)


def _check_attention(m: ModelConfig) -> None:
    drops = ("mla", "moh", "mosa")
    if m.attention_dropout and m.attention not in drops:
        remedy = (
            f"attention={m.attention!r} has no attention weights to drop; use 0, or model.dropout"
        )
        raise ConfigError("config.model.attention_dropout", m.attention_dropout, remedy)
    if m.attention in ("mosa", "mla", "reformer") and m.kv_heads != m.n_heads:
        remedy = f"every head of attention={m.attention!r} has its own keys; give n_heads={m.n_heads}, or 0"
        raise ConfigError("config.model.n_kv_heads", m.n_kv_heads, remedy)
    if m.attention in ("mla", "reformer") and m.qk_norm:
        raise ConfigError(
            "config.model.qk_norm",
            True,
            f"attention={m.attention!r} has norms of its own; use False",
        )
    if m.attention == "mla" and m.position == "rope" and m.rotary_dim % 2:
        raise ConfigError(
            "config.model.mla.d_rope",
            m.mla.d_rope,
            f"rotary positions need an even width, and it is {m.rotary_dim}",
        )
    routed = m.n_heads - m.moh.n_shared
    if m.attention == "moh" and m.moh.k > routed:
        remedy = f"beside n_shared={m.moh.n_shared} of n_heads={m.n_heads} heads there are {max(routed, 0)} to choose from"
        raise ConfigError("config.model.moh.k", m.moh.k, remedy)
    if m.attention == "moh" and m.moh.k == 1 < routed:
        raise ConfigError("config.model.moh.k", 1, NEVER_LEARNS)
    if (
        m.attention == "nystromformer"
        and m.nystromformer.kernel
        and m.nystromformer.kernel % 2 == 0
    ):
        raise ConfigError(
            "config.model.nystromformer.kernel",
            m.nystromformer.kernel,
            "a token is in the middle; give an odd number, or 0",
        )
    if m.attention == "long_short" and m.long_short.window % 2:
        raise ConfigError(
            "config.model.long_short.window",
            m.long_short.window,
            "half of it is seen on either side; give an even number",
        )


def peer_sizes(m: ModelConfig) -> Iterator[tuple[str, int]]:
    """(what, size) of all that the mesh axis `expert` must divide."""
    if m.attention in ATTENTIONS:
        yield "model.n_kv_heads" if m.n_kv_heads else "model.n_heads", m.kv_heads
    if m.mlp in MLPS:
        yield "model.moe.n_experts", m.moe.n_experts
        if m.moe.n_shared:
            yield "model.moe.n_shared * model.moe.d_expert", m.whole_hidden


def peer_uses(m: ModelConfig) -> Iterator[tuple[str, bool, str]]:
    """(key, or the beginning of several, whether it changes anything, the remedy), as `checks.check_idle` reads them."""
    for section in dict.fromkeys(SECTIONS.values()):
        blocks = [block for block, name in SECTIONS.items() if name == section]
        if (
            section not in UNIONS
        ):  # of these, config files set what a variant without them leaves alone
            wanted = " or ".join(
                f"model.mlp={b!r}" if b in MLPS else f"model.attention={b!r}" for b in blocks
            )
            yield f"model.{section}.", bool({m.attention, m.mlp} & set(blocks)), f"is for {wanted}"
    for block, keys in {
        "deepseek_moe": ("n_shared", "score", "scale", "bias_rate"),
        "xmoe": ("threshold",),
        "skywork_moe": ("logit_scale", "adaptive_rate", "adaptive_decay", "adaptive_most"),
    }.items():
        for key in keys:
            yield f"model.moe.{key}", m.mlp == block, f"is for model.mlp={block!r}"
    for key in ("balance_weight", "capacity_window"):
        yield (
            f"model.moe.{key}",
            m.mlp != "expert_choice",
            "does nothing where experts choose (model.mlp='expert_choice')",
        )

"""Checks of the baselines' keys: what `validate` refuses, with the numbers and the remedy."""

from typing import Iterator

from uoe_jax.config.baselines import ATTENTIONS, MLPS, NOT_CAUSAL
from uoe_jax.config.fields import wrong
from uoe_jax.config.schema import ModelConfig

NEVER_LEARNS = "one rescaled weight is always the same, so the router never learns; give 2 or more"
# Keys of model.moe that one mixture alone uses.
OF_ONE_MIXTURE = {
    "deepseek_moe": ("n_shared", "score", "scale", "bias_rate"),
    "xmoe": ("threshold",),
    "skywork_moe": ("logit_scale", "adaptive_rate", "adaptive_decay", "adaptive_most"),
}


def check_baselines(m: ModelConfig) -> None:
    """Checks those blocks of a model that are baselines."""
    for place, block in (("attention", m.attention), ("mlp", m.mlp)):
        if m.causal and block in NOT_CAUSAL:
            raise wrong(m, place, f"{NOT_CAUSAL[block]}; choose another, or causal=False")
    if m.mlp in MLPS:
        _check_mixture(m)
    if m.attention in ATTENTIONS:
        _check_attention(m)


def _check_mixture(m: ModelConfig) -> None:
    c = m.moe
    rescaled = m.mlp == "skywork_moe" or m.mlp == "deepseek_moe" and c.score == "sigmoid"
    if c.k > c.n_experts:
        raise wrong(m, "moe.k", f"a token cannot choose more than n_experts={c.n_experts}")
    if c.k == 1 < c.n_experts and rescaled:
        raise wrong(m, "moe.k", f"(mlp={m.mlp!r}) {NEVER_LEARNS}")
    if not c.d_expert and m.d_hidden % (c.k + c.n_shared):
        parts = f"k={c.k} + n_shared={c.n_shared} do not divide d_hidden={m.d_hidden}"
        raise wrong(m, "moe.d_expert", f"{parts}; give a width")


def _check_attention(m: ModelConfig) -> None:
    name, kernel = f"attention={m.attention!r}", m.nystromformer.kernel
    if m.attention_dropout and m.attention not in ("mla", "moh", "mosa"):
        why = f"{name} has no attention weights to drop"
        raise wrong(m, "attention_dropout", f"{why}; use 0, or model.dropout")
    if m.attention in ("mosa", "mla", "reformer") and m.kv_heads != m.n_heads:
        raise wrong(m, "n_kv_heads", f"heads of {name} have own keys; give {m.n_heads}, or 0")
    if m.attention in ("mla", "reformer") and m.qk_norm:
        raise wrong(m, "qk_norm", f"{name} has its own norms; use False")
    if m.attention == "mla" and m.position == "rope" and m.rotary_dim % 2:
        raise wrong(m, "mla.d_rope", f"RoPE needs an even width, and it is {m.rotary_dim}")
    routed = m.n_heads - m.moh.n_shared
    if m.attention == "moh" and m.moh.k > routed:
        heads = f"n_heads={m.n_heads} - n_shared={m.moh.n_shared}"
        raise wrong(m, "moh.k", f"{heads} leave {max(routed, 0)} heads to choose from")
    if m.attention == "moh" and m.moh.k == 1 < routed:
        raise wrong(m, "moh.k", NEVER_LEARNS)
    if m.attention == "nystromformer" and kernel and kernel % 2 == 0:
        raise wrong(m, "nystromformer.kernel", "give an odd number, or 0")
    if m.attention == "long_short" and m.long_short.window % 2:
        raise wrong(m, "long_short.window", "half is seen on either side; give an even number")


def baseline_uses(m: ModelConfig) -> Iterator[tuple[str, bool, str]]:
    """(key, or section with its dot; whether it has an effect; the remedy) for keys of baselines.

    The sections of unions are left out: config files set them for variants with other blocks too.
    """
    for name in ATTENTIONS:
        yield f"model.{name}.", m.attention == name, f"is for model.attention={name!r}"
    mixtures = " or ".join(f"model.mlp={name!r}" for name in MLPS)
    yield "model.moe.", m.mlp in MLPS, f"is for {mixtures}"
    for block, names in OF_ONE_MIXTURE.items():
        for name in names:
            yield f"model.moe.{name}", m.mlp == block, f"is for model.mlp={block!r}"
    idle = "has no effect if experts choose (model.mlp='expert_choice')"
    for name in ("balance_weight", "capacity_window"):
        yield f"model.moe.{name}", m.mlp != "expert_choice", idle

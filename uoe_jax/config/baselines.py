"""Sections of the configuration for the compared architectures (`uoe_jax.baselines`): what each has beside the model's own sizes.

A block's section has the block's name; the mixtures of experts share one, `model.moe`.
"""

from __future__ import annotations

import dataclasses

from uoe_jax.config.fields import key
from uoe_jax.config.routing import RoutingConfig

CAUSAL_ATTENTIONS = ("mla", "moh")
ENCODER_ATTENTIONS = (
    "mosa",
    "linformer",
    "nystromformer",
    "performer",
    "reformer",
    "long_short",
)  # none can be causal here
ATTENTIONS = (*CAUSAL_ATTENTIONS, *ENCODER_ATTENTIONS)
MLPS = ("token_choice", "expert_choice", "deepseek_moe", "xmoe", "skywork_moe")
ENCODER_MLPS = ("expert_choice",)
UNIONS = ("smha", "uome")  # what they are compared with
SECTIONS = {name: name for name in (*UNIONS, *ATTENTIONS)} | dict.fromkeys(
    MLPS, "moe"
)  # of a block, by its name


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixtures of experts in place of the MLP: each expert is a small MLP of its own, not a part of a whole one."""

    n_experts: int = key(8, "N, routed experts", low=1)
    k: int = key(2, "K, experts a token chooses; of xmoe, how many it is expected to choose", low=1)
    n_shared: int = key(0, "experts that every token goes through (deepseek_moe)", low=0)
    d_expert: int = key(
        0,
        "hidden width of an expert; 0: d_hidden / (k + n_shared), a token's work in the dense MLP",
        low=0,
    )
    capacity_factor: float = key(
        1.25, "slots per expert, relative to an even load", above=0, high=1e6
    )
    capacity_window: int = key(64, "tokens per capacity window", low=1)
    score: str = key(
        "softmax",
        "how deepseek_moe scores: softmax, or as in V3 sigmoid, rescaled over the chosen",
        choices=("softmax", "sigmoid"),
    )
    scale: float = key(
        1.0,
        "what the routed experts' rescaled weights sum to (deepseek_moe with score='sigmoid')",
        above=0,
        high=1e3,
    )
    threshold: float = key(
        0.9,
        "a token chooses its best experts until their probabilities sum to this (xmoe)",
        above=0,
        high=1,
    )
    logit_scale: float = key(
        1.0, "standard deviation of a token's normalised logits (skywork_moe)", above=0, high=1e3
    )
    balance_weight: float = key(0.01, "weight of the Switch balance loss", low=0, high=1e3)
    adaptive_rate: float = key(
        0.0,
        "of skywork_moe: a layer's balance weight follows this times its share of dropped tokens; 0: it stays",
        low=0,
        high=1e3,
    )
    adaptive_most: float = key(0.01, "what it follows is no more than this", low=0, high=1e3)
    adaptive_decay: float = key(
        0.99, "how slowly it follows: the share of the old weight that a step keeps", low=0, high=1
    )
    bias_rate: float = key(
        0.0, "step of the loss-free balancing bias (deepseek_moe); 0 turns it off", low=0, high=1
    )
    z_weight: float = key(0.0, "weight of the router z-loss", low=0, high=1e3)

    def routing(self, kind: str) -> RoutingConfig:
        """The routing of a mixture as that of a union of experts: one patch a token, capacity counted in windows of the row.

        Under expert choice all tokens come to every expert, which takes the best ceil(factor · L · K / N) of them.
        """
        chosen = kind == "expert_choice"
        return RoutingConfig(
            n_experts=self.n_experts,
            k=self.k,
            capacity_factor=self.capacity_factor,
            capacity_window=self.capacity_window,
            priority="score" if chosen else "position",
            gate="peer",
            balance_weight=0.0 if chosen else self.balance_weight,
            bias_rate=self.bias_rate if kind == "deepseek_moe" else 0.0,
            z_weight=self.z_weight,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2 and V3). A head is n_heads' width and a rotary part that is compared as well."""

    q_rank: int = key(96, "width of the queries' latent; 0: queries are projected at once", low=0)
    kv_rank: int = key(
        96, "width of the latent that keys and values are made of, and that decoding keeps", low=1
    )
    d_rope: int = key(0, "rotary width of a head, beside its own; 0: half of that", low=0)

    def rotary_width(self, head_dim: int) -> int:
        return self.d_rope or head_dim // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoSAConfig:
    """Mixture of sparse attention: every head takes the tokens that its router scores best."""

    capacity_factor: float = key(0.5, "share of a row's tokens that a head takes", above=0, high=1)

    def routing(self, n_heads: int) -> RoutingConfig:
        """Every head is an expert to which all tokens may come."""
        return RoutingConfig(
            n_experts=n_heads,
            k=n_heads,
            capacity_factor=self.capacity_factor,
            priority="score",
            gate="peer",
            balance_weight=0.0,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoHConfig:
    """Mixture of attention heads: some heads for every token, and of the others those that it chooses."""

    n_shared: int = key(2, "heads that every token uses", low=0)
    k: int = key(2, "of the other heads, how many a token chooses", low=1)
    balance_weight: float = key(
        0.01, "weight of the Switch balance loss of the chosen heads", low=0, high=1e3
    )

    def routing(self, n_heads: int) -> RoutingConfig:
        return RoutingConfig(
            n_experts=n_heads - self.n_shared,
            k=self.k,
            gate="peer",
            balance_weight=self.balance_weight,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinformerConfig:
    """Keys and values of a row projected to few."""

    rank: int = key(64, "keys and values that are left", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NystromformerConfig:
    """Attention through landmarks, the means of consecutive tokens."""

    landmarks: int = key(32, "landmarks of a row", low=1)
    iterations: int = key(6, "steps of the pseudo-inverse", low=1, high=100)
    kernel: int = key(
        35, "tokens of the convolution of the values that is added, odd; 0: none", low=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformerConfig:
    """Softmax attention by positive random features (FAVOR+)."""

    features: int = key(64, "random features of a head", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReformerConfig:
    """Attention among tokens that a hash puts together (LSH), queries and keys being the same."""

    n_hashes: int = key(2, "rounds of hashing", low=1)
    chunk: int = key(32, "tokens of a chunk, which attends to itself and the one before", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongShortConfig:
    """Attention to a window of neighbours and to a few dynamic projections of the whole row (Transformer-LS)."""

    window: int = key(
        16,
        "tokens of a segment; a token sees its own segment and half a segment on either side",
        low=2,
    )
    rank: int = key(16, "dynamic projections of the row", low=1)

"""Sections of the configuration for the baselines (`uoe_jax.baselines`).

A block's section has the block's name; all mixtures of experts share `model.moe`.
"""

import dataclasses

from uoe_jax.config.fields import key
from uoe_jax.config.routing import RoutingConfig

EFFICIENT = ("linformer", "nystromformer", "performer", "reformer", "long_short")
ATTENTIONS = ("mla", "moh", "mosa", *EFFICIENT)
MLPS = ("token_choice", "expert_choice", "deepseek_moe", "xmoe", "skywork_moe")
# Why a block cannot be causal; the others can.
NOT_CAUSAL = {
    "mosa": "which tokens a head takes depends on later ones",
    "linformer": "every key is a mean over the whole row",
    "nystromformer": "landmarks are means over the whole row",
    "performer": "this implementation sums the keys of all tokens at once",
    "reformer": "tokens are sorted by hash over the whole row",
    "long_short": "its dynamic projections are means over the whole row",
    "expert_choice": "which tokens an expert takes depends on later ones",
}
UNIONS = ("smha", "uome")
# Block -> its section of `model`.
SECTIONS = {name: name for name in (*UNIONS, *ATTENTIONS)} | dict.fromkeys(MLPS, "moe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixtures of experts in place of the MLP; each expert is a small MLP of its own."""

    n_experts: int = key(8, "N, routed experts", low=1)
    k: int = key(2, "K, experts per token (top-k); for xmoe the expected number", low=1)
    n_shared: int = key(0, "shared experts, which take every token (deepseek_moe)", low=0)
    d_expert: int = key(0, "hidden width of an expert; 0: d_hidden / (k + n_shared)", low=0)
    capacity_factor: float = key(
        1.25, "expert capacity relative to an even load", above=0, high=1e6
    )
    capacity_window: int = key(64, "tokens per capacity window", low=1)
    score: str = key("softmax", "router scores of deepseek_moe", choices=("softmax", "sigmoid"))
    scale: float = key(1.0, "sum of combine weights (score='sigmoid')", above=0, high=1e3)
    threshold: float = key(0.9, "total probability of a token's experts (xmoe)", above=0, high=1)
    logit_scale: float = key(
        1.0, "standard deviation of the router logits (skywork_moe)", above=0, high=1e3
    )
    balance_weight: float = key(0.01, "weight of the Switch load-balancing loss", low=0, high=1e3)
    # Skywork's adaptive weight is the moving average of min(rate * dropped share, most), per layer.
    adaptive_rate: float = key(
        0.0, "adaptive weight per share of dropped tokens (skywork_moe); 0: off", low=0, high=1e3
    )
    adaptive_most: float = key(0.01, "upper limit of that adaptive weight", low=0, high=1e3)
    adaptive_decay: float = key(0.99, "decay of its moving average", low=0, high=1)
    bias_rate: float = key(
        0.0, "step of the loss-free load-balancing bias (deepseek_moe); 0: off", low=0, high=1
    )
    z_weight: float = key(0.0, "weight of the router z-loss", low=0, high=1e3)

    def routing(self, kind: str) -> RoutingConfig:
        """The routing of the mixture `kind` (of MLPS) as a union's, with one token per patch.

        Under expert choice every expert takes the best ceil(factor · L · K / N) of all tokens;
        otherwise capacity is counted in windows.
        """
        same = "n_experts k capacity_factor capacity_window balance_weight z_weight".split()
        out = RoutingConfig(gate="baseline", **{name: getattr(self, name) for name in same})
        if kind == "expert_choice":
            return dataclasses.replace(out, priority="score", balance_weight=0.0)
        bias_rate = self.bias_rate if kind == "deepseek_moe" else 0.0
        return dataclasses.replace(out, bias_rate=bias_rate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLAConfig:
    """Multi-head latent attention of DeepSeek-V2 and V3."""

    q_rank: int = key(96, "width of the query latent; 0: queries without a latent", low=0)
    kv_rank: int = key(96, "width of the key/value latent, which the KV cache holds", low=1)
    d_rope: int = key(0, "additional rotary width of a head; 0: half of its width", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoSAConfig:
    """Mixture of sparse attention; every head takes the tokens that its router scores best."""

    capacity_factor: float = key(0.5, "share of a row's tokens per head", above=0, high=1)

    def routing(self, n_heads: int) -> RoutingConfig:
        """Every head is an expert that chooses among all tokens."""
        by_score = RoutingConfig(priority="score", gate="baseline", balance_weight=0.0)
        factor = self.capacity_factor
        return dataclasses.replace(by_score, n_experts=n_heads, k=n_heads, capacity_factor=factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoHConfig:
    """Mixture of attention heads; a token uses the shared heads and chooses among the others."""

    n_shared: int = key(2, "shared heads, which every token uses", low=0)
    k: int = key(2, "routed heads per token (top-k)", low=1)
    balance_weight: float = key(0.01, "weight of the Switch load-balancing loss", low=0, high=1e3)

    def routing(self, n_heads: int) -> RoutingConfig:
        """Every head that is not shared is an expert."""
        routed, weight = n_heads - self.n_shared, self.balance_weight
        return RoutingConfig(n_experts=routed, k=self.k, gate="baseline", balance_weight=weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinformerConfig:
    """Linformer; the keys and values of a row are projected to a few."""

    rank: int = key(64, "keys and values after the projection", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NystromformerConfig:
    """Nyströmformer; attention through landmarks, the means of consecutive tokens."""

    landmarks: int = key(32, "landmarks per row", low=1)
    iterations: int = key(6, "iterations of the pseudo-inverse", low=1, high=100)
    kernel: int = key(35, "odd width of the convolution of the values; 0: no convolution", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerformerConfig:
    """Performer; softmax attention by positive random features (FAVOR+)."""

    features: int = key(64, "random features per head", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReformerConfig:
    """Reformer; attention among tokens with the same hash (LSH), with shared queries and keys."""

    n_hashes: int = key(2, "rounds of hashing", low=1)
    chunk: int = key(32, "tokens per chunk, which attends to itself and the previous one", low=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongShortConfig:
    """Transformer-LS; attention to a window of neighbours and to dynamic projections of the row."""

    window: int = key(16, "tokens per segment; half a segment on either side is seen too", low=2)
    rank: int = key(16, "dynamic projections of the row", low=1)

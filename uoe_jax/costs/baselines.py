"""What the compared attentions cost: operations, weights and what is kept of a row, counted from the configuration.

Mixtures of experts and MoSA are counted as the unions of experts they are (`flops`, `memory`). Letters as in
`layers.common`; a multiply-add counts 2, elementwise work is left out.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.tiles import computed_scores


class Cost(NamedTuple):
    """Of one attention block.

    Attributes:
      flops: forward pass over one row. core: of these, what compares tokens and mixes values.
      parameters: weights. active: of these, what a token meets.
      kept: values of a row that the forward pass keeps for the backward pass under remat='slots'. sums: float32 ones beside
        them, the logarithm of each query's sum in every head whose attention is computed in tiles.
    """

    flops: float
    core: float
    parameters: int
    active: float
    kept: float
    sums: float = 0


def dense(c: ModelConfig, length: int) -> Cost:
    """Full attention, which the others are measured by."""
    core = 4 * c.n_heads * c.head_dim * computed_scores(length, c.causal)
    return _over_projections(c, length, core)._replace(sums=length * c.n_heads)


def _over_projections(c: ModelConfig, length: int, core: float, more: int = 0) -> Cost:
    """Of a block with the dense block's projections, `more` weights beside them, and another core."""
    d, dh, h, g = c.d_model, c.head_dim, c.n_heads, c.kv_heads
    projections = d * dh * (2 * h + 2 * g)
    biases = (c.bias or c.qkv_bias) * dh * (h + 2 * g) + c.bias * d
    weights = projections + biases + 2 * dh * c.qk_norm + more
    return Cost(
        2 * length * projections + core, core, weights, weights, length * dh * (2 * h + 2 * g)
    )


def moh(c: ModelConfig, length: int) -> Cost:
    shared, routed = c.moh.n_shared, c.n_heads - c.moh.n_shared
    choices = routed + (shared if shared > 1 else 0) + (2 if shared else 0)
    whole, weights = dense(c, length), c.d_model * choices
    idle = (
        (routed - c.moh.k) * c.d_model * c.head_dim * 2
    )  # the query and output rows of heads that a token did not choose
    return whole._replace(
        flops=whole.flops + 2 * length * weights,
        parameters=whole.parameters + weights,
        active=whole.parameters + weights - idle,
    )


def mla(c: ModelConfig, length: int) -> Cost:
    d, h, dh, r, dr, narrow = (
        c.d_model,
        c.n_heads,
        c.head_dim,
        c.mla.kv_rank,
        c.rotary_dim,
        c.mla.q_rank,
    )
    queries = (d + h * (dh + dr)) * narrow if narrow else d * h * (dh + dr)
    products = d * (r + dr) + 2 * r * h * dh + queries + h * dh * d
    core = 2 * computed_scores(length, c.causal) * h * (2 * dh + dr)
    weights = products + r + narrow + c.bias * d
    return Cost(
        2 * length * products + core,
        core,
        weights,
        weights,
        length * h * ((dh + dr) + 3 * dh),
        length * h,
    )


def linformer(c: ModelConfig, length: int) -> Cost:
    r = c.linformer.rank
    return _over_projections(
        c, length, core=8 * length * r * c.d_model, more=2 * c.block_length * r
    )


def nystromformer(c: ModelConfig, length: int) -> Cost:
    n, d, h = c.nystromformer, c.d_model, c.n_heads
    r = n.landmarks
    core = (
        12 * length * r * d + 4 * r**2 * d + 8 * n.iterations * r**3 * h + 2 * n.kernel * length * d
    )
    return _over_projections(c, length, core, more=h * n.kernel)


def performer(c: ModelConfig, length: int) -> Cost:
    r = c.performer.features
    return _over_projections(
        c, length, core=length * r * (8 * c.d_model + 2 * c.n_heads), more=r * c.head_dim
    )


def long_short(c: ModelConfig, length: int) -> Cost:
    r, w = c.long_short.rank, c.long_short.window
    padded = -(-length // w) * w
    scores = c.d_model * c.n_heads * r
    core = 2 * length * scores + (4 * length * r + padded * (8 * w + 4 * r)) * c.d_model
    return _over_projections(c, length, core, more=scores + 4 * c.d_model)


def reformer(c: ModelConfig, length: int) -> Cost:
    d, rounds, chunk = c.d_model, c.reformer.n_hashes, c.reformer.chunk
    half, padded = -(-c.block_length // chunk), -(-length // chunk) * chunk
    core = padded * d * rounds * (8 * chunk + 2 * half)
    weights = 3 * d**2 + d * rounds * half + c.bias * 3 * d
    return Cost(6 * length * d**2 + core, core, weights, weights, length * 3 * d)


ATTENTIONS: dict[str, Callable[[ModelConfig, int], Cost]] = {
    "dense": dense,
    "moh": moh,
    "mla": mla,
    "linformer": linformer,
    "nystromformer": nystromformer,
    "performer": performer,
    "long_short": long_short,
    "reformer": reformer,
}

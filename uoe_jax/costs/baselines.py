"""Costs of the baselines' attentions, counted from the configuration.

Mixtures of experts and MoSA are counted as unions of experts (`costs.flops`, `costs.memory`). A
multiply-add counts 2; elementwise work is left out. Letters in `layers.common`.
"""

from typing import Callable, NamedTuple

from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.tiles import computed_scores


class Cost(NamedTuple):
    """Of one attention block and one row."""

    flops: float  # forward pass
    core: float  # of these, what compares tokens and mixes values
    kept: float  # values saved for the backward pass under remat='slots'
    sums: float = 0  # float32 values beside them: log-sum-exp of queries, where computed in tiles
    idle: float = 0  # parameters that a token does not use


def dense(c: ModelConfig, length: int) -> Cost:
    core = 4 * c.n_heads * c.head_dim * computed_scores(length, c.causal)
    return _with_projections(c, length, core)._replace(sums=length * c.n_heads)


def _with_projections(c: ModelConfig, length: int, core: float) -> Cost:
    width = c.head_dim * (2 * c.n_heads + 2 * c.kv_heads)
    return Cost(2 * length * c.d_model * width + core, core, length * width)


def moh(c: ModelConfig, length: int) -> Cost:
    shared, routed = c.moh.n_shared, c.n_heads - c.moh.n_shared
    choices = routed + (shared if shared > 1 else 0) + (2 if shared else 0)
    whole = dense(c, length)
    # The query and output rows of the heads that a token did not choose.
    idle = (routed - c.moh.k) * c.d_model * c.head_dim * 2
    return whole._replace(flops=whole.flops + 2 * length * c.d_model * choices, idle=idle)


def mla(c: ModelConfig, length: int) -> Cost:
    d, h, dh, dr, j, narrow = (
        c.d_model,
        c.n_heads,
        c.head_dim,
        c.rotary_dim,
        c.mla.kv_rank,
        c.mla.q_rank,
    )
    queries = (d + h * (dh + dr)) * narrow if narrow else d * h * (dh + dr)
    products = d * (j + dr) + 2 * j * h * dh + queries + h * dh * d
    core = 2 * computed_scores(length, c.causal) * h * (2 * dh + dr)
    return Cost(2 * length * products + core, core, length * h * (4 * dh + dr), length * h)


def linformer(c: ModelConfig, length: int) -> Cost:
    return _with_projections(c, length, 8 * length * c.linformer.rank * c.d_model)


def nystromformer(c: ModelConfig, length: int) -> Cost:
    n, d, j = c.nystromformer, c.d_model, c.nystromformer.landmarks
    core = 12 * length * j * d + 4 * j**2 * d + 8 * n.iterations * j**3 * c.n_heads
    return _with_projections(c, length, core + 2 * n.kernel * length * d)


def performer(c: ModelConfig, length: int) -> Cost:
    core = length * c.performer.features * (8 * c.d_model + 2 * c.n_heads)
    return _with_projections(c, length, core)


def long_short(c: ModelConfig, length: int) -> Cost:
    j, w = c.long_short.rank, c.long_short.window
    padded = -(-length // w) * w
    core = (2 * length * c.n_heads * j + 4 * length * j + padded * (8 * w + 4 * j)) * c.d_model
    return _with_projections(c, length, core)


def reformer(c: ModelConfig, length: int) -> Cost:
    d, rounds, chunk = c.d_model, c.reformer.n_hashes, c.reformer.chunk
    half, padded = -(-c.block_length // chunk), -(-length // chunk) * chunk
    core = padded * d * rounds * (8 * chunk + 2 * half)
    return Cost(6 * length * d**2 + core, core, length * 3 * d)


_COSTS = (dense, moh, mla, linformer, nystromformer, performer, long_short, reformer)
ATTENTIONS: dict[str, Callable[[ModelConfig, int], Cost]] = {f.__name__: f for f in _COSTS}

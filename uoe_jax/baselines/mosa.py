"""Mixture of sparse attention (Piękos, Csordás, Schmidhuber 2025, arXiv 2505.00315): every head chooses its tokens.

A head takes the `capacity_factor`·L tokens whose sigmoid router score is highest, attends among them at their true
positions, and its output is scaled by the scores. That is an SMHA of one head an expert, to which all tokens may come.
Which tokens are best depends on later ones, so this is for encoders: the authors' language models mask by position among
what was chosen with knowledge of the future. They also put some dense heads beside these, and rotate half of a head.
"""

from __future__ import annotations

import jax
from flax import nnx

from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.attention import options
from uoe_jax.layers.smha import SMHA
from uoe_jax.moe.routing import UNION

RULE = UNION._replace(
    log_shares=lambda logits: jax.nn.log_softmax(jax.nn.log_sigmoid(logits)),
    scores=jax.nn.sigmoid,
    weigh=lambda r, logits, scores, chosen: scores,
)


class MoSA(SMHA):
    """model.attention='mosa'."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        super().__init__(
            c.d_model, c.n_heads, c.mosa.routing(c.n_heads), rule=RULE, rngs=rngs, **options(c)
        )

"""Baselines: other architectures' blocks in the same model, by `model.attention` and `model.mlp`.

Every block is a `layers.common.Block`, made from the model's configuration, `Made(config,
rngs=rngs)`. Those that can be causal decode as well.
"""

from typing import Callable

from uoe_jax.baselines import encoders
from uoe_jax.baselines.heads import MoH, MoSA
from uoe_jax.baselines.mixtures import RULES, Mixture
from uoe_jax.baselines.mla import MLA
from uoe_jax.layers.common import Block

ATTENTIONS: dict[str, Callable[..., Block]] = {
    "mla": MLA,
    "mosa": MoSA,
    "moh": MoH,
    "linformer": encoders.Linformer,
    "nystromformer": encoders.Nystromformer,
    "performer": encoders.Performer,
    "reformer": encoders.Reformer,
    "long_short": encoders.LongShort,
}
MLPS: dict[str, Callable[..., Block]] = dict.fromkeys(RULES, Mixture)

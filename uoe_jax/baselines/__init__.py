"""Baselines: other architectures' blocks in the same model, by `model.attention` and `model.mlp`.

Every block is made from the model's configuration, `Made(config, rngs=rngs)`, and is a
`layers.common.Block`. Those that can be causal decode as well.
"""

from typing import Protocol

from flax import nnx

from uoe_jax.baselines.encoders import Linformer, LongShort, Nystromformer, Performer, Reformer
from uoe_jax.baselines.heads import MoH, MoSA
from uoe_jax.baselines.mixtures import DeepSeekMoE, ExpertChoice, SkyworkMoE, TokenChoice, XMoE
from uoe_jax.baselines.mla import MLA
from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.common import Block


class Made(Protocol):
    """The class of a block."""

    def __call__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> Block: ...


ATTENTIONS: dict[str, Made] = {
    "mla": MLA,
    "mosa": MoSA,
    "moh": MoH,
    "linformer": Linformer,
    "nystromformer": Nystromformer,
    "performer": Performer,
    "reformer": Reformer,
    "long_short": LongShort,
}
MLPS: dict[str, Made] = {
    "token_choice": TokenChoice,
    "expert_choice": ExpertChoice,
    "deepseek_moe": DeepSeekMoE,
    "xmoe": XMoE,
    "skywork_moe": SkyworkMoE,
}

"""The compared architectures, one file each: blocks of the same model, chosen by `model.attention` and `model.mlp`.

Every block is made from the model's configuration, `Block(config, rngs=rngs)`, and is called as the blocks in `layers`
are: (x [B,L,D], tokens) -> (y [B,L,D], routing statistics or None). Those that can be causal decode as well.
"""

from typing import Protocol

from flax import nnx

from uoe_jax.baselines.deepseek_moe import DeepSeekMoE
from uoe_jax.baselines.expert_choice import ExpertChoice
from uoe_jax.baselines.linformer import Linformer
from uoe_jax.baselines.long_short import LongShort
from uoe_jax.baselines.mla import MLA
from uoe_jax.baselines.moh import MoH
from uoe_jax.baselines.mosa import MoSA
from uoe_jax.baselines.nystromformer import Nystromformer
from uoe_jax.baselines.performer import Performer
from uoe_jax.baselines.reformer import Reformer
from uoe_jax.baselines.skywork_moe import SkyworkMoE
from uoe_jax.baselines.token_choice import TokenChoice
from uoe_jax.baselines.xmoe import XMoE
from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers.common import Part


class Made(Protocol):
    """The class of a block."""

    def __call__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> Part: ...


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

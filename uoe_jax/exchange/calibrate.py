"""Fits the routers of an imported dense model: a patch chooses the experts that contribute most.

A router is linear in the patch's summary, so the norms of the experts' outputs are fitted to the
summaries by ridge regression. They are measured in the model with K = N, which computes what the
dense one does whatever its routers are.

Measured (2026-11-25, a Llama of 2 layers and D 96 after 500 steps on bytes of the standard library,
N = 4, validation loss on 128 rows; dense 1.535), random routers against fitted ones: with K = 2 in
the attention alone 2.747 and 1.827; in the MLP alone 2.164 and 1.883; in both with capacity factor
1.25 3.058 and 2.393. Norms less each expert's mean, which balance the load, are worse in the
attention (2.279).
"""

from typing import Any, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.layers.common import add_bias, valid_mean
from uoe_jax.layers.router import patches
from uoe_jax.layers.union import Union
from uoe_jax.models.decoder import Transformer
from uoe_jax.train.step import Params

RIDGE = 1e-3  # of the mean square of the summaries
SPREAD = 1.0  # standard deviation of the fitted logits, so that training does not lose the ranks
SPREAD_WEIGHED = 0.02  # where the gate makes weights of logits, which must stay near 1
UNWEIGHED = ("straight_through", "none")


# Sums over patches of one block, by layer, of X the summaries and T the norms: XᵀX [layers,D,D],
# XᵀT [layers,D,N], how many [layers].
Moments = tuple[jax.Array, jax.Array, jax.Array]


def moments(
    model: Transformer, tokens_BL: jax.Array, segments_BL: jax.Array, positions_BL: jax.Array
) -> dict[str, Moments]:
    """Those of a batch, by block."""
    x_BLD, tokens = model.embed_inputs(tokens_BL, segments_BL, positions_BL)
    graphdef, stacked = nnx.split(model.layers)

    def layer(x_BLD: jax.Array, weights: nnx.State) -> tuple[jax.Array, dict[str, Moments]]:
        block, found = nnx.merge(graphdef, weights), {}
        for place, norm in (("attention", block.attention_norm), ("mlp", block.mlp_norm)):
            part, h_BLD = getattr(block, place), norm(x_BLD)
            if isinstance(part, Union):
                y_NBLD = part.all_expert_outputs(h_BLD, tokens)
                found[place] = _sums(part, h_BLD, y_NBLD, segments_BL)
                x_BLD = x_BLD + add_bias(y_NBLD.sum(axis=0), part.bias_out)
            else:
                x_BLD = x_BLD + part(h_BLD, tokens)[0]
        return x_BLD, found

    return jax.lax.scan(layer, x_BLD, stacked)[1]


def _sums(block: Union, x_BLD: jax.Array, y_NBLD: jax.Array, segments_BL: jax.Array) -> Moments:
    p, d = block.routing.patch_size, x_BLD.shape[-1]
    valid_BMP, x_BMPD = patches(segments_BL, p) > 0, patches(x_BLD, p)
    first_BMD = x_BMPD[:, :, 0].astype(jnp.float32)
    summary_BMD = first_BMD if block.causal else valid_mean(x_BMPD, valid_BMP)
    norm_BLN = jnp.linalg.norm(y_NBLD.astype(jnp.float32), axis=-1).transpose(1, 2, 0)
    target_BMN = valid_mean(patches(norm_BLN, p), valid_BMP)
    counts_R = valid_BMP.any(axis=2).reshape(-1, 1).astype(jnp.float32)
    x_RD = summary_BMD.reshape(-1, d) * counts_R
    t_RN = target_BMN.reshape(counts_R.shape[0], -1) * counts_R
    return x_RD.T @ x_RD, x_RD.T @ t_RN, counts_R.sum()


def fitted(sums: Moments, gate: str) -> np.ndarray:
    """The kernels float32 [layers,D,N] of the routers of one block."""
    xx, xt, count = (np.asarray(a, np.float64) for a in sums)
    xt = xt - xt.mean(axis=-1, keepdims=True)  # what all experts share ranks none of them
    d = xx.shape[-1]
    level = np.trace(xx, axis1=1, axis2=2)[:, None, None] / d
    kernel = np.linalg.solve(xx + RIDGE * level * np.eye(d), xt)
    spread = np.sqrt(np.einsum("tdn,tde,ten->tn", kernel, xx, kernel).mean(-1) / count)
    wanted = SPREAD if gate in UNWEIGHED else SPREAD_WEIGHED
    return (kernel * (wanted / np.maximum(spread, 1e-30))[:, None, None]).astype(np.float32)


def calibrated(
    config: ModelConfig, model: Any, params: Params, batches: Iterable[Mapping[str, Any]]
) -> Params:
    """The parameters with routers of patches fitted to batches of text. model: of parameters."""
    step = jax.jit(lambda p, *batch: moments(model(p), *batch))
    total: Any = None
    for batch in ticking(batches):
        found = step(params, batch["tokens"], batch["segments"], batch["positions"])
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    layers = dict(params["layers"])
    for name, routing in config.unions().items():
        if routing.unit != "sequence":
            place = config.place_of(name)
            router = layers[place]["router"]
            kernel = jax.device_put(fitted(total[place], routing.gate), router["kernel"].sharding)
            layers[place] = layers[place] | {"router": router | {"kernel": kernel}}
    return {**params, "layers": layers}

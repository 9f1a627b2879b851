"""The router of one block: patch summaries to a decision, for whole rows and token by token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.config.routing import RoutingConfig
from uoe_jax.layers.common import Tokens, along_last, pad_sequence, valid_mean, valid_tokens
from uoe_jax.layers.weights import scaled_normal, weight_if, zeros
from uoe_jax.moe import routing as routing_lib
from uoe_jax.moe.dispatch import Decision, Selection
from uoe_jax.moe.routing import RoutingRule, RoutingStats


class RouterCache(NamedTuple):
    """What decoding keeps of the routing of each row and expert."""

    taken_BN: Array  # int32, slots taken in the current capacity window
    filled_BN: Array  # int32, slots taken in all; the current patch, where kept, is in the last one
    kept_BN: Array  # bool, whether the expert took the current patch
    weight_BN: Array  # float32, the combine weight of the current patch


class Router(nnx.Module):
    """Logits summary·W_g + b_g in float32 for patches and whole sequences, and what follows.

    The summary of a patch is the mean of its valid tokens, or its first token if causal; that of a
    sequence is the mean of its valid tokens. `routing.unit` says which of their routers exist.
    """

    def __init__(
        self, d_model: int, routing: RoutingConfig, causal: bool, rule: RoutingRule, rngs: nnx.Rngs
    ) -> None:
        self.routing, self.causal, self.rule = routing, causal, rule
        kernel = rngs, (d_model, routing.n_experts), ("embed", None), scaled_normal(d_model, 0.3)
        vector = rngs, (routing.n_experts,), (None,), zeros
        patch, sequence = routing.unit != "sequence", routing.unit != "patch"
        biased = routing.router_bias
        # Not trained: its gradient is stopped, and the train step moves it (`routing.rebalanced`).
        self.load_bias = weight_if(routing.bias_rate, *vector, exact=True)
        self.balance_weight: nnx.Param  # where a baseline sets it (baselines.mixtures.skywork_moe)
        self.kernel = weight_if(patch, *kernel, exact=True)
        self.bias = weight_if(patch and biased, *vector, exact=True)
        self.sequence_kernel = weight_if(sequence, *kernel, exact=True)
        self.sequence_bias = weight_if(sequence and biased, *vector, exact=True)

    def __call__(
        self, x_BMPD: Array, valid_BMP: Array, keys_B: Array | None = None
    ) -> tuple[Decision, RoutingStats]:
        """Routes whole rows; valid_BMP is False for padding tokens, keys_B is given in training."""
        logits, sequence_logits, first_BMD = None, None, x_BMPD[:, :, 0].astype(jnp.float32)
        if self.kernel is not None:  # kept for the backward pass, as few as they are
            summary_BMD = first_BMD if self.causal else valid_mean(x_BMPD, valid_BMP)
            logits = router_logits(summary_BMD, self.kernel, self.bias)
            logits = checkpoint_name(logits, "selection")
        if self.sequence_kernel is not None:
            b, m, p, d = x_BMPD.shape
            summary_BD = valid_mean(x_BMPD.reshape(b, m * p, d), valid_BMP.reshape(b, m * p))
            sequence_logits = router_logits(summary_BD, self.sequence_kernel, self.sequence_bias)
        chosen_by = self.routing, sequence_logits, self._load_bias(), keys_B, self.rule
        return routing_lib.decide(logits, valid_BMP.any(axis=2), *chosen_by)

    def _load_bias(self) -> Array | None:
        return None if self.load_bias is None else jax.lax.stop_gradient(self.load_bias[...])

    def start_cache(self, selection: Selection, tokens: Tokens) -> RouterCache:
        """The cache after a prefill of tokens, at least one in each row, padding behind them."""
        kept_BMN = selection.kept_BMN
        length_B = valid_tokens(tokens.segments_BL, tokens.positions_BL).sum(axis=1)
        last_B = (length_B - 1) // self.routing.patch_size
        window_M = jnp.arange(kept_BMN.shape[1]) // self.routing.capacity_window
        here_BM = window_M[None] == (last_B // self.routing.capacity_window)[:, None]
        slot_B1N = jnp.take_along_axis(selection.slot_of_BMN, last_B[:, None, None], axis=1)
        kept_BN = slot_B1N[:, 0] < selection.slots_NRC.shape[-1]
        slot_NB1 = jnp.where(kept_BN, slot_B1N[:, 0], 0).T[..., None]
        weight_BN = jnp.take_along_axis(selection.weights_NRC, slot_NB1, axis=-1)[..., 0].T
        return RouterCache(
            taken_BN=(kept_BMN & here_BM[..., None]).sum(axis=1, dtype=jnp.int32),
            filled_BN=kept_BMN.sum(axis=1, dtype=jnp.int32),
            kept_BN=kept_BN,
            weight_BN=jnp.where(kept_BN, weight_BN, 0),
        )

    def decode_step(self, x_BD: Array, cache: RouterCache, t_B: Array) -> RouterCache:
        """Routes token `t_B` of each row: the first token of a patch chooses for all of it."""
        assert self.kernel is not None  # a causal model routes patches
        r = self.routing
        first_B1 = (t_B % r.patch_size == 0)[:, None]
        opens_window_B1 = first_B1 & (t_B // r.patch_size % r.capacity_window == 0)[:, None]
        logits_BN = router_logits(x_BD.astype(jnp.float32), self.kernel, self.bias)
        scores_BN = self.rule.scores(logits_BN)
        ranked_B1N = routing_lib.biased(scores_BN, self._load_bias())[:, None]
        chosen_BN = self.rule.choose(ranked_B1N, jnp.ones_like(first_B1), r.k)[:, 0]
        weight_BN = self.rule.weigh(r, logits_BN, scores_BN, chosen_BN)
        taken_BN = jnp.where(opens_window_B1, 0, cache.taken_BN)
        accepted_BN = chosen_BN & (taken_BN < r.window_capacity()) & first_B1
        kept_BN = jnp.where(first_B1, accepted_BN, cache.kept_BN)
        return RouterCache(
            taken_BN=taken_BN + accepted_BN.astype(jnp.int32),
            filled_BN=cache.filled_BN + accepted_BN.astype(jnp.int32),
            kept_BN=kept_BN,
            weight_BN=jnp.where(kept_BN, jnp.where(first_B1, weight_BN, cache.weight_BN), 0),
        )


def router_logits(summary: Array, kernel: nnx.Param, bias: nnx.Param | None = None) -> Array:
    """summary·kernel + bias, [...,N] of float32 [...,D]."""
    # Not BF16_BF16_F32_X6, faster on a GPU: for a single row it was wrong by 0.03 (jax 0.11.2).
    logits = jnp.matmul(summary, kernel[...], precision=jax.lax.Precision.HIGHEST)
    return logits if bias is None else logits + along_last(bias[...], logits)


def patches(x_BLD: Array, p: int) -> Array:
    """[B,L,…] as patches [B,M,P,…], the last one padded with zeros."""
    x_BLD = pad_sequence(x_BLD, -x_BLD.shape[1] % p)
    return x_BLD.reshape(x_BLD.shape[0], -1, p, *x_BLD.shape[2:])

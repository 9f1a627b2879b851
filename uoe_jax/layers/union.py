"""What SMHA and UoME share: route the patches, let every expert work on its slots, add the results back at their places."""

from __future__ import annotations

import itertools
from typing import Any, Callable, NamedTuple, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.config.fields import check_declared
from uoe_jax.config.routing import RoutingConfig
from uoe_jax.distributed.manual import WHOLE, Region, run
from uoe_jax.layers.common import Tokens, add_bias, fold, tokens_like
from uoe_jax.layers.router import Router, patches
from uoe_jax.moe.dispatch import backend_for, combine_slots, gather_own, gather_rows, gather_slots
from uoe_jax.moe.routing import UNION, RoutingStats, Rule, Selection


class Slots(NamedTuple):
    """What the experts must know of the tokens in their slots (S = C·P; B here the rows of an expert's buffer).

    Attributes:
      weight_NBS: float32 combine weight, 0 for padding tokens and empty slots.
      filled_NBS: bool, False in empty slots.
      segments_NBS: int32 documents, or None where the row is one document without padding.
      rotary: (cos, sin) float32 [N,B,S,Dh/2] at the tokens' true positions, or None.
      keys_NB: in training, a random key for each row of every expert; None: evaluation.
    """

    weight_NBS: jax.Array
    filled_NBS: jax.Array
    segments_NBS: jax.Array | None
    rotary: tuple[jax.Array, jax.Array] | None
    keys_NB: jax.Array | None


def per_expert(x_NBSX: jax.Array, w_NXY: jax.Array) -> jax.Array:
    """Every expert's rows times its matrix, [N,B,S,Y]; with a leading 1 in place of N, the same rows for every expert.

    One batched product over [N,B·S,X], the form that runs fastest. Rows that all experts share are not copied for each of
    them; but of single tokens, as in decoding, that costs less than another order of the weights.
    """
    rows, b, s, x = x_NBSX.shape
    n = w_NXY.shape[0]
    if rows == 1 and s == 1:
        x_NBSX = jnp.broadcast_to(x_NBSX, (n, b, s, x))
    elif rows == 1:
        return jnp.einsum("tx,nxy->nty", x_NBSX.reshape(b * s, x), w_NXY).reshape(n, b, s, -1)
    return jnp.einsum("ntx,nxy->nty", x_NBSX.reshape(n, b * s, x), w_NXY).reshape(n, b, s, -1)


def per_expert_each(x_NBSX: jax.Array, ws_NXY: Sequence[jax.Array]) -> list[jax.Array]:
    """`per_expert` for several matrices of the same rows.

    Side by side they are one product, so that rows wider than what comes out are read once; single tokens are read again
    sooner than matrices are copied.
    """
    if x_NBSX.shape[2] == 1:
        return [per_expert(x_NBSX, w) for w in ws_NXY]
    y = per_expert(x_NBSX, jnp.concatenate(ws_NXY, axis=-1))
    return jnp.split(y, list(itertools.accumulate(w.shape[-1] for w in ws_NXY[:-1])), axis=-1)


class Union(nnx.Module):
    """A routed block.

    A subclass sets `bias_out` (the one output bias, or None) and says what an expert computes, in two parts: `_enter`
    projects tokens into every expert, `_experts` does the rest on the slots. `routing.order` says whether tokens are
    gathered before the projection (`gather`) or after it (`project`): the same values, other costs.
    """

    def __init__(
        self,
        d_model: int,
        routing: RoutingConfig,
        *,
        causal: bool,
        dtype: Any,
        rule: Rule = UNION,
        rngs: nnx.Rngs,
    ) -> None:
        if (
            rule is UNION
        ):  # that of a config file is checked already, and the compared mixtures make their own
            check_declared("routing", routing)
        if routing.k > routing.n_experts:
            raise ValueError(
                f"routing.k={routing.k}: a patch cannot choose more than n_experts={routing.n_experts} experts"
            )
        if causal and routing.unit != "patch":
            raise ValueError(
                f"unit={routing.unit!r} in a causal block depends on later patches; use 'patch'"
            )
        if causal and routing.priority != "position":
            raise ValueError(
                f"priority={routing.priority!r} in a causal block depends on later patches; use 'position'"
            )
        self.routing, self.causal, self.dtype = routing, causal, dtype
        self.bias_out: nnx.Param | None
        self.router = Router(d_model, routing, causal=causal, rule=rule, rngs=rngs)

    def _enter(self, x_NBSD: jax.Array) -> tuple[jax.Array, ...]:
        """Every expert's projections of its tokens, each [N,B,S,…]; a leading 1 in place of N means the same tokens."""
        raise NotImplementedError

    def _experts(self, entered: tuple[jax.Array, ...], slots: Slots) -> tuple[jax.Array, Any]:
        """From projections at the slots to ([N,B,S,D] weighted outputs, what a prefill keeps)."""
        raise NotImplementedError

    def _shared_experts(self, x: jax.Array) -> jax.Array | None:
        """What is added for every token [...,D] whatever it chose (the shared experts of some mixtures); None: nothing."""
        return None

    def __call__(
        self, x_BLD: jax.Array, tokens: Tokens | None = None
    ) -> tuple[jax.Array, RoutingStats]:
        """Returns (y_BLD, statistics). The last patch is filled up where L is no multiple of P; padding tokens give zeros.

        On a mesh of several devices (`jax.set_mesh`) this is one fully manual region: every device routes the patches of
        its own rows, works on the experts it holds, and the results are added by one reduction over `expert`.

        Raises:
          ValueError: in training, `sequence_group` does not divide the rows of a device.
        """
        graphdef, weights = nnx.split(self)

        def share(
            weights: nnx.State, x_BLD: jax.Array, tokens: Tokens, region: Region
        ) -> tuple[jax.Array, RoutingStats]:
            return nnx.merge(graphdef, weights)._forward(x_BLD, tokens, region)[:2]

        return run(
            share,
            weights,
            x_BLD,
            tokens_like(x_BLD) if tokens is None else tokens,
            dtype=self.dtype,
        )

    def _forward(
        self, x_BLD: jax.Array, tokens: Tokens, region: Region = WHOLE
    ) -> tuple[jax.Array, RoutingStats, Selection, Any]:
        """The block on all experts, or on this part's rows and experts, whose weights `self` then has."""
        p, length = self.routing.patch_size, tokens.positions_BL.shape[1]
        tokens = tokens.padded(length + -length % p)
        # Every part decides the same for all experts; from there on each works for its own.
        shared_BMPD, x_BMPD = (
            patches(x, p) for x in region.gather_inputs(x_BLD.astype(self.dtype))
        )
        b, m, _, d = x_BMPD.shape
        segments_BMP = None if tokens.segments_BL is None else patches(tokens.segments_BL, p)
        valid_BMP = jnp.ones((b, m, p), bool) if segments_BMP is None else segments_BMP > 0
        with jax.named_scope("route"):
            decision, stats = self.router(shared_BMPD, valid_BMP, tokens.folded(0).keys_B)
            if region.num_shards:
                n = self.routing.n_experts // region.num_shards
                decision = decision._replace(
                    weights_BMN=region.as_varying(decision.weights_BMN)
                ).of_experts(n * region.shard_index, n)
            selection = decision.pack()
        n, r, c = selection.slots_NRC.shape

        def at_slots(values_BLX: jax.Array) -> jax.Array:
            """Values of tokens, [B,L,…], at every expert's slots: [N,B,S,…]; nothing is differentiated."""
            rows = gather_rows(values_BLX.reshape(b, m, -1), selection.patch_NRC)
            return rows.reshape(n, r, c * p, *values_BLX.shape[2:])

        keys_B = tokens.folded(1).keys_B
        slots = Slots(
            weight_NBS=jnp.repeat(selection.weights_NRC, p, axis=-1)
            * at_slots(valid_BMP.reshape(b, m * p).astype(jnp.float32)),
            filled_NBS=jnp.repeat(selection.valid_NRC, p, axis=-1),
            segments_NBS=None if tokens.segments_BL is None else at_slots(tokens.segments_BL),
            rotary=_both(at_slots, tokens.rotary),
            keys_NB=None
            if keys_B is None
            else _expert_keys(keys_B, selection.sequence_NR, n * region.shard_index),
        )
        how = backend_for(
            self.routing.dispatch, x_BMPD.dtype, p, bool(self.routing.sequence_capacity_factor)
        )
        if self.routing.order == "gather":
            with jax.named_scope("dispatch"):
                x_NBCF = gather_slots(x_BMPD.reshape(b, m, p * d), selection, how)
            entered = self._enter(x_NBCF.reshape(n, r, c * p, d))
        else:
            projected = self._enter(x_BMPD.reshape(1, b, m * p, d))
            with jax.named_scope("dispatch"):
                own = [gather_own(f.reshape(n, b, m, -1), selection, how) for f in projected]
            entered = tuple(a.reshape(n, r, c * p, *f.shape[3:]) for a, f in zip(own, projected))
        with jax.named_scope("experts"):
            y_NBSD, kept = self._experts(entered, slots)
        with jax.named_scope("combine"):
            y_BMF = combine_slots(y_NBSD.reshape(n, r, c, p * d), selection, how)
        with jax.named_scope("union"):
            y_BLD = _sum(
                y_BMF.reshape(b, m * p, d), self._shared_experts(x_BMPD.reshape(b, m * p, d))
            )
            y_BLD = region.reduce_outputs(y_BLD[:, :length])
        bias_D = region.weight_for_local_tokens(self.bias_out)
        if bias_D is not None:
            valid_BL1 = region.local_tokens(valid_BMP.reshape(b, m * p, 1)[:, :length])
            y_BLD = add_bias(y_BLD, jnp.where(valid_BL1, bias_D[None, None], 0))
        return y_BLD, stats, selection, kept

    def routed(self, x_BLD: jax.Array, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        """(y_BLD, what each expert's output of each patch was weighed with, float32 [B,M,N], -1 where it did not take it).

        To look at: all experts and rows in one piece, whatever the mesh.
        """
        y_BLD, _, selection, _ = self._forward(x_BLD, tokens)
        place_BMN = selection.place_BMN
        weights_NX = selection.weights_NRC.reshape(place_BMN.shape[2], -1)
        weights_XN = jnp.take_along_axis(
            weights_NX.T,
            place_BMN.reshape(-1, place_BMN.shape[2]),
            axis=0,
            mode="fill",
            fill_value=-1,
        )
        return y_BLD, weights_XN.reshape(place_BMN.shape)

    def all_expert_outputs(self, x_BLD: jax.Array, tokens: Tokens) -> jax.Array:
        """What each expert gives for every token at weight 1, [N,B,L,D]: the terms of the union with K = N and nothing dropped."""
        n, (b, l) = self.routing.n_experts, x_BLD.shape[:2]

        def for_each(a: jax.Array) -> jax.Array:
            return jnp.broadcast_to(a[None], (n, *a.shape))

        slots = Slots(
            weight_NBS=jnp.ones((n, b, l), jnp.float32),
            filled_NBS=jnp.ones((n, b, l), bool),
            segments_NBS=None if tokens.segments_BL is None else for_each(tokens.segments_BL),
            rotary=_both(for_each, tokens.rotary),
            keys_NB=None,
        )
        return self._experts(self._enter(x_BLD.astype(self.dtype)[None]), slots)[0]

    def _union(self, y_NB1D: jax.Array, x_BD: jax.Array) -> jax.Array:
        """Sums the experts' outputs for one token of each sequence, [B,D]."""
        y_BD = _sum(y_NB1D.sum(axis=0)[:, 0], self._shared_experts(x_BD))
        return add_bias(y_BD, self.bias_out)


def _both(
    f: Callable[[jax.Array], jax.Array], tables: tuple[jax.Array, jax.Array] | None
) -> tuple[jax.Array, jax.Array] | None:
    return None if tables is None else (f(tables[0]), f(tables[1]))


def _sum(y: jax.Array, more: jax.Array | None) -> jax.Array:
    return y if more is None else y + more


def _expert_keys(keys_B: jax.Array, sequence_NR: jax.Array, first: int | jax.Array) -> jax.Array:
    """A key for each row of the experts from `first` on, [N,R], that depends on its sequence and the expert only."""
    experts_N = first + jnp.arange(sequence_NR.shape[0])
    return jax.vmap(lambda i, rows_R: fold(keys_B[rows_R], i))(experts_N, sequence_NR)

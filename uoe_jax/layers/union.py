"""What SMHA and UoME share: a routed block, whose experts work on the patches in their slots."""

import itertools
from typing import Any, NamedTuple, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from uoe_jax.config.fields import check_declared
from uoe_jax.config.routing import RoutingConfig
from uoe_jax.distributed.manual import WHOLE, Region
from uoe_jax.layers.common import Block, Tokens, add_bias, fold, valid_tokens
from uoe_jax.layers.router import Router, RouterCache, patches
from uoe_jax.moe.dispatch import backend_for, combine_slots, gather_own, gather_rows, gather_slots
from uoe_jax.moe.routing import UNION, RoutingRule, RoutingStats, Selection


class Slots(NamedTuple):
    """What the experts get beside the activations: the tokens in their slots, by expert and row.

    Attributes:
      weight_NRS: float32 combine weight, 0 for padding tokens and empty slots.
      filled_NRS: bool, False in empty slots.
      segments_NRS: int32 documents; None: one document per row, no padding.
      rotary: (cos, sin) float32 [N,R,S,Dh/2] at the tokens' true positions, or None.
      keys_NR: in training, a random key per expert and row; None: evaluation.
    """

    weight_NRS: Array
    filled_NRS: Array
    segments_NRS: Array | None
    rotary: tuple[Array, Array] | None
    keys_NR: Array | None


def per_expert(x_NRSX: Array, w_NXY: Array) -> Array:
    """Every expert's rows times its matrix, [N,R,S,Y]; x [1,R,S,X]: the same rows for all experts.

    One batched matmul over [N,R·S,X], the fastest form. Rows that all experts share are not copied,
    except single tokens (decoding), where a copy costs less than another layout of the weights.
    """
    rows, r, s, x = x_NRSX.shape
    n = w_NXY.shape[0]
    if rows == 1 and s == 1:
        x_NRSX = jnp.broadcast_to(x_NRSX, (n, r, s, x))
    elif rows == 1:
        return jnp.einsum("tx,nxy->nty", x_NRSX.reshape(r * s, x), w_NXY).reshape(n, r, s, -1)
    return jnp.einsum("ntx,nxy->nty", x_NRSX.reshape(n, r * s, x), w_NXY).reshape(n, r, s, -1)


def per_expert_each(x_NRSX: Array, ws_NXY: Sequence[Array]) -> list[Array]:
    """`per_expert` for several matrices of the same rows.

    Concatenated they are one matmul, which reads the rows once. For single tokens, reading the rows
    again is cheaper than copying the matrices.
    """
    if x_NRSX.shape[2] == 1:
        return [per_expert(x_NRSX, w) for w in ws_NXY]
    y = per_expert(x_NRSX, jnp.concatenate(ws_NXY, axis=-1))
    return jnp.split(y, list(itertools.accumulate(w.shape[-1] for w in ws_NXY[:-1])), axis=-1)


class Union(Block):
    """A routed block. What happens to a token on a shard:

    1. The router scores its patch for all experts and decides which take it, alike on every shard.
    2. Each of the shard's experts lists its patches by slot (`Selection`).
    3. Dispatch: the tokens are gathered to the slots, then projected into the experts; or, with
       routing.order='project', projected first. The values are the same, the costs are not.
    4. Each expert works on its slots. Its values are multiplied by their combine weights.
    5. Combine: the outputs are added at the tokens' places, and over `expert` by one reduction.
    6. The output bias is added once. Padding tokens get zeros.

    A subclass sets `bias_out` and writes `_project` (tokens to every expert's first projections)
    and `_experts` (from these to weighted outputs); to decode, `_start_cache` and `decode_step`.
    """

    def __init__(
        self, d: int, r: RoutingConfig, causal: bool, dtype: Any, rule: RoutingRule, rngs: nnx.Rngs
    ) -> None:
        if rule is UNION:  # baselines make their routing from a section that is checked already
            check_declared("routing", r)
        n, k, unit, priority = r.n_experts, r.k, r.unit, r.priority
        if k > n:
            raise ValueError(f"routing.k={k}: a patch chooses at most n_experts={n} experts")
        future = "in a causal block depends on later patches; use"
        if causal and unit != "patch":
            raise ValueError(f"unit={unit!r} {future} 'patch'")
        if causal and priority != "position":
            raise ValueError(f"priority={priority!r} {future} 'position'")
        self.routing, self.causal, self.dtype = r, causal, dtype
        self.bias_out: nnx.Param | None
        self.router = Router(d, r, causal, rule, rngs)

    def __call__(self, x_BLD: Array, tokens: Tokens | None = None) -> tuple[Array, RoutingStats]:
        """(y_BLD, routing statistics). The last patch is padded where P does not divide L.

        Raises:
          ValueError: in training, `sequence_group` does not divide the rows of a device.
        """
        y_BLD, stats = super().__call__(x_BLD, tokens)
        assert stats is not None  # a union routes
        return y_BLD, stats

    def _project(self, x_NRSD: Array) -> tuple[Array, ...]:
        """Every expert's projections of its tokens, [N,R,S,…]; x [1,R,S,D]: the same tokens."""
        raise NotImplementedError

    def _experts(self, projected: tuple[Array, ...], slots: Slots) -> tuple[Array, Any]:
        """From projections at the slots to ([N,R,S,D] weighted outputs, what a prefill keeps)."""
        raise NotImplementedError

    def _shared_experts(self, x: Array) -> Array | None:
        """The output [...,D] of experts that take every token; None where there are none."""
        return None

    def _forward(
        self, x_BLD: Array, tokens: Tokens, region: Region = WHOLE
    ) -> tuple[Array, RoutingStats, tuple[Selection, Any]]:
        p, length = self.routing.patch_size, tokens.positions_BL.shape[1]
        tokens = tokens.padded(length + -length % p)
        shared_BMPD, x_BMPD = (
            patches(x, p) for x in region.gather_inputs(x_BLD.astype(self.dtype))
        )
        b, m, _, d = x_BMPD.shape
        valid_BL = valid_tokens(tokens.segments_BL, tokens.positions_BL)
        with jax.named_scope("route"):
            selection, stats = self._select(shared_BMPD, valid_BL.reshape(b, m, p), tokens, region)
        n, r, c = selection.slots_NRC.shape
        slots = self._slots(selection, tokens, valid_BL, n * region.shard_index)
        bounded = bool(self.routing.sequence_capacity_factor)
        how = backend_for(self.routing.dispatch, x_BMPD.dtype, p, bounded)
        if self.routing.order == "gather":
            with jax.named_scope("dispatch"):
                x_NRCX = gather_slots(x_BMPD.reshape(b, m, p * d), selection, how)
            projected = self._project(x_NRCX.reshape(n, r, c * p, d))
        else:
            whole = self._project(x_BMPD.reshape(1, b, m * p, d))
            with jax.named_scope("dispatch"):
                own = [gather_own(a.reshape(n, b, m, -1), selection, how) for a in whole]
            projected = tuple(a.reshape(n, r, c * p, *w.shape[3:]) for a, w in zip(own, whole))
        with jax.named_scope("experts"):
            y_NRSD, kept = self._experts(projected, slots)
        with jax.named_scope("combine"):
            y_BMX = combine_slots(y_NRSD.reshape(n, r, c, p * d), selection, how)
        with jax.named_scope("union"):
            shared = self._shared_experts(x_BMPD.reshape(b, m * p, d))
            y_BLD = _add(y_BMX.reshape(b, m * p, d), shared)
            y_BLD = region.reduce_outputs(y_BLD[:, :length])
        bias_D = region.weight_for_local_tokens(self.bias_out)
        if bias_D is not None:
            valid_BL1 = region.local_tokens(valid_BL[:, :length])[..., None]
            y_BLD = add_bias(y_BLD, jnp.where(valid_BL1, bias_D[None, None], 0))
        return y_BLD, stats, (selection, kept)

    def _select(
        self, x_BMPD: Array, valid_BMP: Array, tokens: Tokens, region: Region
    ) -> tuple[Selection, RoutingStats]:
        """The selection of the shard's own experts, and the statistics of all."""
        decision, stats = self.router(x_BMPD, valid_BMP, tokens.folded(0).keys_B)
        if region.num_shards:
            n = self.routing.n_experts // region.num_shards
            weights_BMN = region.as_varying(decision.weights_BMN)
            decision = decision._replace(weights_BMN=weights_BMN)
            decision = decision.of_experts(n * region.shard_index, n)
        return decision.pack(), stats

    def _slots(
        self, selection: Selection, tokens: Tokens, valid_BL: Array, first: int | Array
    ) -> Slots:
        """What the experts from `first` on know of the tokens in their slots."""
        p, (n, r, c) = self.routing.patch_size, selection.slots_NRC.shape
        b, m, _ = selection.slot_of_BMN.shape

        def at_slots(values_BLX: Array) -> Array:
            """[B,L,…] to [N,R,S,…]; nothing is differentiated."""
            rows = gather_rows(values_BLX.reshape(b, m, -1), selection.patch_NRC)
            return rows.reshape(n, r, c * p, *values_BLX.shape[2:])

        keys_NR, keys_B = None, tokens.folded(1).keys_B
        if keys_B is not None:  # a key depends on the row of the batch and on the expert only
            experts_N, own_key = first + jnp.arange(n), lambda i, rows_R: fold(keys_B[rows_R], i)
            keys_NR = jax.vmap(own_key)(experts_N, selection.sequence_NR)
        weight_NRS = jnp.repeat(selection.weights_NRC, p, axis=-1)
        return Slots(
            weight_NRS=weight_NRS * at_slots(valid_BL.astype(jnp.float32)),
            filled_NRS=jnp.repeat(selection.valid_NRC, p, axis=-1),
            segments_NRS=jax.tree.map(at_slots, tokens.segments_BL),
            rotary=jax.tree.map(at_slots, tokens.rotary),
            keys_NR=keys_NR,
        )

    def routed(self, x_BLD: Array, tokens: Tokens) -> tuple[Array, Array]:
        """(y_BLD, float32 [B,M,N] combine weight of a patch in each expert, -1 if not taken).

        For inspection: all experts and rows on one device, whatever the mesh.
        """
        y_BLD, _, (selection, _) = self._forward(x_BLD, tokens)
        place_BMN = selection.place_BMN
        n = place_BMN.shape[2]
        weights_XN = selection.weights_NRC.reshape(n, -1).T
        index_XN = place_BMN.reshape(-1, n)
        taken_XN = jnp.take_along_axis(weights_XN, index_XN, axis=0, mode="fill", fill_value=-1)
        return y_BLD, taken_XN.reshape(place_BMN.shape)

    def all_expert_outputs(self, x_BLD: Array, tokens: Tokens) -> Array:
        """[N,B,L,D], every expert's output for every token at weight 1.

        Their sum is the union with K = N and nothing dropped.
        """
        n, (b, l) = self.routing.n_experts, x_BLD.shape[:2]

        def for_each(a: Array) -> Array:
            return jnp.broadcast_to(a[None], (n, *a.shape))

        slots = Slots(
            weight_NRS=jnp.ones((n, b, l), jnp.float32),
            filled_NRS=jnp.ones((n, b, l), bool),
            segments_NRS=jax.tree.map(for_each, tokens.segments_BL),
            rotary=jax.tree.map(for_each, tokens.rotary),
            keys_NR=None,
        )
        return self._experts(self._project(x_BLD.astype(self.dtype)[None]), slots)[0]

    def _router_cache(self, selection: Selection, tokens: Tokens) -> RouterCache:
        valid_BL = valid_tokens(tokens.segments_BL, tokens.positions_BL)
        return self.router.start_cache(selection, valid_BL.sum(axis=1))

    def _sum_experts(self, y_NR1D: Array, x_BD: Array) -> Array:
        """The block's output [B,D] for one token of each row, from its experts' outputs."""
        y_BD = _add(y_NR1D.sum(axis=0)[:, 0], self._shared_experts(x_BD))
        return add_bias(y_BD, self.bias_out)


def _add(y: Array, more: Array | None) -> Array:
    return y if more is None else y + more

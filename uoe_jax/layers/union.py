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
from uoe_jax.layers.common import Block, Outputs, Tokens, add_bias, fold, valid_tokens
from uoe_jax.layers.mlp import MLP
from uoe_jax.layers.router import Router, patches
from uoe_jax.moe import dispatch
from uoe_jax.moe.dispatch import Selection, combine_slots, gather_own, gather_slots
from uoe_jax.moe.routing import UNION, RoutingRule, RoutingStats


class Slots(NamedTuple):
    """What the experts get beside the activations: the tokens in their slots, by expert and row."""

    weight_NRS: Array  # float32 combine weight, 0 for padding tokens and empty slots
    filled_NRS: Array  # bool, False in empty slots
    segments_NRS: Array | None  # int32 documents; None: one per row, no padding
    rotary: tuple[Array, Array] | None  # (cos, sin) float32 [N,R,S,Dh/2] at the true positions
    keys_NR: Array | None  # in training, a random key per expert and row


def per_expert(x_NRSX: Array, w_NXY: Array) -> Array:
    """Every expert's rows times its matrix, [N,R,S,Y]; x [1,R,S,X]: the same rows for all."""
    # One batched matmul is the fastest form. Rows that all experts share are not copied, except
    # single tokens (decoding), where a copy costs less than another layout of the weights.
    (rows, r, s, x), n = x_NRSX.shape, w_NXY.shape[0]
    if rows == 1 and s > 1:
        return jnp.einsum("tx,nxy->nty", x_NRSX.reshape(r * s, x), w_NXY).reshape(n, r, s, -1)
    x_NTX = jnp.broadcast_to(x_NRSX, (n, r, s, x)).reshape(n, r * s, x)
    return jnp.einsum("ntx,nxy->nty", x_NTX, w_NXY).reshape(n, r, s, -1)


def per_expert_each(x_NRSX: Array, ws_NXY: Sequence[Array]) -> list[Array]:
    """`per_expert` for several matrices of the same rows, concatenated to read these once."""
    # For single tokens, reading the rows again is cheaper than copying the matrices.
    if x_NRSX.shape[2] == 1:
        return [per_expert(x_NRSX, w) for w in ws_NXY]
    y = per_expert(x_NRSX, jnp.concatenate(ws_NXY, axis=-1))
    return jnp.split(y, list(itertools.accumulate(w.shape[-1] for w in ws_NXY[:-1])), axis=-1)


def per_row(b_NX: nnx.Param | None) -> Array | None:
    """The experts' biases [N,…] as [N,1,1,…], to be added to all their rows."""
    return None if b_NX is None else b_NX[...][:, None, None]


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

    Raises:
      ValueError: K > N; causal with a unit or priority that depends on later tokens; in training,
        `sequence_group` does not divide the rows of a device.
      ConfigError: a value of the routing that its declaration does not allow.
    """

    bias_out: nnx.Param | None
    shared: MLP | None = None  # experts that take every token

    def __init__(
        self, d: int, r: RoutingConfig, causal: bool, dtype: Any, rule: RoutingRule, rngs: nnx.Rngs
    ) -> None:
        if rule is UNION:  # baselines make their routing from a section that is checked already
            check_declared("routing", r)
        if r.k > r.n_experts:
            most = f"a patch chooses at most n_experts={r.n_experts} experts"
            raise ValueError(f"routing.k={r.k}: {most}")
        for key, wanted in (("unit", "patch"), ("priority", "position")):
            if causal and (value := getattr(r, key)) != wanted:
                future = f"in a causal block depends on later patches; use {wanted!r}"
                raise ValueError(f"{key}={value!r} {future}")
        self.routing, self.causal, self.dtype = r, causal, dtype
        self.router = Router(d, r, causal, rule, rngs)

    def __call__(self, x_BLD: Array, tokens: Tokens | None = None) -> tuple[Array, RoutingStats]:
        """(y_BLD, routing statistics). The last patch is padded where P does not divide L."""
        return super().__call__(x_BLD, tokens)

    def _project(self, x_NRSD: Array) -> tuple[Array, ...]:
        """Every expert's projections of its tokens, [N,R,S,…]; x [1,R,S,D]: the same tokens."""
        raise NotImplementedError

    def _experts(self, projected: tuple[Array, ...], slots: Slots) -> tuple[Array, Any]:
        """From projections at the slots to ([N,R,S,D] weighted outputs, what a prefill keeps)."""
        raise NotImplementedError

    def _forward(self, x_BLD: Array, tokens: Tokens, region: Region = WHOLE) -> Outputs:
        p, length = self.routing.patch_size, tokens.positions_BL.shape[1]
        tokens = tokens.padded(length + -length % p)
        valid_BL = valid_tokens(tokens.segments_BL, tokens.positions_BL)
        inputs = region.gather_inputs(x_BLD.astype(self.dtype))
        shared_BMPD, x_BMPD = (patches(x, p) for x in inputs)
        b, m, _, d = x_BMPD.shape
        n = self.routing.n_experts // (region.num_shards or 1)
        first = n * region.shard_index
        with jax.named_scope("route"):  # alike on every shard, which then takes its own experts
            valid_BMP, keys_B = valid_BL.reshape(b, m, p), tokens.folded(0).keys_B
            decision, stats = self.router(shared_BMPD, valid_BMP, keys_B)
            if region.num_shards:
                weights_BMN = region.as_varying(decision.weights_BMN)
                decision = decision._replace(weights_BMN=weights_BMN).of_experts(first, n)
            selection = decision.pack()
        _, r, c = selection.slots_NRC.shape
        slots = self._slots(selection, tokens, valid_BL, first)
        bounded = bool(self.routing.sequence_capacity_factor)
        how = dispatch.backend_for(self.routing.dispatch, x_BMPD.dtype, p, bounded)
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
            y_BLD, x_BLD = (a.reshape(b, m * p, d) for a in (y_BMX, x_BMPD))
            y_BLD = region.reduce_outputs(self._add_shared(y_BLD, x_BLD)[:, :length])
        bias_D = region.weight_for_local_tokens(self.bias_out)
        if bias_D is not None:
            valid_BL1 = region.local_tokens(valid_BL[:, :length])[..., None]
            y_BLD = add_bias(y_BLD, jnp.where(valid_BL1, bias_D[None, None], 0))
        return y_BLD, stats, (selection, kept)

    def _add_shared(self, y: Array, x: Array) -> Array:
        """The experts' sum y [...,D] and the shared experts' output for the tokens x [...,D]."""
        return y if self.shared is None else y + self.shared.partial(x)

    def _slots(
        self, selection: Selection, tokens: Tokens, valid_BL: Array, first: int | Array
    ) -> Slots:
        """What the experts from `first` on know of the tokens in their slots."""
        p, (n, r, c) = self.routing.patch_size, selection.slots_NRC.shape
        b, m, _ = selection.slot_of_BMN.shape

        def at_slots(values_BLX: Array) -> Array:
            """[B,L,…] to [N,R,S,…]; nothing is differentiated."""
            rows = dispatch.gather_rows(values_BLX.reshape(b, m, -1), selection.patch_NRC)
            return rows.reshape(n, r, c * p, *values_BLX.shape[2:])

        keys_NR, keys_B = None, tokens.folded(1).keys_B
        if keys_B is not None:  # a key depends on the row of the batch and on the expert only
            experts_N, own_key = first + jnp.arange(n), lambda i, rows_R: fold(keys_B[rows_R], i)
            keys_NR = jax.vmap(own_key)(experts_N, selection.sequence_NR)
        weight_NRS = jnp.repeat(selection.weights_NRC, p, axis=-1)
        weight_NRS = weight_NRS * at_slots(valid_BL.astype(jnp.float32))
        filled_NRS = jnp.repeat(selection.valid_NRC, p, axis=-1)
        segments_NRS, rotary = jax.tree.map(at_slots, (tokens.segments_BL, tokens.rotary))
        return Slots(weight_NRS, filled_NRS, segments_NRS, rotary, keys_NR)

    def routed(self, x_BLD: Array, tokens: Tokens) -> tuple[Array, Array]:
        """(y_BLD, float32 [B,M,N] combine weight of a patch in each expert, -1 if not taken)."""
        # For inspection: all experts and rows on one device, whatever the mesh.
        y_BLD, _, (selection, _) = self._forward(x_BLD, tokens)
        place_BMN, n = selection.place_BMN, self.routing.n_experts
        of_slots = selection.weights_NRC.reshape(n, -1).T, place_BMN.reshape(-1, n)
        taken_XN = jnp.take_along_axis(*of_slots, axis=0, mode="fill", fill_value=-1)
        return y_BLD, taken_XN.reshape(place_BMN.shape)

    def all_expert_outputs(self, x_BLD: Array, tokens: Tokens) -> Array:
        """[N,B,L,D], every expert's output for every token at weight 1."""
        # Their sum is the union with K = N and nothing dropped.
        n, filled_BL = self.routing.n_experts, jnp.ones(x_BLD.shape[:2], bool)
        weight_BL = filled_BL.astype(jnp.float32)
        one = Slots(weight_BL, filled_BL, tokens.segments_BL, tokens.rotary, keys_NR=None)
        slots = jax.tree.map(lambda a: jnp.broadcast_to(a[None], (n, *a.shape)), one)
        return self._experts(self._project(x_BLD.astype(self.dtype)[None]), slots)[0]

    def _sum_experts(self, y_NR1D: Array, x_BD: Array) -> Array:
        """The block's output [B,D] for one token of each row, from its experts' outputs."""
        return add_bias(self._add_shared(y_NR1D.sum(axis=0)[:, 0], x_BD), self.bias_out)

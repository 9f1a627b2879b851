"""The stack of pre-norm layers, and the decoder language model on it, with cached decoding.

Letters in `layers.common`. The stack is one `Layer` whose weights have a leading layer axis,
scanned over, so that compile time does not grow with depth.
"""

from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.baselines import ATTENTIONS, MLPS
from uoe_jax.config.schema import ModelConfig
from uoe_jax.config.validate import check_cutoffs
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.layers import common
from uoe_jax.layers.adaptive import AdaptiveHead, embed, make_vocabulary
from uoe_jax.layers.attention import Attention, options
from uoe_jax.layers.common import Block, Norm, Step, Tokens, positions_like
from uoe_jax.layers.mlp import MLP, mlp_options
from uoe_jax.layers.smha import SMHA
from uoe_jax.layers.union import Union
from uoe_jax.layers.uome import UoME
from uoe_jax.layers.vocabulary import lookup, vocabulary_nll, vocabulary_scores
from uoe_jax.layers.weights import scaled_normal, weight, weight_if
from uoe_jax.moe.routing import RoutingStats

Layers = tuple[nnx.State, ...]  # the weights of every layer
Stats = dict[str, RoutingStats]  # by name of the routed block; leaves stacked over layers


class Cache(NamedTuple):
    """Decoding state."""

    attention: tuple[Any, ...]  # the blocks' caches, by layer
    mlp: tuple[Any, ...]
    next_B: Array  # int32, the next token's position


def make_attention(c: ModelConfig, rngs: nnx.Rngs) -> Block:
    """The attention block that `model.attention` names."""
    if c.attention in ATTENTIONS:
        return ATTENTIONS[c.attention](c, rngs=rngs)
    if c.attention == "smha":
        return SMHA(c.d_model, c.n_heads, c.smha, rngs=rngs, **options(c))
    return Attention(c.d_model, c.n_heads, rngs=rngs, **options(c))


def make_mlp(c: ModelConfig, rngs: nnx.Rngs) -> Block:
    """The MLP block that `model.mlp` names."""
    if c.mlp in MLPS:
        return MLPS[c.mlp](c, rngs=rngs)
    if c.mlp == "uome":
        return UoME(c.d_model, c.d_hidden, c.uome, causal=c.causal, rngs=rngs, **mlp_options(c))
    return MLP(c.d_model, c.d_hidden, rngs=rngs, **mlp_options(c))


class Layer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), each with dropout where configured."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.names, self.drop_rate = (c.attention, c.mlp), c.dropout
        self.attention_norm = Norm(c, rngs=rngs)
        self.attention = make_attention(c, rngs)
        self.mlp_norm = Norm(c, rngs=rngs)
        self.mlp = make_mlp(c, rngs)

    def _blocks(self) -> tuple[tuple[Norm, Block], tuple[Norm, Block]]:
        return (self.attention_norm, self.attention), (self.mlp_norm, self.mlp)

    def __call__(self, x_BLD: Array, tokens: Tokens) -> tuple[Array, Stats]:
        found = {}
        for i, (norm, block) in enumerate(self._blocks()):
            y_BLD, stats = block(norm(x_BLD), tokens.folded(2 * i))
            y_BLD = common.dropout(y_BLD, self.drop_rate, tokens.folded(2 * i + 1).keys_B)
            x_BLD = mesh_lib.constrain_activations(x_BLD + y_BLD)
            x_BLD = checkpoint_name(x_BLD, "block_out") if i == 0 else x_BLD
            if stats is not None:
                found[self.names[i]] = stats
        return x_BLD, found

    def _each(self, x: Array, apply: Callable[[int, Block, Array], tuple[Array, Any]]) -> Any:
        """(x after the layer in evaluation, what `apply(i, block, norm(x))` gives beside y)."""
        found = []
        for i, (norm, block) in enumerate(self._blocks()):
            y, more = apply(i, block, norm(x))
            x = x + y
            found.append(more)
        return x, tuple(found)

    def routes(self, x_BLD: Array, tokens: Tokens) -> tuple[Array, dict[str, Array]]:
        """(x_BLD, `Union.routed`'s weights by the union's name)."""

        def routed(i: int, block: Block, x_BLD: Array) -> tuple[Array, Array | None]:
            if isinstance(block, Union):
                return block.routed(x_BLD, tokens)
            return block(x_BLD, tokens)[0], None

        x_BLD, found = self._each(x_BLD, routed)
        return x_BLD, {name: w for name, w in zip(self.names, found) if w is not None}

    def prefill(self, x_BLD: Array, tokens: Tokens, context: int) -> tuple[Array, tuple[Any, ...]]:
        return self._each(x_BLD, lambda i, block, x: block.prefill(x, tokens, context))

    def decode_step(self, x_BD: Array, caches: Any, t_B: Array, rotary: Any) -> Step:
        return self._each(x_BD, lambda i, block, x: block.decode_step(x, caches[i], t_B, rotary))


# What the backward pass may keep of a layer; everything else is recomputed, and weights are
# gathered over fsdp again. remat="none" keeps everything, the whole weights of all layers too.
REMAT: dict[str, Callable[..., Any] | None] = {
    "slots": jax.checkpoint_policies.save_only_these_names(*common.SAVED_NAMES),
    "dots": jax.checkpoint_policies.dots_saveable,
    "block": None,
}


class Stack(nnx.Module):
    """What a decoder and an encoder share: positions, all layers, the last norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        table = (c.block_length, c.d_model), (None, "embed"), scaled_normal(c.d_model)
        self.positions = weight_if(c.position == "learned", rngs, *table)
        # One layer, whose weights are those of separately initialised ones on a leading layer axis.
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: Layer(c, rngs=nnx.Rngs(0))))
        one = lambda key: nnx.state(Layer(c, rngs=nnx.Rngs(params=key)))  # noqa: E731
        stacked = jax.vmap(one)(jax.random.split(rngs.params(), c.n_layers))
        self.layers = nnx.merge(graphdef, stacked)
        self.norm = Norm(c, rngs=rngs)

    def _scan(self, f: Callable[..., tuple[Array, Any]], x: Array, remat: str = "none") -> Any:
        """(x after `f(layer, x, i)` for all layers in turn, the other results, over layers)."""
        graphdef, stacked = nnx.split(self.layers)
        step = lambda x, xs: f(nnx.merge(graphdef, xs[0]), x, xs[1])  # noqa: E731
        if remat != "none":
            step = jax.checkpoint(step, policy=REMAT[remat], prevent_cse=False)
        return jax.lax.scan(step, x, (stacked, jnp.arange(self.config.n_layers)))

    def run(self, x_BLD: Array, tokens: Tokens) -> tuple[Array, Stats]:
        """All layers; returns (x_BLD before the last norm, statistics by block, over layers)."""
        each = lambda layer, x, i: layer(x, tokens.folded(i))  # noqa: E731
        return self._scan(each, x_BLD, self.config.remat)

    def routes(self, x_BLD: Array, tokens: Tokens) -> dict[str, Array]:
        """[layers,B,M,N] by routed block: its experts' weights of each patch (`Union.routed`).

        Takes what `embed_inputs` gives; on a mesh, within `mesh.by_partitioner()`.
        """
        return self._scan(lambda layer, x, i: layer.routes(x, tokens), x_BLD)[1]

    def positioned(self, x: Array, positions: Array) -> Array:
        """x [...,D] plus the learned positions, where the model has them."""
        if self.positions is None:
            return x
        return x + lookup(self.positions, positions, self.config.dtype)

    def rotary(self, positions: Array) -> tuple[Array, Array] | None:
        """Rotary tables, where the model has them."""
        c, tables = self.config, common.rotary_tables
        sizes = c.rotary_dim, c.rope_theta, c.rope_stretch
        return tables(positions, *sizes) if c.position == "rope" else None


class Transformer(Stack):
    """A decoder language model of the blocks its configuration names."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        c = config
        if c.vocab_size < 1:
            raise ValueError("vocab_size must be set before the model is built")
        check_cutoffs(c, c.vocab_size)
        shape, axes = (c.vocab_size, c.d_model), ("vocab", "embed")
        small = scaled_normal(c.d_model)  # also of the head: logits start with variance 1
        if c.cutoffs:
            self.embedding = make_vocabulary(c, rngs=rngs)
        else:
            self.embedding = weight(rngs, shape, axes, small)
        super().__init__(c, rngs=rngs)
        self.head: AdaptiveHead | nnx.Param | None
        if c.cutoffs:
            self.head = AdaptiveHead(c, rngs=rngs)
        else:
            self.head = weight_if(not c.tie_embeddings, rngs, shape[::-1], axes[::-1], small)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Array, Stats]:
        """(logits float32 [B,L,V] of the next token, statistics); arguments of `embed_inputs`.

        Of an adaptive softmax the logits are log-probabilities.
        """
        x_BLD, stats = self.run(*self.embed_inputs(*args, **kwargs))
        return self._logits(x_BLD), stats

    def nll(self, tokens_BL: Array, targets_BL: Array, *args: Any) -> tuple[Array, Stats]:
        """(-log p of the targets in nats, float32 [B,L], statistics); arguments of `__call__`."""
        # The logits of all tokens never exist at once.
        x_BLD, stats = self.run(*self.embed_inputs(tokens_BL, *args))
        if isinstance(self.head, AdaptiveHead):
            return self.head.nll(self.norm(x_BLD), targets_BL, self.embedding), stats
        return vocabulary_nll(*self._head(), self.norm(x_BLD), targets_BL), stats

    def embed_inputs(
        self,
        tokens_BL: Array,  # int32
        segments_BL: Array | None = None,  # int32 documents, 0 for padding; None: one per row
        positions_BL: Array | None = None,  # int32, inside the document; None: inside the row
        keys_B: Array | None = None,  # in training, a random key per row; None: evaluation
    ) -> tuple[Array, Tokens]:
        """The input of the first layer [B,L,D], and its tokens."""
        if positions_BL is None:
            positions_BL = positions_like(tokens_BL)
        tokens = Tokens(segments_BL, positions_BL, self.rotary(positions_BL), keys_B)
        return self.embedded(tokens_BL, positions_BL), tokens

    def prefill(self, tokens_BL: Array, length_B: Array, context: int) -> tuple[Array, Cache]:
        """(logits float32 [B,V] after prompts padded on the right, a cache of `context` tokens)."""
        with mesh_lib.by_partitioner():
            positions_BL = positions_like(tokens_BL)
            segments_BL = (positions_BL < length_B[:, None]).astype(jnp.int32)
            x_BLD, tokens = self.embed_inputs(tokens_BL, segments_BL, positions_BL)
            each = lambda layer, x, i: layer.prefill(x, tokens, context)  # noqa: E731
            x_BLD, caches = self._scan(each, x_BLD)
            attention, mlp = (self._unstack(c) for c in caches)
            last_BD = jnp.take_along_axis(x_BLD, (length_B - 1)[:, None, None], axis=1)[:, 0]
            return self._logits(last_BD), Cache(attention, mlp, length_B.astype(jnp.int32))

    def decode_step(
        self, tokens_B: Array, cache: Cache, layers: Layers | None = None
    ) -> tuple[Array, Cache]:
        """Appends one token to each row; returns (logits float32 [B,V] of the next one, cache).

        layers: `each_layer`'s, once for all steps; slicing the stacked weights anew is slower.
        """
        # Layers are unrolled, so that a donated cache is updated in place.
        with mesh_lib.by_partitioner():
            t_B, caches = cache.next_B, []
            rotary, x_BD = self.rotary(t_B), self.embedded(tokens_B, t_B)
            graphdef = nnx.graphdef(self.layers)
            each = zip(layers or self.each_layer(), cache.attention, cache.mlp, strict=True)
            for weights, *own in each:
                x_BD, new = nnx.merge(graphdef, weights).decode_step(x_BD, own, t_B, rotary)
                caches.append(new)
            attention, mlp = zip(*caches)
            return self._logits(x_BD), Cache(attention, mlp, t_B + 1)

    def each_layer(self) -> Layers:
        """The weights of every layer by itself; under `jax.jit` a copy of all of them."""
        return self._unstack(nnx.state(self.layers))

    def _unstack(self, stacked: Any) -> tuple[Any, ...]:
        return tuple(jax.tree.map(lambda a: a[i], stacked) for i in range(self.config.n_layers))

    def embedded(self, tokens: Array, positions: Array) -> Array:
        """The input of the first layer, from int32 [B,L] or [B]."""
        return self.positioned(embed(self.embedding, tokens, self.config.dtype), positions)

    def _logits(self, x: Array) -> Array:
        if isinstance(self.head, AdaptiveHead):
            return self.head(self.norm(x), self.embedding)
        return vocabulary_scores(*self._head(), self.norm(x))

    def _head(self) -> tuple[nnx.Param, bool]:
        """(the output head [D,V], False), or (the embedding [V,D], True) where it is tied."""
        head = self.embedding if self.head is None else self.head
        assert isinstance(head, nnx.Param)  # vectors in pieces have an AdaptiveHead
        return head, self.head is None

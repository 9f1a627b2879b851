"""The stack of pre-norm blocks, scanned over layers, and the decoder language model on it, with cached decoding.

Letters in `layers.common`; T is the number of layers. The stack of layers is one `Block` whose weights have a leading
layer axis, so that compile time does not grow with depth.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.baselines import ATTENTIONS, MLPS
from uoe_jax.config.schema import ModelConfig
from uoe_jax.config.validate import check_cutoffs
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.mesh import placed_activations
from uoe_jax.layers.adaptive import AdaptiveHead, look_up, make_words
from uoe_jax.layers.attention import Attention, options
from uoe_jax.layers.common import (
    KEPT,
    Norm,
    Part,
    Tokens,
    dropout,
    rotary_tables,
    scaled_normal,
    weight,
)
from uoe_jax.layers.mlp import MLP
from uoe_jax.layers.smha import SMHA
from uoe_jax.layers.union import Union
from uoe_jax.layers.uome import UoME
from uoe_jax.layers.vocabulary import lookup, vocabulary_nll, vocabulary_scores
from uoe_jax.moe.routing import RoutingStats

Layers = tuple[nnx.State, ...]  # the weights of every layer
M = TypeVar("M", bound=nnx.Module)
Stats = dict[str, RoutingStats]  # by block ("smha", "uome"); leaves stacked over layers


class Cache(NamedTuple):
    """Decoding state: the caches of every layer's attention and MLP, and the position int32 [B] of the next token."""

    attention: tuple[Any, ...]
    mlp: tuple[Any, ...]
    next_B: jax.Array


def make_attention(c: ModelConfig, rngs: nnx.Rngs) -> Part:
    """The attention block that `model.attention` names."""
    if c.attention in ATTENTIONS:
        return ATTENTIONS[c.attention](c, rngs=rngs)
    if c.attention == "smha":
        return SMHA(c.d_model, c.n_heads, c.smha, n_kv_heads=c.kv_heads, rngs=rngs, **options(c))
    return Attention(c.d_model, c.n_heads, n_kv_heads=c.kv_heads, rngs=rngs, **options(c))


def make_mlp(c: ModelConfig, rngs: nnx.Rngs) -> Part:
    """The MLP block that `model.mlp` names."""
    if c.mlp in MLPS:
        return MLPS[c.mlp](c, rngs=rngs)
    if c.mlp == "uome":
        return UoME(
            c.d_model,
            c.d_hidden,
            c.uome,
            activation=c.activation,
            bias=c.bias,
            causal=c.causal,
            dtype=c.dtype,
            out_scale=c.out_scale,
            rngs=rngs,
        )
    return MLP(
        c.d_model,
        c.d_hidden,
        activation=c.activation,
        bias=c.bias,
        dtype=c.dtype,
        out_scale=c.out_scale,
        rngs=rngs,
    )


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout of what is added where configured."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.names, self.drop_rate = (c.attention, c.mlp), c.dropout
        self.attention_norm = Norm(c.d_model, kind=c.norm, eps=c.norm_eps, rngs=rngs)
        self.attention = make_attention(c, rngs)
        self.mlp_norm = Norm(c.d_model, kind=c.norm, eps=c.norm_eps, rngs=rngs)
        self.mlp = make_mlp(c, rngs)

    def __call__(self, x_BLD: jax.Array, tokens: Tokens) -> tuple[jax.Array, Stats]:
        y_BLD, attention_stats = self.attention(self.attention_norm(x_BLD), tokens.folded(0))
        x_BLD = checkpoint_name(
            placed_activations(x_BLD + self._dropped(y_BLD, tokens.folded(1))), "block_out"
        )
        y_BLD, mlp_stats = self.mlp(self.mlp_norm(x_BLD), tokens.folded(2))
        stats = zip(self.names, (attention_stats, mlp_stats))
        x_BLD = placed_activations(x_BLD + self._dropped(y_BLD, tokens.folded(3)))
        return x_BLD, {name: s for name, s in stats if s is not None}

    def _dropped(self, y_BLD: jax.Array, tokens: Tokens) -> jax.Array:
        return dropout(y_BLD, self.drop_rate, tokens.keys_B)

    def routes(self, x_BLD: jax.Array, tokens: Tokens) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(x_BLD behind the block in evaluation, by the name of each union in it `Union.routed`'s weights)."""
        found = {}
        for name, part, norm in zip(
            self.names, (self.attention, self.mlp), (self.attention_norm, self.mlp_norm)
        ):
            if isinstance(part, Union):
                y_BLD, found[name] = part.routed(norm(x_BLD), tokens)
            else:
                y_BLD, _ = part(norm(x_BLD), tokens)
            x_BLD = x_BLD + y_BLD
        return x_BLD, found

    def prefill(
        self, x_BLD: jax.Array, tokens: Tokens, context: int
    ) -> tuple[jax.Array, tuple[Any, Any]]:
        y_BLD, attention = self.attention.prefill(self.attention_norm(x_BLD), tokens, context)
        x_BLD = x_BLD + y_BLD
        y_BLD, mlp = self.mlp.prefill(self.mlp_norm(x_BLD), tokens, context)
        return x_BLD + y_BLD, (attention, mlp)

    def decode_step(
        self, x_BD: jax.Array, caches: tuple[Any, Any], t_B: jax.Array, rotary: Any
    ) -> tuple[jax.Array, Any]:
        y_BD, attention = self.attention.decode_step(
            self.attention_norm(x_BD), caches[0], t_B, rotary
        )
        x_BD = x_BD + y_BD
        y_BD, mlp = self.mlp.decode_step(self.mlp_norm(x_BD), caches[1], t_B, rotary)
        return x_BD + y_BD, (attention, mlp)


_keep_named = jax.checkpoint_policies.save_only_these_names(*KEPT)

# What the backward pass may keep of a layer; everything else is recomputed, and weights are gathered over fsdp again.
REMAT = {
    "none": lambda f: f,  # not even that: the whole weights of all layers are kept
    "slots": lambda f: jax.checkpoint(f, policy=_keep_named, prevent_cse=False),
    "dots": lambda f: jax.checkpoint(
        f, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False
    ),
    "block": lambda f: jax.checkpoint(f, prevent_cse=False),
}


class Stack(nnx.Module):
    """What a decoder and an encoder share: positions, the blocks of every layer, the last norm."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        learned = c.position == "learned"
        shape, small = (c.block_length, c.d_model), scaled_normal(c.d_model)
        self.positions = weight(rngs, shape, (None, "embed"), small) if learned else None
        self.layers = _stack(lambda r: Block(c, rngs=r), c.n_layers, rngs.params())
        self.norm = Norm(c.d_model, kind=c.norm, eps=c.norm_eps, rngs=rngs)

    def run(self, x_BLD: jax.Array, tokens: Tokens) -> tuple[jax.Array, Stats]:
        """All layers; returns (x_BLD before the last norm, routing statistics by block, stacked over layers)."""
        graphdef, stacked = nnx.split(self.layers)

        def layer(x_BLD, xs):
            weights, i = xs
            return nnx.merge(graphdef, weights)(x_BLD, tokens.folded(i))

        layers = jnp.arange(self.config.n_layers)
        return jax.lax.scan(REMAT[self.config.remat](layer), x_BLD, (stacked, layers))

    def routes(self, x_BLD: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
        """For every routed block its experts' weights of each patch, [layers,B,M,N] (`Union.routed`); from what `embed_inputs` gives.

        On a mesh of several devices within `mesh.by_partitioner()`.
        """
        graphdef, stacked = nnx.split(self.layers)

        def layer(x_BLD: jax.Array, weights: nnx.State) -> tuple[jax.Array, dict[str, jax.Array]]:
            return nnx.merge(graphdef, weights).routes(x_BLD, tokens)

        return jax.lax.scan(layer, x_BLD, stacked)[1]

    def positioned(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """x [...,D] plus the learned positions, where the model has them."""
        return x if self.positions is None else x + self._lookup(self.positions, positions)

    def _lookup(self, table: nnx.Param, ids: jax.Array) -> jax.Array:
        return lookup(table, ids, self.config.dtype)

    def rotary(self, positions: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Rotary tables, where the model has them."""
        if self.config.position != "rope":
            return None
        return rotary_tables(
            positions, self.config.rotary_dim, self.config.rope_theta, self.config.rope_stretch
        )


class Transformer(Stack):
    """A decoder language model of the blocks its configuration names."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        c = config
        if c.vocab_size < 1:
            raise ValueError("vocab_size must be set before the model is built")
        check_cutoffs(c, c.vocab_size)
        small = scaled_normal(
            c.d_model
        )  # also of the head: logits of the normed state start with variance 1
        shape = (c.vocab_size, c.d_model)
        self.embedding = (
            make_words(c, rngs=rngs)
            if c.cutoffs
            else weight(rngs, shape, ("vocab", "embed"), small)
        )
        super().__init__(c, rngs=rngs)
        self.head: AdaptiveHead | nnx.Param | None
        if c.cutoffs:
            self.head = AdaptiveHead(c, rngs=rngs)
        else:
            self.head = (
                None if c.tie_embeddings else weight(rngs, shape[::-1], ("embed", "vocab"), small)
            )

    def __call__(
        self,
        tokens_BL: jax.Array,
        segments_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Stats]:
        """Logits of the next token; of an adaptive softmax, its log-probabilities.

        Args:
          tokens_BL: int32.
          segments_BL: int32, the document of each token, 0 for padding; None: one document per row.
          positions_BL: int32, counted inside the document; None: from the start of the row.
          keys_B: in training, a random key for each row (dropout, router noise); None: evaluation.

        Returns:
          (logits float32 [B,L,V], routing statistics by block, stacked over layers).
        """
        x_BLD, stats = self.run(*self.embed_inputs(tokens_BL, segments_BL, positions_BL, keys_B))
        return self._logits(x_BLD), stats

    def nll(
        self,
        tokens_BL: jax.Array,
        targets_BL: jax.Array,
        segments_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Stats]:
        """(-log p of the targets in nats, float32 [B,L], routing statistics); the other arguments are those of `__call__`.

        The scores of all tokens are never held.
        """
        x_BLD, stats = self.run(*self.embed_inputs(tokens_BL, segments_BL, positions_BL, keys_B))
        if isinstance(self.head, AdaptiveHead):
            return self.head.nll(self.norm(x_BLD), targets_BL, self.embedding), stats
        head, tied = self._words()
        return vocabulary_nll(head, tied, self.norm(x_BLD), targets_BL), stats

    def embed_inputs(
        self,
        tokens_BL: jax.Array,
        segments_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Tokens]:
        """What enters the first layer, [B,L,D], and what the blocks must know of it; the arguments are those of `__call__`."""
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(
                jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), tokens_BL.shape
            )
        return self.embedded(tokens_BL, positions_BL), Tokens(
            segments_BL, positions_BL, self.rotary(positions_BL), keys_B
        )

    def prefill(
        self, tokens_BL: jax.Array, length_B: jax.Array, context: int
    ) -> tuple[jax.Array, Cache]:
        """Runs prompts padded on the right; returns (logits float32 [B,V] after each prompt, cache for `context` tokens)."""
        with mesh_lib.by_partitioner():
            return self._prefill(tokens_BL, length_B, context)

    def _prefill(
        self, tokens_BL: jax.Array, length_B: jax.Array, context: int
    ) -> tuple[jax.Array, Cache]:
        b, l = tokens_BL.shape
        positions_BL = jnp.broadcast_to(jnp.arange(l, dtype=jnp.int32), (b, l))
        segments_BL = (positions_BL < length_B[:, None]).astype(jnp.int32)
        x_BLD, tokens = self.embed_inputs(tokens_BL, segments_BL, positions_BL)
        graphdef, stacked = nnx.split(self.layers)

        def layer(x_BLD, weights):
            return nnx.merge(graphdef, weights).prefill(x_BLD, tokens, context)

        x_BLD, caches = jax.lax.scan(layer, x_BLD, stacked)
        attention, mlp = (
            tuple(jax.tree.map(lambda a: a[i], c) for i in self._numbers()) for c in caches
        )
        last_BD = jnp.take_along_axis(x_BLD, (length_B - 1)[:, None, None], axis=1)[:, 0]
        return self._logits(last_BD), Cache(attention, mlp, length_B.astype(jnp.int32))

    def decode_step(
        self, tokens_B: jax.Array, cache: Cache, layers: Layers | None = None
    ) -> tuple[jax.Array, Cache]:
        """Appends one token to each sequence; returns (logits float32 [B,V] of the one after it, cache).

        Every layer stands by itself in the program, so that a donated cache is written where it lies. layers: what
        `each_layer` gave, made once for all steps; None: cut out of the stacked weights in every step, which takes longer.
        """
        with mesh_lib.by_partitioner():
            rotary = self.rotary(cache.next_B)
            x_BD, caches = self.embedded(tokens_B, cache.next_B), []
            graphdef = nnx.graphdef(self.layers)
            for weights, *own in zip(
                layers or self.each_layer(), cache.attention, cache.mlp, strict=True
            ):
                x_BD, own = nnx.merge(graphdef, weights).decode_step(
                    x_BD, tuple(own), cache.next_B, rotary
                )
                caches.append(own)
            attention, mlp = zip(*caches)
            return self._logits(x_BD), Cache(attention, mlp, cache.next_B + 1)

    def each_layer(self) -> Layers:
        """The weights of every layer by itself; under `jax.jit` a copy of all of them."""
        stacked = nnx.state(self.layers)
        return tuple(jax.tree.map(lambda a: a[i], stacked) for i in self._numbers())

    def _numbers(self) -> range:
        return range(self.config.n_layers)

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """What enters the first layer."""
        return self.positioned(look_up(self.embedding, tokens, self.config.dtype), positions)

    def _logits(self, x: jax.Array) -> jax.Array:
        if isinstance(self.head, AdaptiveHead):
            return self.head(self.norm(x), self.embedding)
        head, tied = self._words()
        return vocabulary_scores(head, tied, self.norm(x))

    def _words(self) -> tuple[nnx.Param, bool]:
        """The vectors that states are scored against, and whether they are the embedding's [V,D] or the head's own [D,V]."""
        own = self.embedding if self.head is None else self.head
        assert isinstance(own, nnx.Param)  # vectors in pieces have an AdaptiveHead
        return own, self.head is None


def _stack(make: Callable[[nnx.Rngs], M], n: int, key: jax.Array) -> M:
    """One module with the weights of `n` independently initialised ones stacked on a leading layer axis."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    states = jax.vmap(lambda k: nnx.split(make(nnx.Rngs(params=k)))[1])(jax.random.split(key, n))
    return nnx.merge(graphdef, states)

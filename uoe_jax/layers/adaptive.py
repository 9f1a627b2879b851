"""The adaptive softmax (Grave et al. 2017): a large vocabulary, most frequent first, in pieces.

The first piece is scored for every token, with one more score for each further piece (a tail). A
tail is scored only for tokens whose target is in it: log p = log softmax over the first piece and
the tails, plus, in a tail, log softmax inside it. With `cutoff_div`, tail i has vectors of width
D / div^i and one projection, in the embedding too. Losses are exact: tokens are sorted by the piece
of their target and scored chunk by chunk.

On a mesh the tables are whole over `expert`, over which the tokens are sharded instead (where the
axis divides L; else every shard scores all its rows).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.manual import Region, run
from uoe_jax.layers.chunked import chunked_nll, entry_scores
from uoe_jax.layers.common import linear
from uoe_jax.layers.vocabulary import Result, lookup
from uoe_jax.layers.weights import scaled_normal, weight

Piece = tuple[Array, Array | None]  # (table [v,d], projection [D,d] where d < D)


class Pieces(nnx.Module):
    """A vocabulary in pieces of different widths: table_i [v,d], in a tail projection_i [D,d]."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        for i, (size, width) in enumerate(c.vocabulary_pieces):
            init = scaled_normal(width if i else c.d_model)
            setattr(self, f"table_{i}", weight(rngs, (size, width), (None, "embed"), init))
            if i:  # embeddings are then as large as those of one table [V,D]
                w = weight(rngs, (c.d_model, width), ("embed", None), scaled_normal(c.d_model))
                setattr(self, f"projection_{i}", w)


Vocabulary = nnx.Param | Pieces  # one table [V,D], or pieces of different widths


def make_vocabulary(c: ModelConfig, *, rngs: nnx.Rngs) -> Vocabulary:
    """The vectors of an embedding or a head with an adaptive softmax."""
    if c.cutoff_div > 1:
        return Pieces(c, rngs=rngs)
    return weight(rngs, (c.vocab_size, c.d_model), (None, "embed"), scaled_normal(c.d_model))


def embed(vocabulary: Vocabulary, ids_BL: Array, dtype: Any) -> Array:
    """Embeddings of ids, [B,L,D] in `dtype`, sharded as between blocks; also of ids [B]."""
    if not isinstance(vocabulary, Pieces):
        return lookup(vocabulary, ids_BL, dtype)

    def on_shard(pieces: Pieces, ids_BL: Array, _: Any, region: Region) -> Result:
        own_BL, found, start = region.local_tokens(ids_BL), [], 0
        # In float32, and rounded then, for the sums of the gradient (`vocabulary.lookup`).
        for table_vd, projection_Dd in split(pieces, jnp.float32):
            held_BL = (own_BL >= start) & (own_BL < start + table_vd.shape[0])
            x = table_vd[jnp.where(held_BL, own_BL - start, 0)].astype(dtype)
            x = jnp.where(held_BL[..., None], x, 0)
            if projection_Dd is not None:
                x = linear(x, projection_Dd.T.astype(dtype))
            found.append(x)
            start += table_vd.shape[0]
        return sum(found[1:], found[0]), None

    return run(on_shard, vocabulary, ids_BL, dtype=dtype, ids=True, on_local_tokens=True)[0]


def split(vocabulary: Vocabulary, dtype: Any, cutoffs: tuple[int, ...] = ()) -> list[Piece]:
    """All pieces in `dtype` (None: as they are); one table is cut at `cutoffs`."""

    def cast(w: nnx.Param) -> Array:
        return w[...].astype(dtype or w.dtype)

    if not isinstance(vocabulary, Pieces):
        return [(table_vD, None) for table_vD in jnp.split(cast(vocabulary), cutoffs)]
    weights = {name: cast(w) for name, w in nnx.state(vocabulary).items()}
    n = len(weights) // 2 + 1  # the first table has no projection
    return [(weights[f"table_{i}"], weights.get(f"projection_{i}")) for i in range(n)]


class AdaptiveHead(nnx.Module):
    """Log-probabilities of the next token. `words`: its own vectors; None: the embedding's."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.cutoffs = c.cutoff_list
        shape = (len(self.cutoffs), c.d_model)
        self.tails = weight(rngs, shape, (None, "embed"), scaled_normal(c.d_model))
        self.words = None if c.tie_embeddings else make_vocabulary(c, rngs=rngs)

    def __call__(self, x: Array, embedding: Vocabulary) -> Array:
        """log p of every entry, float32 [B,L,V], of hidden states x [B,L,D]; or [B,V] of [B,D]."""

        def on_shard(weights: Any, x: Array, _: Any, region: Region) -> Result:
            first, *tails = self._pieces(weights, x.dtype)
            head = jax.nn.log_softmax(entry_scores(x, first[0]), axis=-1)
            out = [head[..., : self.cutoffs[0]]]
            for i, (table_vd, projection_Dd) in enumerate(tails, self.cutoffs[0]):
                scores = entry_scores(_narrow(x, projection_Dd), table_vd)
                out.append(jax.nn.log_softmax(scores, axis=-1) + head[..., i : i + 1])
            return jnp.concatenate(out, axis=-1), None

        weights = self._weights(embedding)
        return run(on_shard, weights, x, dtype=x.dtype, on_local_tokens=True)[0]

    def nll(self, x_BLD: Array, targets_BL: Array, embedding: Vocabulary) -> Array:
        """-log p of the targets, float32 [B,L]; the scores of all tokens never exist at once."""

        def on_shard(weights: Any, x: Array, targets_BL: Array, region: Region) -> Result:
            (first_vD, _), *tails = self._pieces(weights, None)
            target_T, n = region.local_tokens(targets_BL).reshape(-1), len(tails) + 1
            after_T = target_T[:, None] >= jnp.array(self.cutoffs, jnp.int32)[None]
            piece_T = after_T.sum(axis=-1, dtype=jnp.int32)
            order_T = jnp.argsort(piece_T)
            x_TD, target_T, piece_T = (
                a.at[order_T].get(unique_indices=True)
                for a in (x.reshape(-1, x.shape[-1]), target_T, piece_T)
            )
            starts = [(piece_T < i).sum(dtype=jnp.int32) for i in range(n + 1)]
            in_first_T = jnp.where(piece_T == 0, target_T, self.cutoffs[0] - 1 + piece_T)
            all_T = jnp.zeros_like(starts[0]), jnp.full_like(starts[0], target_T.shape[0])
            nll_T = chunked_nll(x_TD, first_vD, in_first_T, *all_T)
            for i, (table_vd, projection_Dd) in enumerate(tails):
                y_Td, in_piece_T = _narrow(x_TD, projection_Dd), target_T - self.cutoffs[i]
                nll_T += chunked_nll(y_Td, table_vd, in_piece_T, starts[i + 1], starts[i + 2])
            nll_T = jnp.zeros_like(nll_T).at[order_T].set(nll_T, unique_indices=True)
            return nll_T.reshape(x.shape[:-1]), None

        mesh = mesh_lib.current()
        by_shard = mesh is not None and x_BLD.shape[1] % mesh.shape["expert"] == 0
        # Constrained, or the partitioner would shard the output of the blocks along L too.
        x_BLD = mesh_lib.constrain_activations(x_BLD)
        args = (self._weights(embedding), x_BLD, targets_BL)
        with mesh_lib.sequence_parallel(by_shard):  # no shard scores the tokens of another
            return run(on_shard, *args, dtype=x_BLD.dtype, on_local_tokens=True)[0]

    def _weights(self, embedding: Vocabulary) -> tuple[Vocabulary, nnx.Param]:
        return embedding if self.words is None else self.words, self.tails

    def _pieces(self, weights: tuple[Vocabulary, nnx.Param], dtype: Any) -> list[Piece]:
        """The pieces; the vectors of the tails follow the first piece's own."""
        vocabulary, tails = weights
        (first_vD, _), *others = split(vocabulary, dtype, self.cutoffs)
        return [(jnp.concatenate([first_vD, tails[...].astype(first_vD.dtype)]), None), *others]


def _narrow(x: Array, projection_Dd: Array | None) -> Array:
    return x if projection_Dd is None else x @ projection_Dd.astype(x.dtype)

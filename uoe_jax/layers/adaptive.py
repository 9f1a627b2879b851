"""The adaptive softmax (Grave et al. 2017): a large vocabulary, most frequent words first, scored in pieces.

The first piece is scored for every token, together with one score for each further piece (a tail); a tail is scored only
for the tokens whose word is in it: log p(w) = log softmax over the first piece and the tails, plus, where w is in a tail,
log softmax inside it. With `cutoff_div` tail i has vectors of width D / div^i and one projection, in the embedding too.
Losses are exact: tokens are sorted by the piece of their word and taken a chunk at a time, as often as there are some, so
that no token is dropped and no more than a chunk's scores exist at once.

On a mesh the words are cut over `fsdp` as other weights are and stay whole over `expert`, over which the tokens are cut
instead (where the axis divides L; else every part scores all tokens of its rows).

Letters: v words of a piece, d their width, n tokens of one device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.manual import Region, run
from uoe_jax.layers.chunked import word_scores, words_nll
from uoe_jax.layers.common import linear, scaled_normal, weight
from uoe_jax.layers.vocabulary import lookup


class Pieces(nnx.Module):
    """The vectors of a vocabulary whose pieces are of different widths: table_i [v,d], and for a tail projection_i [D,d]."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        small = scaled_normal(
            c.d_model
        )  # of the projection: what is looked up is then as large as in one table [V,D]
        self.cutoffs = c.cutoff_list
        self.table_0: nnx.Param
        for i, (size, width) in enumerate(c.vocabulary_pieces):
            setattr(
                self,
                f"table_{i}",
                weight(
                    rngs, (size, width), (None, "embed"), scaled_normal(width if i else c.d_model)
                ),
            )
            if i:
                setattr(
                    self,
                    f"projection_{i}",
                    weight(rngs, (c.d_model, width), ("embed", None), small),
                )

    def lookup(self, ids_BL: jax.Array, dtype: Any) -> jax.Array:
        """The vectors of ids, [B,L,D] in `dtype`, as activations lie between blocks; as well of ids [B]."""
        starts = (0, *self.cutoffs)

        def share(
            words: _Words, ids_BL: jax.Array, _: None, region: Region
        ) -> tuple[jax.Array, None]:
            own_BL, found = region.local_tokens(ids_BL), []
            # In float32, and rounded then, for the sums of the gradient (`ends.lookup`).
            for start, (table_vd, projection_Dd) in zip(
                starts, words.pieces(jnp.float32, self.cutoffs), strict=True
            ):
                here_BL = (own_BL >= start) & (own_BL < start + table_vd.shape[0])
                x = jnp.where(
                    here_BL[..., None],
                    table_vd[jnp.where(here_BL, own_BL - start, 0)].astype(dtype),
                    0,
                )
                found.append(
                    x if projection_Dd is None else linear(x, projection_Dd.T.astype(dtype))
                )
            return sum(found[1:], found[0]), None

        return run(share, _words(self), ids_BL, dtype=dtype, enters=False, on_local_tokens=True)[0]


Vocabulary = nnx.Param | Pieces  # one table [V,D], or pieces of different widths


def make_words(c: ModelConfig, *, rngs: nnx.Rngs) -> Vocabulary:
    """The vectors of the words, for the embedding or the head."""
    if c.cutoff_div > 1:
        return Pieces(c, rngs=rngs)
    return weight(rngs, (c.vocab_size, c.d_model), (None, "embed"), scaled_normal(c.d_model))


def look_up(words: Vocabulary, ids_BL: jax.Array, dtype: Any) -> jax.Array:
    """The vectors of ids, [B,L,D] in `dtype`, as activations lie between blocks."""
    return (
        words.lookup(ids_BL, dtype) if isinstance(words, Pieces) else lookup(words, ids_BL, dtype)
    )


class AdaptiveHead(nnx.Module):
    """Log-probabilities of the next word. `words`: the head's own vectors; None: those of the embedding."""

    def __init__(self, c: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.cutoffs = c.cutoff_list
        self.tails = weight(
            rngs, (len(self.cutoffs), c.d_model), (None, "embed"), scaled_normal(c.d_model)
        )
        self.words = None if c.tie_embeddings else make_words(c, rngs=rngs)

    def __call__(self, x: jax.Array, embedding: Vocabulary) -> jax.Array:
        """log p of every word, float32 [B,L,V] (or [B,V]), of states x [B,L,D] (or [B,D]): every tail for every token."""

        def share(weights: Any, x: jax.Array, _: None, region: Region) -> tuple[jax.Array, None]:
            first, *tails = self._pieces(weights, x.dtype)
            head = jax.nn.log_softmax(word_scores(x, first[0]), axis=-1)
            out = [head[..., : self.cutoffs[0]]]
            for i, (table_vd, projection_Dd) in enumerate(tails, self.cutoffs[0]):
                out.append(
                    jax.nn.log_softmax(word_scores(_narrowed(x, projection_Dd), table_vd), axis=-1)
                    + head[..., i : i + 1]
                )
            return jnp.concatenate(out, axis=-1), None

        return run(share, self._weights(embedding), x, dtype=x.dtype, on_local_tokens=True)[0]

    def nll(self, x_BLD: jax.Array, targets_BL: jax.Array, embedding: Vocabulary) -> jax.Array:
        """-log p of the targets, float32 [B,L], and with it gradients, without the scores of all tokens at once."""

        def share(
            weights: Any, x: jax.Array, targets_BL: jax.Array, region: Region
        ) -> tuple[jax.Array, None]:
            target_n = region.local_tokens(targets_BL).reshape(-1)
            nll_n = _nll(
                self._pieces(weights, None), self.cutoffs, x.reshape(-1, x.shape[-1]), target_n
            )
            return nll_n.reshape(x.shape[:-1]), None

        mesh = mesh_lib.current()
        alike = mesh is None or x_BLD.shape[1] % mesh.shape["expert"]
        x_BLD = mesh_lib.placed_activations(
            x_BLD
        )  # else the partitioner cuts what comes out of the blocks, too, along L
        with mesh_lib.sequence_parallel(not alike):  # no part scores the tokens of another
            return run(
                share,
                self._weights(embedding),
                x_BLD,
                targets_BL,
                dtype=x_BLD.dtype,
                on_local_tokens=True,
            )[0]

    def _weights(self, embedding: Vocabulary) -> tuple[_Words, nnx.Param]:
        return _words(embedding if self.words is None else self.words), self.tails

    def _pieces(self, weights: tuple[_Words, nnx.Param], dtype: Any) -> list[_Piece]:
        """The pieces; the first has the vectors of the tails behind its own."""
        words, tails = weights
        (first_vD, _), *others = words.pieces(dtype, self.cutoffs)
        return [(jnp.concatenate([first_vD, tails[...].astype(first_vD.dtype)]), None), *others]


_Piece = tuple[jax.Array, jax.Array | None]  # (table [v,d], projection [D,d] where d < D)


class _Words(NamedTuple):
    """The weights of a `Vocabulary` as `manual.run` takes them: one table for all pieces, or one for each."""

    tables: tuple[nnx.Param, ...]
    projections: tuple[nnx.Param, ...]

    def pieces(self, dtype: Any, cutoffs: tuple[int, ...]) -> list[_Piece]:
        """All pieces in `dtype` (None: as they are)."""
        tables, projections = ([w[...].astype(dtype or w.dtype) for w in ws] for ws in self)
        if not projections:
            return [(table_vD, None) for table_vD in jnp.split(tables[0], cutoffs)]
        return list(zip(tables, [None, *projections], strict=True))


def _words(words: Vocabulary) -> _Words:
    if not isinstance(words, Pieces):
        return _Words((words,), ())
    tails = range(1, len(words.cutoffs) + 1)
    tables, projections = (
        [getattr(words, f"{name}_{i}") for i in tails] for name in ("table", "projection")
    )
    return _Words((words.table_0, *tables), tuple(projections))


def _narrowed(x: jax.Array, projection_Dd: jax.Array | None) -> jax.Array:
    return x if projection_Dd is None else x @ projection_Dd.astype(x.dtype)


def _nll(
    pieces: list[_Piece], cutoffs: tuple[int, ...], x_nD: jax.Array, target_n: jax.Array
) -> jax.Array:
    """-log p of the targets, float32 [n]."""
    n = target_n.shape[0]
    piece_n = (target_n[:, None] >= jnp.array(cutoffs, jnp.int32)[None]).sum(
        axis=-1, dtype=jnp.int32
    )
    order_n = jnp.argsort(piece_n)
    x_nD, target_n, piece_n = (
        a.at[order_n].get(unique_indices=True) for a in (x_nD, target_n, piece_n)
    )
    starts = [(piece_n < i).sum(dtype=jnp.int32) for i in range(len(pieces) + 1)]
    in_first_n = jnp.where(piece_n == 0, target_n, cutoffs[0] - 1 + piece_n)
    nll_n = words_nll(
        x_nD, pieces[0][0], in_first_n, jnp.zeros_like(starts[0]), jnp.full_like(starts[0], n)
    )
    for i, (table_vd, projection_Dd) in enumerate(pieces[1:], 1):
        y_nd = _narrowed(x_nD, projection_Dd)
        nll_n += words_nll(y_nd, table_vd, target_n - cutoffs[i - 1], starts[i], starts[i + 1])
    return jnp.zeros_like(nll_n).at[order_n].set(nll_n, unique_indices=True)

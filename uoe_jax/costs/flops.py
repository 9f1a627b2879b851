"""Floating-point operations of the model, counted from its configuration: what the compiled program executes.

A multiply-add counts 2. Attention is counted as computed, in whole tiles (`tiles`): all of a row of one tile, and of longer
ones under a causal mask about half; routed blocks are counted by their slots, filled or not. Elementwise work is left out, and
so is moving tokens to slots and back, which is a product only with routing.dispatch='onehot'.
"""

from __future__ import annotations

import math
from typing import Sequence

from uoe_jax.config.schema import ModelConfig, RoutingConfig
from uoe_jax.costs.baselines import ATTENTIONS
from uoe_jax.layers.tiles import computed_scores

# Peak dense 16-bit FLOP/s of one device, by `device_kind`; a chip that is not listed has no MFU.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}
ON_SLOTS = ("smha", "mosa")  # attentions whose heads work on slots


def routing_flops(r: RoutingConfig, d_model: int, length: int) -> float:
    """The routers of one block over one row."""
    routed = (r.unit != "sequence") * r.patches(length) + (r.unit != "patch")
    return 2 * routed * d_model * r.n_experts


def attention_flops(c: ModelConfig, length: int, training: bool = False) -> float:
    """Forward pass of one attention block over one row of `length` tokens."""
    if c.attention not in ON_SLOTS:
        return ATTENTIONS[c.attention](c, length).flops
    r = c.routed()[c.attention]
    d, dh, h, g = c.d_model, c.head_dim, c.n_heads, c.kv_heads
    s = r.slot_tokens(length) * (r.row_share() if training else 1)
    entering = s if r.order == "gather" else r.patches(length) * r.patch_size
    core = core_flops(c, length, training)
    return (
        routing_flops(r, d, length)
        + 2 * entering * d * dh * (h + 2 * g)
        + 2 * s * d * dh * h
        + core
    )


def core_flops(c: ModelConfig, length: int, training: bool = False) -> float:
    """Of these, the scores and the weighted sums: what a flash attention kernel does."""
    if c.attention not in ON_SLOTS:
        return ATTENTIONS[c.attention](c, length).core
    r = c.routed()[c.attention]
    return (
        (r.row_share() if training else 1)
        * 4
        * c.n_heads
        * c.head_dim
        * computed_scores(r.slot_tokens(length), c.causal)
    )


def mlp_flops(c: ModelConfig, length: int, training: bool = False) -> float:
    """Forward pass of one MLP block over one row of `length` tokens."""
    r = c.routed().get(c.mlp)
    whole = 2 * (c.n_into + 1) * length * c.d_model * c.whole_hidden
    if r is None:
        return whole
    s = r.slot_tokens(length) * (r.row_share() if training else 1)
    entering = s if r.order == "gather" else r.patches(length) * r.patch_size
    experts = 2 * (c.n_into * entering + s) * c.d_model * c.routed_hidden
    return routing_flops(r, c.d_model, length) + experts + whole


def tail_shares(c: ModelConfig) -> tuple[float, ...]:
    """The share of the words of a text in each tail of an adaptive softmax, by Zipf's law: the word of rank r comes ~ 1/r."""
    edges = (*c.cutoff_list, c.vocab_size)
    up_to = [math.log(n + 0.5) + 0.57722 for n in edges]  # the harmonic number of n
    return tuple((end - start) / up_to[-1] for start, end in zip(up_to, up_to[1:]))


def scored_pieces(
    c: ModelConfig, shares: Sequence[float] | None = None
) -> list[tuple[float, int, int]]:
    """(share of the tokens that it is scored for, scores of such a token, width) of every piece of the vocabulary.

    shares: those of the tails of an adaptive softmax; None: the tokens whose word is in them, by Zipf's law
    (`tail_shares`), as in losses. Log-probabilities of all words score every tail for every token.
    """
    (first, width), *tails = c.vocabulary_pieces
    shares = tail_shares(c) if shares is None else shares
    return [(1, first + len(tails), width), *((share, *tail) for share, tail in zip(shares, tails))]


def score_flops(c: ModelConfig, length: int, shares: Sequence[float] | None = None) -> float:
    """The scores of the words over one row; shares as in `scored_pieces`."""
    return (
        2
        * length
        * sum(share * scores * width for share, scores, width in scored_pieces(c, shares))
    )


def vocabulary_flops(c: ModelConfig, length: int, shares: Sequence[float] | None = None) -> float:
    """The language model's head, and the projections of an adaptive embedding; shares as in `scored_pieces`."""
    narrow = [width for _, width in c.vocabulary_pieces if width < c.d_model]
    projected = 2 * sum(
        c.d_model * width for width in narrow
    )  # into the embedding, and for the head
    return score_flops(c, length, shares) + 2 * length * projected


def ends_flops(c: ModelConfig, length: int) -> float:
    """What is before and after the blocks: the language model's vocabulary, or the classifier's stem and head."""
    if c.task == "language":
        return vocabulary_flops(c, length)
    head = c.classifier
    classes = 2 * (c.d_pooled * head.d_head + (head.d_head or c.d_pooled) * head.n_classes)
    stem = 2 * c.image.n_tokens * c.image.values * c.d_model if c.stem == "image" else 0
    return classes + c.rows_per_example * stem


def forward_flops(c: ModelConfig, length: int | None = None, training: bool = False) -> float:
    """Forward pass of the whole model over one row (example) of `length` tokens, by default as many as blocks see.

    training: `sequence_capacity_factor` bounds the rows of an expert, which it never does in evaluation.
    """
    length = length or c.block_length
    per_layer = attention_flops(c, length, training) + mlp_flops(c, length, training)
    return c.rows_per_example * c.n_layers * per_layer + ends_flops(c, length)


def forward_flops_per_token(c: ModelConfig) -> float:
    """`forward_flops` of an example over the tokens of its inputs."""
    return forward_flops(c) / c.rows_per_example / c.context_length


def train_flops(c: ModelConfig, rows: int, length: int | None = None) -> float:
    """One optimizer step over `rows` rows: forward and a backward of twice that; recomputation is not counted.

    length: tokens of a row as blocks see them, where batches are padded to less than the context (data.buckets).
    """
    return 3 * rows * forward_flops(c, length, training=True)

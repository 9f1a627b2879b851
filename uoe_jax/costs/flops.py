"""Floating-point operations of the model, as the compiled program executes them.

Counted from the configuration; a multiply-add counts 2. Attention is counted in whole tiles
(`layers.tiles`), routed blocks by their slots, filled or not. Elementwise work and dispatch are
left out, though with routing.dispatch='onehot' the latter is a product too.
"""

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
Shares = Sequence[float] | None  # of tokens in each tail of an adaptive softmax


def routing_flops(r: RoutingConfig, d_model: int, length: int) -> float:
    """The routers of one block over one row."""
    routed = (r.unit != "sequence") * r.patches(length) + (r.unit != "patch")
    return 2 * routed * d_model * r.n_experts


def _slot_tokens(r: RoutingConfig, length: int, training: bool) -> tuple[float, float]:
    """Tokens of a row that an expert (works on, projects)."""
    s = r.slot_tokens(length) * (r.row_share() if training else 1)
    return s, s if r.order == "gather" else r.patches(length) * r.patch_size


def attention_flops(c: ModelConfig, length: int, training: bool = False) -> float:
    """Forward pass of one attention block over one row of `length` tokens."""
    if c.attention not in ON_SLOTS:
        return ATTENTIONS[c.attention](c, length).flops
    r, h, g = c.routed()[c.attention], c.n_heads, c.kv_heads
    s, projected = _slot_tokens(r, length, training)
    products = 2 * projected * (h + 2 * g) + 2 * s * h
    routing = routing_flops(r, c.d_model, length)
    return routing + products * c.d_model * c.head_dim + core_flops(c, length, training)


def core_flops(c: ModelConfig, length: int, training: bool = False) -> float:
    """Of these, the scores and the weighted sums: what a flash attention kernel does."""
    if c.attention not in ON_SLOTS:
        return ATTENTIONS[c.attention](c, length).core
    r = c.routed()[c.attention]
    scores = computed_scores(r.slot_tokens(length), c.causal)
    return (r.row_share() if training else 1) * 4 * c.n_heads * c.head_dim * scores


def mlp_flops(c: ModelConfig, length: int, training: bool = False) -> float:
    """Forward pass of one MLP block over one row of `length` tokens."""
    r = c.routed().get(c.mlp)
    whole = 2 * (c.n_into + 1) * length * c.d_model * c.whole_hidden
    if r is None:
        return whole
    s, projected = _slot_tokens(r, length, training)
    experts = 2 * (c.n_into * projected + s) * c.d_model * c.routed_hidden
    return routing_flops(r, c.d_model, length) + experts + whole


def tail_shares(c: ModelConfig) -> tuple[float, ...]:
    """The share of tokens in each tail of an adaptive softmax, by Zipf's law: rank r ~ 1/r."""
    edges = (*c.cutoff_list, c.vocab_size)
    up_to = [math.log(n + 0.5) + 0.57722 for n in edges]  # the harmonic number of n
    return tuple((end - start) / up_to[-1] for start, end in zip(up_to, up_to[1:]))


def scored_pieces(c: ModelConfig, shares: Shares = None) -> list[tuple[float, int, int]]:
    """(share of tokens it is scored for, scores of such a token, width) of every vocabulary piece.

    shares: of an adaptive softmax's tails; None: `tail_shares`, of the tokens whose target is in
    them, as in losses. Log-probabilities of all entries score every tail for every token.
    """
    (first, width), *tails = c.vocabulary_pieces
    shares = tail_shares(c) if shares is None else shares
    return [(1, first + len(tails), width), *((share, *tail) for share, tail in zip(shares, tails))]


def score_flops(c: ModelConfig, length: int, shares: Shares = None) -> float:
    """The vocabulary's scores over one row; shares as in `scored_pieces`."""
    pieces = scored_pieces(c, shares)
    return 2 * length * sum(share * scores * width for share, scores, width in pieces)


def vocabulary_flops(c: ModelConfig, length: int, shares: Shares = None) -> float:
    """The language model's head, and the projections of an adaptive embedding and head."""
    narrow = sum(c.d_model * width for _, width in c.vocabulary_pieces if width < c.d_model)
    return score_flops(c, length, shares) + 2 * length * 2 * narrow


def ends_flops(c: ModelConfig, length: int) -> float:
    """What is before and after the layers: the vocabulary, or the classifier's stem and head."""
    if c.task == "language":
        return vocabulary_flops(c, length)
    head = c.classifier
    classes = 2 * (c.d_pooled * head.d_head + (head.d_head or c.d_pooled) * head.n_classes)
    stem = 2 * c.image.n_tokens * c.image.values * c.d_model if c.stem == "image" else 0
    return classes + c.rows_per_example * stem


def forward_flops(c: ModelConfig, length: int | None = None, training: bool = False) -> float:
    """Forward pass over one example of `length` tokens, by default the context.

    training: `sequence_capacity_factor` bounds an expert's rows.
    """
    length = length or c.block_length
    per_layer = attention_flops(c, length, training) + mlp_flops(c, length, training)
    return c.rows_per_example * c.n_layers * per_layer + ends_flops(c, length)


def forward_flops_per_token(c: ModelConfig) -> float:
    """`forward_flops` of an example over the tokens of its inputs."""
    return forward_flops(c) / c.rows_per_example / c.context_length


def train_flops(c: ModelConfig, rows: int, length: int | None = None) -> float:
    """One optimizer step over `rows` examples: the backward pass is twice the forward, no remat.

    length: of rows that are padded to less than the context (data.buckets).
    """
    return 3 * rows * forward_flops(c, length, training=True)

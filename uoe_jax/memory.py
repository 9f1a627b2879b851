"""Bytes of the model, counted from its configuration: weights, what a layer keeps for the backward pass, decoding caches.

The counts are of one device that holds everything. Working memory inside a layer is not counted.
"""

from __future__ import annotations

from uoe_jax.config import ModelConfig, RoutingConfig

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def router_parameters(r: RoutingConfig, d_model: int) -> int:
    """Weights of the routers of one block, the balancing bias among them."""
    routers = (r.unit != "sequence") + (r.unit != "patch")
    return r.n_experts * (routers * (d_model + r.router_bias) + (r.bias_rate > 0))


def layer_parameters(c: ModelConfig) -> int:
    """Weights of one layer: attention, MLP, routers and the two norms."""
    d, h, g, dh, f = c.d_model, c.n_heads, c.kv_heads, c.head_dim, c.d_hidden
    attention = d * dh * (2 * h + 2 * g) + 2 * dh * c.qk_norm
    mlp = (c.n_into + 1) * d * f
    routers = sum(router_parameters(r, d) for r in c.routed().values())
    return attention + mlp + sum(bias_parameters(c)) + routers + 2 * norm_parameters(c)


def bias_parameters(c: ModelConfig) -> tuple[int, int]:
    """Biases of one layer: (into the heads and the hidden units, out of them)."""
    return (c.head_dim * (c.n_heads + 2 * c.kv_heads) + c.n_into * c.d_hidden, 2 * c.d_model) if c.bias else (0, 0)


def norm_parameters(c: ModelConfig) -> int:
    return c.d_model * (2 if c.norm == "layernorm" else 1)


def vocabulary_parameters(c: ModelConfig) -> int:
    """The vectors of all words, and the projections of those that are narrower than D."""
    return sum(size * width + (c.d_model * width if width < c.d_model else 0) for size, width in c.vocabulary_pieces)


def parameters(c: ModelConfig) -> int:
    """All weights of the model; `vocab_size` must be set where it reads tokens."""
    total = c.n_layers * layer_parameters(c) + norm_parameters(c)
    total += c.block_length * c.d_model if c.position == "learned" else 0
    return total + ends_parameters(c) + classifier_parameters(c)


def ends_parameters(c: ModelConfig) -> int:
    """Of all words, to read them and to predict them; with an adaptive softmax also the vectors of its tails."""
    reads, predicts = c.stem == "tokens", c.task == "language" and not c.tie_embeddings
    return (reads + predicts) * vocabulary_parameters(c) + len(c.cutoff_list) * c.d_model


def classifier_parameters(c: ModelConfig) -> int:
    """What only a classifier has: the projection of images, the token in front, the head."""
    if c.task == "language":
        return 0
    d, head = c.d_model, c.classifier
    total = (c.image.values + 1) * d if c.stem == "image" else 0
    total += d if head.pooling == "cls" else 0
    total += (c.d_pooled + 1) * head.d_head
    return total + ((head.d_head or c.d_pooled) + 1) * head.n_classes


def kept_bytes(c: ModelConfig, rows: int, parts: int = 1, stream_parts: int = 1) -> int:
    """What one layer keeps of `rows` rows from the forward to the backward pass, with remat='slots' or 'block'.

    'block' keeps the layer's input. 'slots' keeps as well the state between attention and MLP, and of each block the
    projections at the slots, the heads' outputs and the selection; gathered slots and attention scores are made again.

    Args:
      parts: devices over which the experts are spread (heads and hidden units, in a dense block).
      stream_parts: devices over which the activations between blocks are spread.

    Raises:
      ValueError: another remat policy, whose choice is the compiler's.
    """
    if c.remat not in ("slots", "block"):
        raise ValueError(f"remat={c.remat!r}: only 'slots' and 'block' name what is kept")
    length = c.block_length
    rows *= c.rows_per_example
    item, stream = ITEM_SIZE[c.dtype], ITEM_SIZE[c.dtype] * rows * length * c.d_model // stream_parts
    if c.remat == "block":
        return stream
    heads = c.head_dim * (2 * c.n_heads + 2 * c.kv_heads)  # q, k, v and the output of the heads
    kept = 2 * stream
    for routing, width in ((c.routed().get("smha"), heads), (c.routed().get("uome"), c.n_into * c.d_hidden)):
        at = length if routing is None else routing.slot_tokens(length) * routing.row_share()
        kept += int(item * rows * at * width) // parts
        kept += 0 if routing is None else selection_bytes(routing, rows, length) // parts
    return kept


def selection_bytes(r: RoutingConfig, rows: int, length: int) -> int:
    """The selection of one block: patch, validity and weight of every slot, and the slot of every patch.

    Bounded sequences need as well which row holds which.
    """
    m, held = r.patches(length), int(rows * r.row_share())
    bounded = r.sequence_capacity_factor > 0
    return r.n_experts * (9 * held * r.slots(m) + 4 * rows * m + bounded * 4 * (held + rows))


def cache_bytes(c: ModelConfig, rows: int, dense: bool = False) -> int:
    """Keys and values of a decoding cache for `context_length` tokens; dense: of a model with dense attention."""
    routed = c.attention == "smha" and not dense
    tokens = c.smha.slot_tokens(c.context_length) if routed else c.context_length
    return 2 * c.n_layers * rows * tokens * c.kv_heads * c.head_dim * ITEM_SIZE[c.dtype]

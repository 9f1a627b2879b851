"""Bytes of the model, counted from its configuration: weights, what a layer keeps for the backward pass, decoding caches.

The counts are of one device that holds everything. Working memory inside a layer is not counted.
"""

from __future__ import annotations

from uoe_jax.config.schema import ModelConfig, RoutingConfig
from uoe_jax.costs.baselines import ATTENTIONS, Cost
from uoe_jax.costs.flops import ON_SLOTS

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def router_parameters(r: RoutingConfig, d_model: int) -> int:
    """Weights of the routers of one block, the balancing bias among them."""
    routers = (r.unit != "sequence") + (r.unit != "patch")
    return r.n_experts * (routers * (d_model + r.router_bias) + (r.bias_rate > 0))


def layer_parameters(c: ModelConfig) -> int:
    """Weights of one layer: attention, MLP, routers and the two norms."""
    with_biases = c.routed_hidden if c.routed_hidden else c.whole_hidden  # shared experts have none
    mlp = (c.n_into + 1) * c.d_model * c.all_hidden + c.bias * (c.n_into * with_biases + c.d_model)
    routers = sum(
        router_parameters(r, c.d_model) for name, r in c.routed().items() if name != "moh"
    )
    adaptive = c.mlp == "skywork_moe" and c.moe.adaptive_rate > 0
    return _attention(c).parameters + mlp + routers + adaptive + 2 * norm_parameters(c)


def _attention(c: ModelConfig) -> Cost:
    """Its weights without routers (with MoH's, which are its own); what experts hold is what a dense block holds."""
    return ATTENTIONS.get(c.attention, ATTENTIONS["dense"])(c, c.block_length)


def bias_parameters(c: ModelConfig) -> tuple[int, int]:
    """Biases of one layer of dense blocks or unions: (into the heads and the hidden units, out of them)."""
    heads = c.head_dim * (c.n_heads + 2 * c.kv_heads)
    return (heads + c.n_into * c.d_hidden, 2 * c.d_model) if c.bias else (heads * c.qkv_bias, 0)


def active_parameters(c: ModelConfig) -> float:
    """Of `parameters`, those a token meets on average: of N experts the K that it chose, or as many as have a slot for it where
    those are fewer; under expert choice as many as have a slot. Words, and the biases of experts, all count."""
    idle = 0.0
    for name, r in c.routed().items():
        # All experts may take a token under expert choice. (XMoE: K are expected.)
        k = r.n_experts if name == "expert_choice" else r.k
        slots = r.slot_tokens(c.block_length) / c.block_length
        share = (
            min(k / r.n_experts, slots) if r.unit == "patch" else k / r.n_experts * min(1, slots)
        )
        if name in ON_SLOTS:
            idle += (1 - share) * c.d_model * c.head_dim * (2 * c.n_heads + 2 * c.kv_heads)
        elif name != "moh":
            idle += (1 - share) * (c.n_into + 1) * c.d_model * c.routed_hidden
    attention = _attention(c)
    return parameters(c) - c.n_layers * (idle + attention.parameters - attention.active)


def norm_parameters(c: ModelConfig) -> int:
    return c.d_model * (2 if c.norm == "layernorm" else 1)


def vocabulary_parameters(c: ModelConfig) -> int:
    """The vectors of all words, and the projections of those that are narrower than D."""
    return sum(
        size * width + (c.d_model * width if width < c.d_model else 0)
        for size, width in c.vocabulary_pieces
    )


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
    projections at the slots, the heads' outputs and the selection with the logits it was made from; gathered slots and attention scores are made again.

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
    item, stream = (
        ITEM_SIZE[c.dtype],
        ITEM_SIZE[c.dtype] * rows * length * c.d_model // stream_parts,
    )
    if c.remat == "block":
        return stream
    kept = 2 * stream
    if c.attention in ON_SLOTS:
        # q, k, v and the output of the heads, and the logarithm of each query's sum, float32.
        heads = c.head_dim * (2 * c.n_heads + 2 * c.kv_heads) + 4 / item * c.n_heads
        kept += _kept_at_slots(c, c.routed()[c.attention], rows, heads, parts)
    else:
        kept += int(rows * (item * _attention(c).kept + 4 * _attention(c).sums)) // parts
    if c.routed_hidden:
        kept += _kept_at_slots(c, c.routed()[c.mlp], rows, c.n_into * c.routed_hidden, parts)
    kept += item * rows * length * c.n_into * c.whole_hidden // parts
    return kept


def _kept_at_slots(c: ModelConfig, r: RoutingConfig, rows: int, width: float, parts: int) -> int:
    """Values of `width` at the slots of `rows` rows, the selection, and the logits it was made from."""
    at = r.slot_tokens(c.block_length) * r.row_share()
    logits = (
        4 * r.n_experts * rows * r.patches(c.block_length) if r.unit != "sequence" else 0
    )  # every part has those of all experts
    return (
        int(ITEM_SIZE[c.dtype] * rows * at * width) // parts
        + selection_bytes(r, rows, c.block_length) // parts
        + logits
    )


def selection_bytes(r: RoutingConfig, rows: int, length: int) -> int:
    """The selection of one block: patch, validity and weight of every slot, and the slot of every patch.

    Bounded sequences need as well which row holds which.
    """
    m, held = r.patches(length), int(rows * r.row_share())
    bounded = r.sequence_capacity_factor > 0
    return r.n_experts * (9 * held * r.slots(m) + 4 * rows * m + bounded * 4 * (held + rows))


def cache_bytes(c: ModelConfig, rows: int, dense: bool = False) -> int:
    """What a decoding cache keeps of the tokens before, for `context_length` tokens; dense: of a model with dense attention."""
    if c.attention == "mla" and not dense:
        return (
            c.n_layers
            * rows
            * c.context_length
            * (c.mla.kv_rank + c.rotary_dim)
            * ITEM_SIZE[c.dtype]
        )
    routed = c.attention == "smha" and not dense
    tokens = c.smha.slot_tokens(c.context_length) if routed else c.context_length
    return 2 * c.n_layers * rows * tokens * c.kv_heads * c.head_dim * ITEM_SIZE[c.dtype]

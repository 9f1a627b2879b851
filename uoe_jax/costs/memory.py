"""Bytes saved for the backward pass and of decoding caches; parameters a token leaves idle.

Counted from the configuration, for one device that holds everything, without a layer's working
memory. `models.count` counts parameters.
"""

from uoe_jax.config.schema import ModelConfig, RoutingConfig
from uoe_jax.costs.baselines import ATTENTIONS
from uoe_jax.costs.flops import ON_SLOTS

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


def idle_parameters(c: ModelConfig) -> float:
    """Parameters of the model that a token does not use on average.

    Of N experts a token uses the K it chose, or as many as have a slot for it if those are fewer
    (or under expert choice). Vectors of the vocabulary and biases of experts count as used.
    """
    idle = ATTENTIONS[c.attention](c, c.block_length).idle if c.attention in ATTENTIONS else 0.0
    for name, r in c.routed().items():
        # All experts may take a token under expert choice. (XMoE: K are expected.)
        chosen = 1.0 if name == "expert_choice" else r.k / r.n_experts
        slots = r.slot_tokens(c.block_length) / c.block_length
        share = min(chosen, slots) if r.unit == "patch" else chosen * min(1, slots)
        if name in ON_SLOTS:
            idle += (1 - share) * c.d_model * c.head_dim * (2 * c.n_heads + 2 * c.kv_heads)
        elif name != "moh":
            idle += (1 - share) * (c.n_into + 1) * c.d_model * c.routed_hidden
    return c.n_layers * idle


def kept_bytes(c: ModelConfig, rows: int, parts: int = 1, stream_parts: int = 1) -> int:
    """Bytes one layer saves of `rows` examples for the backward pass.

    remat='block' saves the layer's input; 'slots' also the state between attention and MLP, and of
    each block the projections at the slots, the heads' outputs, the selection and its logits.
    `parts` devices share the experts (in a dense block, heads and hidden units), `stream_parts` the
    activations between blocks.

    Raises:
      ValueError: another remat policy, whose choice is the compiler's.
    """
    if c.remat not in ("slots", "block"):
        raise ValueError(f"remat={c.remat!r}: only 'slots' and 'block' name what is kept")
    length, item = c.block_length, ITEM_SIZE[c.dtype]
    rows *= c.rows_per_example
    stream = item * rows * length * c.d_model // stream_parts
    if c.remat == "block":
        return stream
    kept = 2 * stream
    if c.attention in ON_SLOTS:
        # q, k, v and the heads' outputs, and each query's log-sum-exp, float32.
        heads = c.head_dim * (2 * c.n_heads + 2 * c.kv_heads) + 4 / item * c.n_heads
        kept += _kept_at_slots(c, c.routed()[c.attention], rows, heads, parts)
    else:
        cost = ATTENTIONS[c.attention](c, length)
        kept += int(rows * (item * cost.kept + 4 * cost.sums)) // parts
    if c.routed_hidden:
        kept += _kept_at_slots(c, c.routed()[c.mlp], rows, c.n_into * c.routed_hidden, parts)
    return kept + item * rows * length * c.n_into * c.whole_hidden // parts


def _kept_at_slots(c: ModelConfig, r: RoutingConfig, rows: int, width: float, parts: int) -> int:
    """Bytes of `width` values at the slots of `rows` rows, the selection, and its logits."""
    m, held = r.patches(c.block_length), int(rows * r.row_share())
    at_slots = r.slot_tokens(c.block_length) * r.row_share()
    kept = int(ITEM_SIZE[c.dtype] * rows * at_slots * width) // parts
    # Patch, validity and weight of every slot, each patch's slot; which buffer row holds which row.
    bounded = r.sequence_capacity_factor > 0
    selection = 9 * held * r.slots(m) + 4 * rows * m + bounded * 4 * (held + rows)
    kept += r.n_experts * selection // parts
    # Every device has the logits of all experts.
    return kept + (4 * r.n_experts * rows * m if r.unit != "sequence" else 0)


def cache_bytes(c: ModelConfig, rows: int, dense: bool = False) -> int:
    """The KV cache for `context_length` tokens of `rows` rows; dense: of dense attention."""
    tokens, width = c.context_length, 2 * c.kv_heads * c.head_dim
    if c.attention == "smha" and not dense:
        tokens = c.smha.slot_tokens(tokens)
    if c.attention == "mla" and not dense:
        width = c.mla.kv_rank + c.rotary_dim
    return c.n_layers * rows * tokens * width * ITEM_SIZE[c.dtype]

"""Attention by cuDNN, on NVIDIA GPUs in 16 bits: `jax.nn.dot_product_attention`, and its packed form for rows of documents.

RemoteProcessError by a mask which tokens share a document, cuDNN computes every score and reads a number for each; told where documents
begin and end, it computes those within a document alone (docs/performance.md has both measured). That form is not in JAX's
public interface yet: where it is missing, and for rows of more documents than it is compiled for, the mask is used. Rows of
one document each, as of long texts, need neither.

Letters: B rows, S tokens, r documents of a row.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Callable, Literal

import jax
import jax.extend
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.layers.common import mask_empty_segments

MOST = 16  # documents of a row that the packed form is compiled for
Kernel = Literal["cudnn", "xla"]


def fits_cudnn(q: jax.Array, v: jax.Array, drop_rate: float) -> bool:
    """Whether cuDNN's fused attention takes these: 16 bits, heads of at most 128 numbers, alike for keys and values."""
    dh, even = q.shape[-1], q.shape[1] % 2 == 0
    sizes = dh == v.shape[-1] and dh % 8 == 0 and dh <= 128 and even
    return q.dtype.itemsize == 2 and sizes and not drop_rate and _on_nvidia()


@functools.cache
def _on_nvidia() -> bool:
    return (
        jax.default_backend() == "gpu"
        and "cuda" in jax.extend.backend.get_backend().platform_version.lower()
    )


@functools.cache
def _packed_form(grouped: bool) -> Any:
    """The module of JAX that has the packed form, which needs Hopper GPUs or newer; None: neither here.

    grouped: several queries share a key head. Before 0.11.1 JAX told cuDNN where keys begin as if they did not, so that
    others' keys were read (jax-ml/jax #39521).
    """
    if grouped and jax.__version_info__ < (0, 11, 1):
        return None
    if not _on_nvidia() or float(jax.devices()[0].compute_capability) < 9:
        return None
    try:
        found = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        return found if found.MaskType.PADDING_CAUSAL and found.dot_product_attention else None
    except (ImportError, AttributeError):  # it is not public, and may move
        return None


def fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    causal: bool,
    lengths: jax.Array | None,
    kernel: Kernel,
) -> jax.Array:
    """`attention.attend` by `jax.nn.dot_product_attention` ("cudnn", or "xla" to try the same on any device)."""
    if segments is None:
        o = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            query_seq_lengths=lengths,
            key_value_seq_lengths=lengths,
            implementation=kernel,
        )
    else:
        o = _of_documents(
            q, k, v, mask_empty_segments(segments, lengths, q.shape[1]), causal, kernel
        )
    return checkpoint_name(o, "heads")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _of_documents(
    q: jax.Array, k: jax.Array, v: jax.Array, segments_BS: jax.Array, causal: bool, kernel: Kernel
) -> jax.Array:
    return _packed_or_masked(lambda f: f(q, k, v), q.shape != k.shape, segments_BS, causal, kernel)


def _forward(q, k, v, segments_BS, causal, kernel):
    return _of_documents(q, k, v, segments_BS, causal, kernel), (q, k, v, segments_BS)


def _backward(causal, kernel, kept, d_o):
    # The choice stands around the whole of it: what either form keeps for its gradient never leaves a branch.
    *qkv, segments_BS = kept
    grouped = qkv[0].shape != qkv[1].shape
    return *_packed_or_masked(
        lambda f: jax.vjp(f, *qkv)[1](d_o), grouped, segments_BS, causal, kernel
    ), None


_of_documents.defvjp(_forward, _backward)


def _packed_or_masked(
    use: Callable[[Callable[..., jax.Array]], Any],
    grouped: bool,
    segments_BS: jax.Array,
    causal: bool,
    kernel: Kernel,
) -> Any:
    """What `use` makes of the attention of q, k, v by the form that the rows allow."""

    def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=causal, implementation=kernel
        )

    def masked(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return plain(q, k, v, (segments_BS[:, :, None] == segments_BS[:, None, :])[:, None])

    form = _packed_form(grouped)
    if form is None or kernel != "cudnn":
        return use(masked)
    firsts, lengths, most = runs(segments_BS, MOST)

    def packed(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return form.dot_product_attention(
            q, k, v, q_seqlen=lengths, kv_seqlen=lengths, q_offsets=firsts, kv_offsets=firsts, scale=q.shape[-1] ** -0.5,
            mask_type=form.MaskType.PADDING_CAUSAL if causal else form.MaskType.PADDING,
        )  # fmt: skip

    which = (most > 1).astype(jnp.int32) + (most > MOST).astype(jnp.int32)
    return jax.lax.switch(which, [lambda: use(plain), lambda: use(packed), lambda: use(masked)])


def runs(segments_BS: jax.Array, n: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the documents of each row are, which stand in one piece each.

    Returns:
      (int32 [B,n+1] the first token of each run of equal numbers, int32 [B,n] their lengths, both -1 behind the last run of
      a row; int32, the most runs of a row). Where they are more than n, only that is of use.
    """
    b, s = segments_BS.shape
    begins_BS = jnp.concatenate(
        [jnp.ones((b, 1), bool), segments_BS[:, 1:] != segments_BS[:, :-1]], axis=1
    )
    run_BS = jnp.cumsum(begins_BS, axis=1, dtype=jnp.int32) - 1
    each_r = jnp.arange(n, dtype=jnp.int32)
    length_Br = (run_BS[..., None] == each_r[None, None]).sum(axis=1, dtype=jnp.int32)
    there_Br = each_r[None] <= run_BS[:, -1:]
    first_Br = jnp.where(there_Br, jnp.cumsum(length_Br, axis=1, dtype=jnp.int32) - length_Br, -1)
    return (
        jnp.pad(first_Br, ((0, 0), (0, 1)), constant_values=-1),
        jnp.where(there_Br, length_Br, -1),
        run_BS[:, -1].max() + 1,
    )

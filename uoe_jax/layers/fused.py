"""cuDNN attention on NVIDIA GPUs in 16 bits: `jax.nn.dot_product_attention` and its packed form.

Given where packed documents begin and end, cuDNN computes the scores within them alone; given a
mask, all (docs/appendix). That packed form is not public in JAX yet: where it is missing, and for
rows of more documents than it is compiled for, the mask is used. Rows of one document need neither.
"""

import functools
import importlib
from typing import Any, Callable, Literal

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from uoe_jax.layers.common import mask_empty_segments

MOST = 16  # documents of a row that the packed form is compiled for
Kernel = Literal["cudnn", "xla"]


def fits_cudnn(q: Array, v: Array, drop_rate: float) -> bool:
    """Whether cuDNN's kernel takes the shapes: on an NVIDIA GPU in 16 bits without dropout."""
    dh, even = q.shape[-1], q.shape[1] % 2 == 0
    sizes = dh == v.shape[-1] and dh % 8 == 0 and dh <= 128 and even
    return q.dtype.itemsize == 2 and sizes and not drop_rate and _on_nvidia()


@functools.cache
def _on_nvidia() -> bool:
    if jax.default_backend() != "gpu":
        return False
    return "cuda" in jax.extend.backend.get_backend().platform_version.lower()


@functools.cache
def _packed_form(grouped: bool) -> Any:
    """JAX's module with the packed form, which needs Hopper GPUs or newer; None: neither here."""
    # grouped: several queries share a key head. Before 0.11.1 JAX gave cuDNN the key offsets of
    # ungrouped heads, so that keys of other heads were read (jax-ml/jax #39521).
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
    q: Array,
    k: Array,
    v: Array,
    segments: Array | None,
    causal: bool,
    lengths: Array | None,
    kernel: Kernel,
) -> Array:
    """`attention.attend` by `jax.nn.dot_product_attention`; kernel "xla" runs on any device."""
    if segments is None:
        attention = functools.partial(jax.nn.dot_product_attention, implementation=kernel)
        sizes = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths)
        o = attention(q, k, v, is_causal=causal, **sizes)
    else:
        segments = mask_empty_segments(segments, lengths, q.shape[1])
        o = _of_documents(q, k, v, segments, causal, kernel)
    return checkpoint_name(o, "heads")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _of_documents(q, k, v, segments, causal, kernel):
    return _packed_or_masked(lambda f: f(q, k, v), q.shape != k.shape, segments, causal, kernel)


def _forward(q, k, v, segments, causal, kernel):
    return _of_documents(q, k, v, segments, causal, kernel), (q, k, v, segments)


def _backward(causal, kernel, kept, d_o):
    # The switch is around the whole vjp: residuals of either form cannot leave a branch.
    q, k, v, segments = kept
    pull_back = lambda f: jax.vjp(f, q, k, v)[1](d_o)  # noqa: E731
    return *_packed_or_masked(pull_back, q.shape != k.shape, segments, causal, kernel), None


_of_documents.defvjp(_forward, _backward)


def _packed_or_masked(
    use: Callable[..., Any], grouped: bool, segments: Array, causal: bool, kernel: Kernel
) -> Any:
    """`use` of the attention of q, k, v in the fastest form that the rows allow."""
    plain = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=kernel)

    def masked(q: Array, k: Array, v: Array) -> Array:
        return plain(q, k, v, mask=(segments[:, :, None] == segments[:, None, :])[:, None])

    form = _packed_form(grouped)
    if form is None or kernel != "cudnn":
        return use(masked)
    firsts, lengths, most = runs(segments, MOST)
    kind = form.MaskType.PADDING_CAUSAL if causal else form.MaskType.PADDING
    sizes = dict(q_seqlen=lengths, kv_seqlen=lengths, q_offsets=firsts, kv_offsets=firsts)

    def packed(q: Array, k: Array, v: Array) -> Array:
        scale = q.shape[-1] ** -0.5
        return form.dot_product_attention(q, k, v, scale=scale, mask_type=kind, **sizes)

    which = (most > 1).astype(jnp.int32) + (most > MOST).astype(jnp.int32)
    return jax.lax.switch(which, [lambda: use(plain), lambda: use(packed), lambda: use(masked)])


def runs(segments: Array, n: int) -> tuple[Array, Array, Array]:
    """Where the runs of equal numbers (documents) of each row of `segments` [B,S] are.

    (int32 [B,n+1] the first token of each run, int32 [B,n] its length, both -1 behind a row's last
    run; int32, the most runs of a row). With more than n runs only the last is valid.
    """
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    run = jnp.cumsum(begins, axis=1, dtype=jnp.int32) - 1
    each = jnp.arange(n, dtype=jnp.int32)
    length = (run[..., None] == each[None, None]).sum(axis=1, dtype=jnp.int32)
    exists = each[None] <= run[:, -1:]
    first = jnp.where(exists, jnp.cumsum(length, axis=1, dtype=jnp.int32) - length, -1)
    first = jnp.pad(first, ((0, 0), (0, 1)), constant_values=-1)
    return first, jnp.where(exists, length, -1), run[:, -1].max() + 1

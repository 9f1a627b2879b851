"""How tensors and config.json of a family in Hugging Face's layout correspond to ours; no jax.

Letters as in `layers.common`. Our leaves are those of the dense model (`decompose.dense_config`),
one layer of them where a name has `{i}`.
"""

import math
from typing import Any, Callable, Iterator, Mapping, NamedTuple

import numpy as np

from uoe_jax.config.schema import ModelConfig
from uoe_jax.exchange.config_keys import Keys

Values = dict[str, Any]


class Form(NamedTuple):
    """A lossless reshape or transpose between the two layouts.

    into: (theirs, our shape) -> ours. back: ours -> theirs.
    """

    into: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


def _reshaped(t: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return t.reshape(shape)


SAME = Form(_reshaped, lambda a: a)
FLAT = Form(_reshaped, lambda a: a.reshape(-1))


def kernel(n_in: int = 1) -> Form:
    """GPT-2's Conv1D [in,out]; the first `n_in` axes of ours are the input's."""
    return Form(_reshaped, lambda a: a.reshape(math.prod(a.shape[:n_in]), -1))


def linear(n_in: int = 1) -> Form:
    """A torch Linear [out,in]; the first `n_in` axes of ours are the input's."""
    return Form(lambda t, shape: t.T.reshape(shape), lambda a: kernel(n_in).back(a).T)


def under(n: int) -> Form:
    """Ours below `n` axes of size 1."""
    return Form(_reshaped, lambda a: a.reshape((1,) * n + a.shape))


def pixels(patch: int, channels: int) -> Form:
    """A convolution [D,channels,patch,patch] as a projection [patch·patch·channels,D] of pixels."""
    return Form(
        lambda t, shape: t.transpose(2, 3, 1, 0).reshape(shape),
        lambda a: a.reshape(patch, patch, channels, -1).transpose(3, 2, 0, 1),
    )


class Entry(NamedTuple):
    """One tensor of theirs and our leaves in it; several are joined along its last axis."""

    theirs: str
    ours: tuple[str, ...]
    form: Form


def entry(theirs: str, ours: str, form: Form = SAME) -> Entry:
    return Entry(theirs, (ours,), form)


def affine(theirs: str, form: Form, weight: str, bias: str) -> Iterator[Entry]:
    """A projection with a bias."""
    yield entry(theirs + ".weight", weight, form)
    yield entry(theirs + ".bias", bias, FLAT)


def layer_norm(theirs: str, ours: str) -> Iterator[Entry]:
    return affine(theirs, SAME, ours + ".scale", ours + ".bias")


def into_ours(entry: Entry, theirs: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """Our leaves in a tensor of theirs."""
    lead = math.prod(theirs.shape[:-1])
    widths = [math.prod(shape) // lead for shape in shapes]
    parts = [theirs] if len(shapes) == 1 else np.split(theirs, np.cumsum(widths)[:-1], axis=-1)
    return [entry.form.into(part, shape) for part, shape in zip(parts, shapes)]


def into_theirs(entry: Entry, ours: list[np.ndarray]) -> np.ndarray:
    """The inverse of `into_ours`."""
    parts = [entry.form.back(a) for a in ours]
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def their_shape(entry: Entry, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Of the tensor that holds leaves of these shapes; nothing is allocated."""

    def empty(shape: tuple[int, ...]) -> np.ndarray:
        return np.lib.stride_tricks.as_strided(np.zeros(1, np.bool_), shape, (0,) * len(shape))

    parts = [entry.form.back(empty(shape)).shape for shape in shapes]
    return (*parts[0][:-1], sum(part[-1] for part in parts))


class Family(NamedTuple):
    """One layout.

    Attributes:
      kind: its name in errors.
      model: config.json -> our `model` section. config: the inverse.
      entries: all tensors.
      needs: the keys of `model` that a model of it has, for errors.
      prefix: of names, which old files leave out.
    """

    kind: str
    model: Callable[[Keys], Values]
    config: Callable[[ModelConfig], Values]
    entries: Callable[[ModelConfig], Iterator[Entry]]
    needs: str
    prefix: str = ""


ALIASES = {  # other names of keys in published files
    "n_embd": ("hidden_size",),
    "n_head": ("num_attention_heads",),
    "n_layer": ("num_hidden_layers",),
    "n_positions": ("max_position_embeddings", "n_ctx"),
}


def read_sizes(keys: Keys, names: Mapping[str, str]) -> Values:
    """{our key: size}. names: {their key: our key}."""
    return {ours: keys.whole(name, also=ALIASES.get(name, ())) for name, ours in names.items()}


def write_sizes(m: ModelConfig, names: Mapping[str, str]) -> Values:
    """The inverse of `read_sizes`."""
    return {theirs: getattr(m, ours) for theirs, ours in names.items()}


PLAIN = {
    "gelu": "gelu",
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh"),
    "relu": "relu",
}
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


def activation_name(names: Mapping[str, str], ours: str) -> str:
    """The first of their names for an activation; ours, which is not read back, without one."""
    return next((theirs for theirs, own in names.items() if own == ours), ours)

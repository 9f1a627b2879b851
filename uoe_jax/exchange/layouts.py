"""How tensors and config.json of a family in Hugging Face's layout correspond to ours; no jax.

Letters as in `layers.common`. Our leaves are those of the dense model (`decompose.dense_config`),
one layer of them where a name has `{i}`.
"""

import math
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

import numpy as np

from uoe_jax.config.schema import ModelConfig

Values = dict[str, Any]
Shape = tuple[int, ...]


class Form(NamedTuple):
    """A lossless reshape of our array, and transpose, into theirs."""

    reshaped: Callable[[Shape], Shape]
    axes: tuple[int, ...] | None = None  # of the transpose; None: without

    def into(self, theirs: np.ndarray, shape: Shape) -> np.ndarray:
        """Ours, of this shape."""
        theirs = theirs if self.axes is None else theirs.transpose(np.argsort(self.axes))
        return theirs.reshape(shape)

    def back(self, ours: np.ndarray) -> np.ndarray:
        a = ours.reshape(self.reshaped(ours.shape))
        return a if self.axes is None else a.transpose(self.axes)

    def shape(self, ours: Shape) -> Shape:
        """Theirs, of ours; nothing is allocated."""
        return self.back(np.broadcast_to(np.False_, ours)).shape


SAME = Form(lambda shape: shape)
FLAT = Form(lambda shape: (math.prod(shape),))


def kernel(n_in: int = 1) -> Form:
    """GPT-2's Conv1D [in,out]; the first `n_in` axes of ours are the input's."""
    return Form(lambda shape: (math.prod(shape[:n_in]), math.prod(shape[n_in:])))


def linear(n_in: int = 1) -> Form:
    """A torch Linear [out,in]; the first `n_in` axes of ours are the input's."""
    return kernel(n_in)._replace(axes=(1, 0))


def under(n: int) -> Form:
    """Ours below `n` axes of size 1."""
    return Form(lambda shape: (1,) * n + shape)


def pixels(patch: int, channels: int) -> Form:
    """A convolution [D,channels,patch,patch] as a projection [patch·patch·channels,D] of pixels."""
    return Form(lambda shape: (patch, patch, channels, shape[-1]), axes=(3, 2, 0, 1))


class Entry(NamedTuple):
    """One tensor of theirs and our leaves in it; several are joined along its last axis."""

    theirs: str
    ours: tuple[str, ...]
    form: Form

    def layers(self, m: ModelConfig) -> Iterable[int | None]:
        """The layers that have it; None where it is outside them."""
        return range(m.n_layers) if "{i}" in self.theirs else (None,)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Of the tensor of one layer, given those of our leaves with all layers."""
        lead = int("{i}" in self.theirs)
        parts = [self.form.shape(shapes[path][lead:]) for path in self.ours]
        return (*parts[0][:-1], sum(part[-1] for part in parts))

    def into_ours(self, theirs: np.ndarray, shapes: list[Shape]) -> list[np.ndarray]:
        """Our leaves in a tensor of theirs."""
        widths = [self.form.shape(shape)[-1] for shape in shapes]
        parts = np.split(theirs, np.cumsum(widths)[:-1], axis=-1)
        return [self.form.into(part, shape) for part, shape in zip(parts, shapes)]

    def into_theirs(self, ours: list[np.ndarray]) -> np.ndarray:
        parts = [self.form.back(a) for a in ours]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)


def entry(theirs: str, ours: str, form: Form = SAME) -> Entry:
    return Entry(theirs, (ours,), form)


def affine(theirs: str, form: Form, weight: str, bias: str) -> Iterator[Entry]:
    """A projection with a bias."""
    yield entry(theirs + ".weight", weight, form)
    yield entry(theirs + ".bias", bias, FLAT)


def layer_norm(theirs: str, ours: str) -> Iterator[Entry]:
    return affine(theirs, SAME, ours + ".scale", ours + ".bias")


# Other names of keys in published files.
ALIASES = dict(n_embd=["hidden_size"], n_head=["num_attention_heads"])
ALIASES |= dict(n_layer=["num_hidden_layers"], n_positions=["max_position_embeddings", "n_ctx"])
PLAIN = {"gelu": "gelu", "relu": "relu"}
PLAIN |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_tanh")
GATED = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}

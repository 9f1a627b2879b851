"""The classifier on the same layers: token ids or images in, one row of class scores out."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from uoe_jax.config.schema import ModelConfig
from uoe_jax.layers import common
from uoe_jax.layers.common import Tokens, add_bias
from uoe_jax.layers.vocabulary import lookup
from uoe_jax.layers.weights import scaled_normal, weight, weight_if, zeros
from uoe_jax.models.decoder import Stack, Stats


class Linear(nnx.Module):
    """x·W + b over the last axis. Small, so whole on every device."""

    def __init__(self, n_in: int, n_out: int, *, rngs: nnx.Rngs) -> None:
        self.kernel = weight(rngs, (n_in, n_out), (None, None), scaled_normal(n_in))
        self.bias = weight(rngs, (n_out,), (None,), zeros)

    def __call__(self, x: Array) -> Array:
        return add_bias(x @ self.kernel[...].astype(x.dtype), self.bias)


def squares(images: Array, patch: int) -> Array:
    """Images [B,height,width,channels] as [B,L,patch·patch·channels]: squares, row by row."""
    b, height, width, channels = images.shape
    cut = images.reshape(b, height // patch, patch, width // patch, patch, channels)
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, patch * patch * channels)


class Classifier(Stack):
    """Layers between a stem and a head.

    The stem embeds token ids, or projects squares of pixels. The head pools the normed state of
    every input (mean of its valid tokens, or the learned token in front) and scores the classes; of
    two inputs u and v it sees [u, v, u·v, u−v], as in Long Range Arena's retrieval task.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        c, d, head, small = config, config.d_model, config.classifier, scaled_normal(config.d_model)
        image = c.stem == "image"
        if not image and c.vocab_size < 1:
            raise ValueError("vocab_size must be set before the model is built")
        self.project = Linear(c.image.values, d, rngs=rngs) if image else None
        shape, axes = (c.vocab_size, d), ("vocab", "embed")
        self.embedding = weight_if(not image, rngs, shape, axes, small)
        super().__init__(c, rngs=rngs)
        self.cls = weight_if(head.pooling == "cls", rngs, (d,), (None,), small)
        self.hidden = Linear(c.d_pooled, head.d_head, rngs=rngs) if head.d_head else None
        self.classes = Linear(head.d_head or c.d_pooled, head.n_classes, rngs=rngs)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Array, Stats]:
        """(logits float32 [B,n_classes], statistics); arguments of `embed_inputs`."""
        x_BLD, tokens = self.embed_inputs(*args, **kwargs)
        x_BLD, stats = self.run(x_BLD, tokens)
        features = self._pool(self.norm(x_BLD), tokens.segments_BL)
        if self.config.classifier.n_inputs == 2:
            u_BD, v_BD = features[::2], features[1::2]
            features = jnp.concatenate([u_BD, v_BD, u_BD * v_BD, u_BD - v_BD], axis=-1)
        if self.hidden is not None:
            features = common.gelu(self.hidden(features))
        return self.classes(features), stats

    def embed_inputs(
        self, inputs: Array, segments: Array | None = None, keys_B: Array | None = None
    ) -> tuple[Array, Tokens]:
        """The input of the first layer [B·I,L,D], and its tokens.

        inputs: int32 token ids [B,L], or images float32 [B,height,width,channels]; with two inputs
        [B,2,…]. segments: int32 [B,L] or [B,2,L], 1 at tokens, 0 at padding, which comes last.
        keys_B: in training, a random key per example.
        """
        n_inputs = self.config.classifier.n_inputs
        if n_inputs > 1:  # every input is a row of its own
            inputs = inputs.reshape(-1, *inputs.shape[2:])
            segments = None if segments is None else segments.reshape(-1, segments.shape[-1])
            if keys_B is not None:
                keys = [common.fold(keys_B, i) for i in range(n_inputs)]
                keys_B = jnp.stack(keys, axis=1).reshape(-1)
        if self.project is not None:
            pixels = squares(inputs, self.config.image.patch)
            x_BLD = self.project(pixels.astype(self.config.dtype))
        elif self.embedding is not None:
            x_BLD = lookup(self.embedding, inputs, self.config.dtype)
        if self.cls is not None:
            cls_B1D = jnp.broadcast_to(self.cls[...], (x_BLD.shape[0], 1, x_BLD.shape[-1]))
            # Rounded last, as in add_bias.
            x_BLD = jnp.concatenate([cls_B1D.astype(x_BLD.dtype), x_BLD], axis=1)
            if segments is not None:
                segments = jnp.pad(segments, ((0, 0), (1, 0)), constant_values=1)
        positions_BL = common.positions_like(x_BLD)
        tokens = Tokens(segments, positions_BL, self.rotary(positions_BL), keys_B)
        return self.positioned(x_BLD, positions_BL), tokens

    def _pool(self, x_BLD: Array, segments_BL: Array | None) -> Array:
        """float32 [B,D]; zeros for a row of padding only."""
        if self.cls is not None:
            return x_BLD[:, 0].astype(jnp.float32)
        return common.valid_mean(x_BLD, common.valid_tokens(segments_BL, x_BLD))

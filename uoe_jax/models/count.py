"""Parameters of a model, counted on its abstract weights: nothing is allocated or compiled."""

import functools
import math
from typing import Mapping

from flax import nnx
from jax.sharding import AbstractMesh

from uoe_jax.config.schema import ModelConfig
from uoe_jax.distributed.mesh import weight_spec
from uoe_jax.models.classifier import Classifier
from uoe_jax.models.decoder import Transformer


@functools.cache
def abstract_weights(c: ModelConfig) -> dict[str, nnx.Variable]:
    """Every weight by its dotted path, without values; those of layers are stacked.

    Raises:
      ValueError: the model reads tokens and `vocab_size` is not set.
    """
    model = Transformer if c.task == "language" else Classifier
    abstract = nnx.eval_shape(lambda: model(c, rngs=nnx.Rngs(0)))
    return {".".join(map(str, path)): w for path, w in nnx.to_flat_state(nnx.state(abstract))}


def parameters(c: ModelConfig, *within: str) -> int:
    """Parameters of the model; within: only those of its attributes of these names."""
    return sum(math.prod(w.shape) for w in _weights(c, within))


def layer_parameters(c: ModelConfig) -> int:
    """Parameters of one layer: attention, MLP, routers and the two norms."""
    return parameters(c, "layers") // c.n_layers


def vocabulary_parameters(c: ModelConfig) -> int:
    """Parameters of the embedding: its vectors, and the projections of narrow ones."""
    return parameters(c, "embedding")


def classifier_parameters(c: ModelConfig) -> int:
    """Parameters that only a classifier has: the image stem, the learned token, the head."""
    return parameters(c, "project", "cls", "hidden", "classes")


def parameters_per_device(c: ModelConfig, shape: Mapping[str, int], *within: str) -> int:
    """`parameters` that one device of a mesh with axes of these sizes holds."""
    mesh, total = AbstractMesh(tuple(shape.values()), tuple(shape)), 0
    for w in _weights(c, within):
        spec = weight_spec(mesh, w.logical_axes, w.shape)
        total += math.prod(w.shape) // math.prod(shape[a] for a in spec if a is not None)
    return total


def _weights(c: ModelConfig, within: tuple[str, ...]) -> list[nnx.Variable]:
    weights = abstract_weights(c).items()
    return [w for path, w in weights if not within or path.split(".", 1)[0] in within]

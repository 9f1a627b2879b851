"""The encoder classifier: stems, pooling, two inputs, padding; every option trains and no example sees another."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import slow
from small_classifiers import CLASSIFIERS, SCORE, SMALL, classifier_config

from uoe_jax.config import from_dict
from uoe_jax.errors import ConfigError
from uoe_jax.models.classifier import Classifier, squares

B = 4


def inputs_of(config, seed: int = 0) -> np.ndarray:
    rng, inputs = np.random.default_rng(seed), config.classifier.n_inputs
    if config.stem == "image":
        i = config.image
        return rng.normal(size=(B, i.height, i.width, i.channels)).astype(np.float32)
    return rng.integers(
        0, config.vocab_size, (B, *(inputs,) * (inputs > 1), config.context_length), np.int32
    )


@functools.cache
def built(name: str):
    config = classifier_config(name)
    graphdef, state = reference.build(lambda: Classifier(config, rngs=nnx.Rngs(0)))
    return (
        config,
        graphdef,
        state,
        reference.jit(lambda state, *args: nnx.merge(graphdef, state)(*args)[0]),
    )


def padding(config) -> np.ndarray | None:
    """int32, 1 at tokens: rows of different lengths; images have no padding."""
    if config.stem == "image":
        return None
    lengths = np.array([12, 5, 1, 9])
    ok = (np.arange(config.context_length)[None] < lengths[:, None]).astype(np.int32)
    return ok if config.classifier.n_inputs == 1 else np.stack([ok, ok[::-1]], axis=1)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_example_is_classified_alone(name):
    config, _, state, f = built(name)
    x, ok = inputs_of(config), padding(config)
    y = f(state, x, ok)
    assert y.shape == (B, config.classifier.n_classes) and y.dtype == jnp.float32
    other = inputs_of(config, seed=1)
    other[2] = x[2]
    if ok is not None:  # what stands in the padding is not seen either
        other[2] = np.where(ok[2] > 0, x[2], other[2])
    z = f(state, other, ok)
    np.testing.assert_array_equal(z[2], y[2])
    assert (np.abs(np.asarray(z - y)).max(axis=1) > 1e-4).tolist() == [True, True, False, True]
    if ok is not None and config.position != "learned":  # nor how much of it there is
        longer = [np.pad(a, (*((0, 0),) * (a.ndim - 1), (0, 6))) for a in (x, ok)]
        assert reference.error(f(state, *longer), y) < 1e-5


QUICK = ("mean", "two inputs, cls", "image")


@pytest.mark.parametrize("name", [n if n in QUICK else slow(n) for n in CLASSIFIERS])
def test_every_weight_learns(name):
    config, graphdef, state, _ = built(name)
    x, ok = inputs_of(config), padding(config)
    labels = np.arange(B) % config.classifier.n_classes

    @reference.jit
    def gradient(state):
        def loss(state):
            logits, _ = nnx.merge(graphdef, state)(x, ok)
            return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

        return jax.grad(loss)(state)

    for path, g in reference.flat(reference.weights_of(gradient(state))):
        assert np.isfinite(g).all() and np.abs(g).max() > 1e-7, path


def test_squares_are_cut_row_by_row():
    image = np.arange(4 * 6 * 2).reshape(1, 4, 6, 2)
    tokens = np.asarray(squares(jnp.asarray(image), 2))
    assert tokens.shape == (1, 6, 8)
    for i, (row, column) in enumerate(np.ndindex(2, 3)):
        square = image[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        np.testing.assert_array_equal(tokens[0, i], square.ravel())


def test_pooling_is_the_mean_of_the_valid_tokens():
    config, graphdef, state, f = built("dense")
    x, ok = inputs_of(config), padding(config)
    model = nnx.merge(graphdef, state)
    pooled = model._pool(
        jnp.asarray(np.arange(B * 12 * 16, dtype=np.float32).reshape(B, 12, 16)), jnp.asarray(ok)
    )
    values = np.arange(B * 12 * 16, dtype=np.float64).reshape(B, 12, 16)
    for row, n in enumerate(ok.sum(1)):
        np.testing.assert_allclose(pooled[row], values[row, :n].mean(0), rtol=1e-6)
    assert np.isfinite(f(state, x, np.zeros_like(ok))).all()  # rows of nothing


@pytest.mark.parametrize("name", ["cls, learned positions", "two inputs"])
def test_in_training_an_example_draws_from_its_own_key(name):
    config = classifier_config(name, dropout=0.3)
    graphdef, state = reference.build(lambda: Classifier(config, rngs=nnx.Rngs(0)))
    f = reference.jit(lambda x, keys: nnx.merge(graphdef, state)(x, keys_B=keys)[0])
    x, keys = inputs_of(config), jax.random.split(jax.random.key(1), B)
    y = f(x, keys)
    np.testing.assert_allclose(f(x[::-1], keys[::-1])[::-1], y, rtol=1e-5, atol=1e-5)
    assert np.abs(f(x, keys[::-1]) - y).max() > 1e-3
    if (
        config.classifier.n_inputs == 2
    ):  # the two inputs of an example draw differently: the same text twice is not the same
        twice = f(np.stack([x[:, 0]] * 2, axis=1), keys)
        plain = reference.jit(lambda x: nnx.merge(graphdef, state)(x)[0])(
            np.stack([x[:, 0]] * 2, axis=1)
        )
        assert np.abs(twice - plain).max() > 1e-3


def test_two_inputs_are_compared_in_their_order():
    config, _, state, f = built("two inputs")
    x = inputs_of(config)
    y, swapped, same = f(state, x), f(state, x[:, ::-1]), f(state, np.stack([x[:, 0]] * 2, axis=1))
    assert np.abs(y - swapped).max() > 1e-3 and np.abs(y - same).max() > 1e-3


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            dict(causal=True, classifier=dict(pooling="cls"), smha={}, uome={}),
            "pooling='cls'.*sees none of the others",
        ),
        (
            dict(stem="image", image=dict(height=30, width=32, patch=4)),
            "image.patch=4: must divide the height of 30 pixels: 1, 2, 3",
        ),
        (
            dict(stem="image", image=dict(height=8, width=8, patch=4)),
            "context_length=12: an image of 8 x 8 in patches of 4 has 4 tokens",
        ),
        (dict(task="language", stem="image"), "stem='image': a language model reads tokens"),
        (dict(classifier=dict(n_inputs=3)), "n_inputs=3: give at most 2"),
        (
            dict(smha=SCORE | dict(sequence_capacity_factor=1.0)),
            "sequence_capacity_factor=1.0: bounds whole sequences",
        ),
    ],
)
def test_what_cannot_be_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        from_dict({"model": {**SMALL, "smha": SCORE, "uome": SCORE, **changes}})

"""The tasks, language modeling and classification: model, batch, losses and measures of each."""

import math
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.config.schema import Config
from uoe_jax.data.augment import as_floats
from uoe_jax.models.classifier import Classifier
from uoe_jax.models.decoder import Stack, Stats, Transformer

Batch = dict[str, jax.Array]


class Sums(NamedTuple):
    """Sums over the rows of a batch, which add up over batches; float32.

    Attributes:
      nll: negative log-likelihood in nats over `count` targets, which are valid tokens or examples.
      tokens, rows: what the blocks compute on.
      routing: statistics per layer.
    """

    nll: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides a method of tuples
    correct: jax.Array
    tokens: jax.Array
    n_bytes: jax.Array
    rows: jax.Array
    routing: Stats


class Task(NamedTuple):
    """One value of model.task.

    Attributes:
      model: its class.
      shapes: config -> {name: (shape, dtype)} of a train step's batch.
      sums: (model, batch, config) -> Sums; a training batch also has a random key a row, `keys`.
      counts: batch -> (targets, rows the blocks compute on), float32.
      measures: (sums on the host, config) -> measures by name.
      ranking: measures -> what ranks checkpoints, the lowest first.
      summary: measures -> the same as text.
    """

    model: type[Stack]
    shapes: Callable[[Config], dict[str, tuple[tuple[int, ...], Any]]]
    sums: Callable[[Any, Batch, Config], Sums]
    counts: Callable[[Batch], tuple[jax.Array, jax.Array]]
    measures: Callable[[Sums, Config], dict[str, float]]
    ranking: Callable[[dict[str, float]], float]
    summary: Callable[[dict[str, float]], str]


def task_of(c: Config) -> Task:
    return TASKS[c.model.task]


# --- language modeling ----------------------------------------------------------------------------


def _text_shapes(c: Config) -> dict[str, tuple[tuple[int, ...], Any]]:
    rows = c.train.batch_size
    names = ("tokens", "targets", "segments", "positions")
    by_token = dict.fromkeys(names, ((rows, c.model.context_length), jnp.int32))
    return by_token | {"n_bytes": ((rows,), jnp.int32)}


def _text_sums(model: Transformer, batch: Batch, c: Config) -> Sums:
    """Next-token losses in nats, over valid tokens."""
    nll_BL, routing = model.nll(
        batch["tokens"], batch["targets"], batch["segments"], batch["positions"], batch.get("keys")
    )
    valid_BL = batch["segments"] > 0
    tokens, rows = _text_counts(batch)
    return Sums(
        nll=jnp.where(valid_BL, nll_BL, 0).sum(),
        count=tokens,
        correct=jnp.zeros(()),
        tokens=tokens,
        n_bytes=batch["n_bytes"].sum(dtype=jnp.float32),
        rows=rows,
        routing=routing,
    )


def _text_counts(batch: Batch) -> tuple[jax.Array, jax.Array]:
    valid_BL = batch["segments"] > 0
    return valid_BL.sum(dtype=jnp.float32), valid_BL.any(axis=1).sum(dtype=jnp.float32)


def _text_measures(sums: Sums, c: Config) -> dict[str, float]:
    """`loss` in nats per token, and where known `bits_per_byte` and `word_perplexity`."""
    nll = float(sums.nll)
    loss = nll / max(float(sums.count), 1.0)
    found = {"loss": loss}
    if sums.n_bytes > 0:
        found["bits_per_byte"] = nll / math.log(2) / float(sums.n_bytes)
    if c.data.tokenizer == "words":
        found["word_perplexity"] = float(np.exp(loss))
    return found


def _text_summary(found: dict[str, float]) -> str:
    parts = []
    if "bits_per_byte" in found:
        parts.append(f"{found['bits_per_byte']:.4f} bits per byte")
    if "word_perplexity" in found:
        parts.append(f"perplexity {found['word_perplexity']:.2f} per word")
    return ", ".join(parts) or f"perplexity {math.exp(min(found['loss'], 700)):.2f} per token"


# --- classification -------------------------------------------------------------------------------


def _class_shapes(c: Config) -> dict[str, tuple[tuple[int, ...], Any]]:
    m, rows = c.model, c.train.batch_size
    pair = (2,) if m.classifier.n_inputs == 2 else ()
    inputs = ((m.image.height, m.image.width, m.image.channels), jnp.uint8)
    if m.stem == "tokens":
        inputs = ((*pair, m.context_length), jnp.int32)
    return {
        "inputs": ((rows, *inputs[0]), inputs[1]),
        "segments": ((rows, *pair, m.context_length), jnp.int32),
        "label": ((rows,), jnp.int32),
        "other": ((rows,), jnp.int32),
        "share": ((rows,), jnp.float32),
    }


def _class_sums(model: Classifier, batch: Batch, c: Config) -> Sums:
    """Cross entropy in nats over examples; in training with label smoothing as configured."""
    inputs = batch["inputs"]
    if c.model.stem == "image":  # pixels reach the device as bytes
        inputs = as_floats(inputs, c.model.image.bound)
    logits_BC, routing = model(inputs, batch["segments"], batch.get("keys"))
    n_classes = c.model.classifier.n_classes
    target_BC = jnp.zeros_like(logits_BC)
    for name, share_B in (("label", batch["share"]), ("other", 1 - batch["share"])):
        target_BC += jax.nn.one_hot(batch[name], n_classes) * share_B[:, None]
    if "keys" in batch and c.train.label_smoothing:
        target_BC = (1 - c.train.label_smoothing) * target_BC + c.train.label_smoothing / n_classes
    valid_B = batch["label"] >= 0
    nll_B = -(target_BC * jax.nn.log_softmax(logits_BC)).sum(axis=-1)
    examples, rows = _class_counts(batch)
    found_B = logits_BC.argmax(axis=-1)
    right_B = jnp.where(found_B == batch["label"], batch["share"], 0)
    right_B += jnp.where(found_B == batch["other"], 1 - batch["share"], 0)
    return Sums(
        nll=jnp.where(valid_B, nll_B, 0).sum(),
        count=examples,
        correct=jnp.where(valid_B, right_B, 0).sum(),
        tokens=(batch["segments"] > 0).sum(dtype=jnp.float32),
        n_bytes=jnp.zeros(()),
        rows=rows,
        routing=routing,
    )


def _class_counts(batch: Batch) -> tuple[jax.Array, jax.Array]:
    examples = (batch["label"] >= 0).sum(dtype=jnp.float32)
    return examples, examples * math.prod(batch["segments"].shape[1:-1])


def _class_measures(sums: Sums, c: Config) -> dict[str, float]:
    """`loss` in nats per example, and `accuracy`; a mixed image counts by its share of a class."""
    examples = max(float(sums.count), 1.0)
    return {"loss": float(sums.nll) / examples, "accuracy": float(sums.correct) / examples}


TASKS = {
    "language": Task(
        Transformer, _text_shapes, _text_sums, _text_counts, _text_measures,
        lambda found: found["loss"], _text_summary,
    ),
    "classify": Task(
        Classifier, _class_shapes, _class_sums, _class_counts, _class_measures,
        lambda found: 1 - found["accuracy"], lambda found: f"{100 * found['accuracy']:.2f} % right",
    ),
}  # fmt: skip

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
from uoe_jax.moe.routing import RoutingStats

Batch = dict[str, jax.Array]
Shapes = dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype by name, of a train step's batch


class Sums(NamedTuple):
    """Sums over the rows of a batch, which add up over batches; float32."""

    nll: jax.Array  # negative log-likelihood in nats, over the targets
    count: jax.Array  # type: ignore[assignment]  # targets: valid tokens or examples
    correct: jax.Array
    tokens: jax.Array  # that the blocks compute on
    n_bytes: jax.Array
    rows: jax.Array  # that the blocks compute on
    routing: Stats  # per layer


class Task(NamedTuple):
    """One value of model.task."""

    model: type[Stack]
    shapes: Callable[[Config], Shapes]
    sums: Callable[[Any, Batch, Config], Sums]  # of a model; training batches also have row `keys`
    counts: Callable[[Batch], tuple[jax.Array, jax.Array]]  # targets, rows for blocks; float32
    measures: Callable[[Sums, Config], dict[str, float]]  # by name, of sums on the host
    ranking: Callable[[dict[str, float]], float]  # what ranks checkpoints, the lowest first
    summary: Callable[[dict[str, float]], str]  # measures as text


def task_of(c: Config) -> Task:
    return TASKS[c.model.task]


def measures(sums: Sums, config: Config, prefix: str) -> dict[str, Any]:
    """All measures of sums on the host: `<prefix>/loss`, `<prefix>/smha/dropped`, …"""
    found: dict[str, Any] = {**task_of(config).measures(sums, config)}
    for block, stats in sums.routing.items():
        values = routing_measures(stats, float(sums.rows))
        found |= {f"{block}/{name}": value for name, value in values.items()}
    return {f"{prefix}/{name}": value for name, value in found.items()}


def measures_text(measures: dict[str, Any], prefix: str, config: Config) -> str:
    """The measures of an evaluation in a line; their keys begin with `prefix/`."""
    own = {name.removeprefix(f"{prefix}/"): value for name, value in measures.items()}
    return f"loss {own['loss']:.4f}, {task_of(config).summary(own)} ({own['rows']} rows)"


def routing_measures(stats: RoutingStats, rows: float) -> dict[str, list[Any]]:
    """Measures of routing per layer, which is the leading axis of every leaf; `entropy` in nats."""
    s = RoutingStats._make(np.asarray(x, np.float64) for x in stats)
    chosen = np.maximum(s.chosen_N.sum(-1), 1)
    patches = np.maximum(s.patches, 1)
    kept_share = np.where(s.chosen_N.any(-1), s.kept_N.sum(-1) / chosen, 1.0)  # none chosen: all
    by_quarter = s.kept_4 / np.maximum(s.chosen_4, 1) / np.maximum(kept_share, 1e-9)[:, None]
    load = s.chosen_N.shape[-1] * s.chosen_N / chosen[:, None]
    found: dict[str, Any] = {
        "dropped": 1 - kept_share,  # share of the patches' choices without a slot
        "untouched": s.untouched / patches,  # share of patches that no expert took
        # Kept share in each quarter of the row, relative to the mean.
        "kept_by_quarter": np.where(s.chosen_4 > 0, by_quarter, 1.0),
        "load": load,  # share of all choices by expert, times N
        "load_max": load.max(-1),
        "dead": (s.chosen_N == 0).sum(-1),  # experts that nobody chose
        "entropy": s.entropy / patches,
        "balance": s.balance / max(rows, 1),
        "z": s.z / max(rows, 1),
    }
    return {name: value.tolist() for name, value in found.items()}


def _text_shapes(c: Config) -> Shapes:
    rows = c.train.batch_size
    names = ("tokens", "targets", "segments", "positions")
    by_token = dict.fromkeys(names, ((rows, c.model.context_length), jnp.int32))
    return by_token | {"n_bytes": ((rows,), jnp.int32)}


def _text_sums(model: Transformer, batch: Batch, c: Config) -> Sums:
    """Next-token losses in nats, over valid tokens."""
    nll_BL, routing = model.nll(
        batch["tokens"], batch["targets"], batch["segments"], batch["positions"], batch.get("keys")
    )
    tokens, rows = _text_counts(batch)
    nll, correct = jnp.where(batch["segments"] > 0, nll_BL, 0).sum(), jnp.zeros(())
    n_bytes = batch["n_bytes"].sum(dtype=jnp.float32)
    return Sums(nll, tokens, correct, tokens, n_bytes, rows, routing)


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


def _class_shapes(c: Config) -> Shapes:
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
    nll, correct = (jnp.where(valid_B, a, 0).sum() for a in (nll_B, right_B))
    tokens, n_bytes = (batch["segments"] > 0).sum(dtype=jnp.float32), jnp.zeros(())
    return Sums(nll, examples, correct, tokens, n_bytes, rows, routing)


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

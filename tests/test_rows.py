"""Labelled rows: the same batches however they are cut into processes, padding that counts for nothing, refusals in words."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from uoe_jax.config import Config, from_dict
from uoe_jax.data.examples import Example
from uoe_jax.data.pipeline import TrainBatches, eval_batches
from uoe_jax.data.rows import LabelledRows
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.errors import UserError
from uoe_jax.train.evaluate import evaluate
from uoe_jax.train.step import build

MODEL = {
    "task": "classify",
    "causal": False,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "d_hidden": 16,
}
ROUTED = {"n_experts": 2, "k": 1, "priority": "score"}


def config(source: str, model: dict, **sections) -> Config:
    routed = {"smha": ROUTED, "uome": ROUTED}
    return from_dict(
        {
            "model": {**MODEL, **routed, **model},
            "data": {"source": source, **sections.pop("data", {})},
            **sections,
        }
    )


def reviews(n: int = 21) -> list[Example]:
    return [Example((bytes([65 + i % 7]) * (1 + i * 5 % 40),), i % 2) for i in range(n)]


def images(n: int = 21, size: int = 8) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example((rng.integers(0, 256, (size, size, 1), dtype=np.uint8),), i % 10) for i in range(n)
    ]


TEXT = config(
    "imdb", {"context_length": 32, "vocab_size": 257}, data={"buckets": 4}, train={"batch_size": 4}
)
IMAGE = config(
    "digits",
    {"stem": "image", "context_length": 16, "classifier": {"n_classes": 10}, "image": {"height": 8, "width": 8, "channels": 1, "patch": 2}},
    augment={"crop_padding": 1, "flip": True, "rand_layers": 1, "mixup": 0.5, "cutmix": 0.5}, train={"batch_size": 4},
)  # fmt: skip
PAIR = config(
    "aan",
    {"context_length": 32, "vocab_size": 257, "classifier": {"n_inputs": 2}},
    train={"batch_size": 4},
)
TEXT_ROWS = LabelledRows(reviews(), 2, "train", TEXT, ByteTokenizer())
IMAGE_ROWS = LabelledRows(images(), 10, "train", IMAGE, None)
PAIR_ROWS = LabelledRows(
    [Example((b"a" * (i + 1), b"bc"), i % 2) for i in range(9)], 2, "train", PAIR, ByteTokenizer()
)


@pytest.mark.parametrize(
    "rows", [TEXT_ROWS, IMAGE_ROWS, PAIR_ROWS], ids=["text", "images", "pairs"]
)
@pytest.mark.parametrize("n_processes", [2, 4])
def test_processes_hold_the_rows_of_one_global_batch(rows, n_processes):
    whole = TrainBatches(rows, 4, seed=5)
    share = 4 // n_processes
    held = [range(p * share, (p + 1) * share) for p in range(n_processes)]
    parts = [TrainBatches(rows, 4, 5, own) for own in held]
    for step in (0, 7, 3):
        wanted = whole[step]
        for name in wanted:
            assert np.array_equal(
                wanted[name], np.concatenate([part[step][name] for part in parts])
            ), (step, name)
    whole_eval = list(eval_batches(rows, 4))
    part_eval = [list(eval_batches(rows, 4, local_rows=own)) for own in held]
    for i, wanted in enumerate(whole_eval):
        for name in wanted:
            assert np.array_equal(
                wanted[name], np.concatenate([part[i][name] for part in part_eval])
            )
    assert sum(int((batch["label"] >= 0).sum()) for batch in whole_eval) == len(rows)


def test_images_are_drawn_anew_each_time_and_mixed_with_the_one_that_comes_next():
    batches = TrainBatches(IMAGE_ROWS, 4, seed=5)
    epochs = [batches[step] for step in range(30)]
    shares = np.concatenate([b["share"] for b in epochs])
    assert ((0 <= shares) & (shares <= 1)).all() and (shares < 1).mean() > 0.5
    assert any((b["label"] != b["other"]).any() for b in epochs)
    again = TrainBatches(IMAGE_ROWS, 4, seed=5)
    assert all(np.array_equal(epochs[17][name], again[17][name]) for name in epochs[17])
    other = TrainBatches(IMAGE_ROWS, 4, seed=6)
    assert not np.array_equal(epochs[17]["inputs"], other[17]["inputs"])
    plain = IMAGE_ROWS[3]
    assert (
        np.array_equal(plain["inputs"], images()[3].inputs[0]) and plain["share"] == 1
    )  # evaluation never draws


def test_text_is_padded_to_the_bucket_of_the_longest_row():
    for batch in eval_batches(TEXT_ROWS, 4):
        longest = batch["segments"].sum(-1).max()
        assert (
            batch["inputs"].shape[1] in (8, 16, 24, 32)
            and 0 <= batch["inputs"].shape[1] - longest < 8
        )
    row = TEXT_ROWS[7]  # of 36 bytes, cut at the context
    assert row["segments"].sum() == 32 and (row["inputs"] == 65).all()


@pytest.mark.slow
def test_what_is_measured_depends_neither_on_buckets_nor_on_the_batch():
    """Every example once: the same sums as one by one."""
    plain = from_dict({**_dict(TEXT), "data": {"source": "imdb", "buckets": 1}})
    rows = LabelledRows(reviews(), 2, "validation", plain, ByteTokenizer())
    mesh = mesh_lib.make_mesh(TEXT.mesh, jax.devices()[:1])
    found = []
    with jax.set_mesh(mesh):
        params = build(TEXT, mesh).init(jax.random.key(0)).params
        for c, split, size in (
            (TEXT, TEXT_ROWS, 4),
            (plain, rows, 4),
            (plain, rows, 21),
            (plain, rows, 1),
        ):
            c = from_dict({**_dict(c), "eval": {"batch_size": size}})
            found.append(evaluate(build(c, mesh), params, split, c)[0])
    assert all(f["eval/rows"] == 21 for f in found)
    for f in found[1:]:
        assert (
            f["eval/loss"] == pytest.approx(found[0]["eval/loss"], rel=1e-5)
            and f["eval/accuracy"] == found[0]["eval/accuracy"]
        )
        for name in ("entropy", "load", "dropped"):
            assert np.allclose(
                f[f"eval/uome/{name}"], found[0][f"eval/uome/{name}"], rtol=1e-4, atol=1e-6
            )


def _dict(c: Config) -> dict:
    from uoe_jax.config import to_dict

    return to_dict(c)


@pytest.mark.parametrize(
    "c, examples, said",
    [
        (TEXT, [Example((b"x",), 2)], "example 0 of the train split has label 2"),
        (TEXT, [Example((b"x",), -1)], "has label -1"),
        (PAIR, [Example((b"x",), 0)], "n_inputs=2: example 0"),
        (IMAGE, images(1, size=9), "example 0 of the train split cannot be used"),
        (IMAGE, [Example((np.zeros((8, 8, 3), np.uint8),), 0)], "config.model.image.channels=1"),
    ],
)
def test_examples_that_the_model_cannot_take_are_named(c, examples, said):
    rows = LabelledRows(examples, c.model.classifier.n_classes, "train", c, ByteTokenizer())
    with pytest.raises(UserError, match=said):
        rows[0]
    with pytest.raises(UserError, match=said):
        rows.augmented(0, (1, 2), 0)


def test_pixels_that_are_not_the_context_are_named():
    c = config(
        "cifar10", {"context_length": 64, "vocab_size": 256, "classifier": {"n_classes": 10}}
    )
    with pytest.raises(
        UserError, match="context_length=64: an image of the train split has 81 pixels"
    ):
        LabelledRows(images(1, size=9), 10, "train", c, None)[0]

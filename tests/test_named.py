"""Datasets by their TFDS name, and the digits: every example in exactly one split, and refusals that say what to do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds
from named_data import (
    Rows,
    cifar_features,
    cifar_rows,
    png,
    reviews,
    write,
    write_cifar,
    write_imdb,
)

from uoe_jax.data.sources import tfds as named
from uoe_jax.data.sources.digits import open_digits
from uoe_jax.data.sources.tfds import hash_order, open_named, open_tfds_text
from uoe_jax.errors import ConfigError, UserError

SPLITS = ("train", "validation", "test")


def text_rows(**sizes: int) -> Rows:
    return {
        split: [{"text": f"{split} {i} é".encode() * (i % 3)} for i in range(n)]
        for split, n in sizes.items()
    }


def write_text(root: Path, dataset: str = "lm1b", config: str = "", **sizes: int) -> Path:
    return write(root, dataset, "1.1.0", {"text": tfds.features.Text()}, text_rows(**sizes), config)


def refusal(what: Callable[[], Any], *parts: str, kind: type[UserError] = UserError) -> str:
    """The one sentence (or a few) of a refusal, which must name all `parts`."""
    with pytest.raises(kind) as raised:
        what()
    message = str(raised.value)
    assert all(part in message for part in parts) and "\n" not in message, message
    return message


def reference_order(salt: str, n: int) -> list[int]:
    """splitmix64 as published, in Python's integers."""
    mask = 2**64 - 1
    start = int(hashlib.sha256(salt.encode()).hexdigest()[:16], 16)

    def mix(i: int) -> int:
        z = (start + i + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    return sorted(range(n), key=mix)


# ---- who is held out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", [(1, 1), (1000, 0), (1000, 10), (1000, 1000)])
def test_held_out_indices_are_the_first_by_splitmix64(n, k):
    assert hash_order("cifar10", n, k).tolist() == reference_order("cifar10", n)[:k]


def test_held_out_indices_do_not_depend_on_how_many_are_looked_at_at_once():
    n = (1 << 21) + 12345  # three chunks
    few, more = hash_order("lm1b", n, 50), hash_order("lm1b", n, 5000)
    np.testing.assert_array_equal(few, more[:50])
    assert (
        len(set(more.tolist())) == 5000
        and (np.bincount(more >> 20, minlength=3) > [2000, 2000, 10]).all()
    )
    hashes = named._splitmix64(
        np.arange(n, dtype=np.uint64) + np.uint64(int(hashlib.sha256(b"lm1b").hexdigest()[:16], 16))
    )
    np.testing.assert_array_equal(few, np.argsort(hashes)[:50])


def test_held_out_indices_do_not_move():
    """If this fails, published figures and cached datasets mean something else: raise named.VERSION."""
    assert hash_order("imdb_reviews/plain_text", 25_000, 4).tolist() == GOLDEN_IMDB
    assert hash_order("lm1b", 30_301_028, 3).tolist() == GOLDEN_LM1B


# ---- labelled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, n_classes, shape, sizes",
    [
        ("cifar10", 10, (32, 32, 3), (180, 20, 200)),
        ("cifar100", 100, (32, 32, 3), (180, 20, 200)),
        ("imdb", 2, (), (180, 20, 200)),
        ("imagenet2012", 1000, (0, 0, 3), (198, 2, 200)),
    ],
)
def test_true_schemas_are_understood(source, n_classes, shape, sizes):
    with tfds.testing.mock_data(num_examples=200):
        data = open_named(source, "")
        assert (data.n_classes, data.vocab_size, named.LABELLED[source].shape) == (
            n_classes,
            0,
            shape,
        )
        assert tuple(len(data.examples(split)) for split in SPLITS) == sizes
        assert list(data.record()["n_examples"].values()) == list(sizes)
        labels = set()
        for split in SPLITS:
            for i in range(len(data.examples(split))):
                (value,), label = data.examples(split)[i]
                labels.add(label)
                if shape:
                    assert value.dtype == np.uint8 and value.ndim == 3 and value.shape[2] == 3
                else:
                    assert type(value) is bytes
        assert type(label) is int and 0 <= min(labels) and n_classes // 2 <= max(labels) < n_classes


def test_cifar_is_split_as_long_range_arena_splits_it(tmp_path):
    _, images = write_cifar(tmp_path, train=40, test=7)
    data = open_named("cifar10", str(tmp_path))
    want = {
        "train": images["train"][:36],
        "validation": images["train"][36:],
        "test": images["test"],
    }
    labels = {"train": range(36), "validation": range(36, 40), "test": range(7)}
    for split in SPLITS:
        examples = data.examples(split)
        assert len(examples) == len(want[split])
        for i in range(len(examples)):
            np.testing.assert_array_equal(examples[i].inputs[0], want[split][i])
            assert examples[i].label == labels[split][i] % 10
        for i in (-1, len(examples)):
            with pytest.raises(IndexError):
                examples[i]
    record = data.record()
    assert json.loads(json.dumps(record)) == record and record["dataset"] == "cifar10/3.0.2"
    assert record["n_examples"] == {"train": 36, "validation": 4, "test": 7}
    assert "sha256" not in record  # nothing was hashed


def test_reviews_are_held_out_by_hash_so_that_both_classes_are(tmp_path):
    rows = reviews(train=200, test=30, unsupervised=5)
    write_imdb(tmp_path, rows)
    data = open_named("imdb", str(tmp_path))
    held = sorted(reference_order("imdb_reviews/plain_text", 200)[:20])
    kept = [i for i in range(200) if i not in held]
    for split, name, indices in (
        ("train", "train", kept),
        ("validation", "train", held),
        ("test", "test", range(30)),
    ):
        examples = data.examples(split)
        found = [(examples[i].inputs[0], examples[i].label) for i in range(len(examples))]
        assert found == [(rows[name][i]["text"], rows[name][i]["label"]) for i in indices]
    assert len({data.examples("validation")[i].label for i in range(20)}) == 2


def test_what_a_record_is_does_not_depend_on_the_process(tmp_path):
    write_imdb(tmp_path, reviews(train=100, test=10))

    def digest() -> str:
        data = open_named("imdb", str(tmp_path))
        parts = [
            repr([data.examples(split)[i] for i in range(len(data.examples(split)))])
            for split in SPLITS
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    code = (
        "import hashlib\nfrom uoe_jax.data.sources.tfds import open_named\n"
        f"data = open_named('imdb', {str(tmp_path)!r})\n"
        "parts = [repr([data.examples(s)[i] for i in range(len(data.examples(s)))]) for s in ('train', 'validation', 'test')]\n"
        "print(hashlib.sha256(''.join(parts).encode()).hexdigest())\n"
        "import sys; assert 'tensorflow' not in sys.modules and 'jax' not in sys.modules\n"
    )
    env = os.environ | {"PYTHONHASHSEED": "77"}
    fresh = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert fresh.returncode == 0, fresh.stderr
    assert fresh.stdout.strip() == digest()


# ---- text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, origin",
    [
        ({"train": 700, "test": 40}, {"validation": 7}),  # as One Billion Word
        ({"train": 700, "validation": 40}, {"validation": 7, "test": "validation"}),  # as C4
        ({"train": 700}, {"validation": 7, "test": 7}),
        ({"train": 700, "validation": 30, "test": 40}, {}),
    ],
)
def test_every_document_is_in_exactly_one_split_byte_for_byte(tmp_path, sizes, origin):
    write_text(tmp_path, **sizes)
    rows = text_rows(**sizes)
    data = open_tfds_text("lm1b", str(tmp_path))
    found = {split: list(data.documents(split)) for split in SPLITS}
    order = reference_order("lm1b", 700)
    held = []
    for split in ("validation", "test"):
        if isinstance(n := origin.get(split, split), int):
            mine, order = sorted(order[:n]), order[n:]
            held += mine
            assert found[split] == [rows["train"][i]["text"] for i in mine]
        else:
            assert found[split] == [row["text"] for row in rows[n]]
    assert found["train"] == [row["text"] for i, row in enumerate(rows["train"]) if i not in held]
    record = data.record()
    assert record["n_examples"] == {split: len(found[split]) for split in SPLITS}
    assert json.loads(json.dumps(record)) == record and record["dataset"] == "lm1b/1.1.0"
    assert found["train"] == list(data.documents("train"))  # again from the start


def test_true_text_schemas_are_understood():
    with tfds.testing.mock_data(num_examples=5):
        data = open_tfds_text("lm1b", "")
        assert [len(list(data.documents(split))) for split in SPLITS] == [
            3,
            1,
            1,
        ]  # a mock has only training examples
        assert open_tfds_text("pg19", "").record()["feature"] == "book_text"


def test_datasets_that_tfds_hides_without_tensorflow_are_found_by_their_files(tmp_path):
    write_text(tmp_path, "c4", "en", train=300, validation=5)
    data = open_tfds_text("c4/en:1.1.0", str(tmp_path))
    assert data.record()["dataset"] == "c4/en/1.1.0" and len(list(data.documents("train"))) == 297


def test_key_names_the_content(tmp_path):
    sizes = {"a": 300, "b": 300, "c": 301}
    for name, n in sizes.items():
        write_text(tmp_path / name, train=n, test=4)
    a, b, c = (open_tfds_text("lm1b", str(tmp_path / name)).key for name in sizes)
    assert a == b != c and re.fullmatch(r"tfds-[0-9a-f]{24}", a)


def test_feature_must_be_plain(tmp_path):
    text = tfds.features.Text
    for name, features, parts in (
        ("two", {"question": text(), "answer": text()}, ("2 features of text", "answer, question")),
        ("none", {"x": tfds.features.Tensor(shape=(), dtype=np.int64)}, ("no feature of text",)),
    ):
        value = dict.fromkeys(features, 3 if name == "none" else b"3")
        write(tmp_path, name, "1.0.0", features, {"train": [value] * 300})
        refusal(
            lambda: open_tfds_text(name, str(tmp_path)),
            f"data.name='{name}'",
            *parts,
            kind=ConfigError,
        )


# ---- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", list(named.LABELLED))
def test_what_is_not_prepared_is_refused_with_the_command(tmp_path, source):
    name = named.LABELLED[source].name
    command = f"`tfds build {name} --file_format=array_record --data_dir={tmp_path}`"
    message = refusal(
        lambda: open_named(source, str(tmp_path)),
        f"data.source={source!r}",
        str(tmp_path),
        command,
        kind=ConfigError,
    )
    assert ("ILSVRC2012_img_train.tar" in message) == (source == "imagenet2012")
    command = "`tfds build lm1b --file_format=array_record --data_dir="
    refusal(
        lambda: open_tfds_text("lm1b", str(tmp_path)), "data.name='lm1b'", command, kind=ConfigError
    )


def test_another_file_format_is_refused_with_the_conversion_and_found_after_it(tmp_path):
    directory, images = write_cifar(tmp_path)
    info = directory / "dataset_info.json"
    meta = json.loads(info.read_text())
    info.write_text(json.dumps(meta | {"fileFormat": "tfrecord"}))
    command = (
        f"`tfds convert_format --dataset_version_dir={directory} --out_file_format=array_record`"
    )
    refusal(
        lambda: open_named("cifar10", str(tmp_path)),
        "data.source='cifar10'",
        command,
        kind=ConfigError,
    )
    info.write_text(
        json.dumps(meta | {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]})
    )
    np.testing.assert_array_equal(
        open_named("cifar10", str(tmp_path)).examples("test")[3].inputs[0], images["test"][3]
    )


@pytest.mark.parametrize(
    "name, parts",
    [
        ("lm1", ("did you mean 'lm1b'?", "tfds build lm1 ")),
        ("lm1c/x:1.0.0", ("did you mean 'lm1b'?",)),
        ("imdb_reviews/plain", ("plain",)),
        ("lm1b:9.9.9", ("9.9.9",)),
        ("no name!", ("cannot open it",)),
        ("", ("needs the name",)),
    ],
)
def test_unknown_names_are_refused(tmp_path, name, parts):
    refusal(
        lambda: open_tfds_text(name, str(tmp_path)), f"data.name={name!r}", *parts, kind=ConfigError
    )


def test_missing_splits_are_named(tmp_path):
    write_text(tmp_path, test=10)
    refusal(
        lambda: open_tfds_text("lm1b", str(tmp_path)),
        "no split 'train', only test",
        kind=ConfigError,
    )
    write_text(tmp_path / "few", train=2)
    refusal(
        lambda: open_tfds_text("lm1b", str(tmp_path / "few")),
        "2 documents in 'train' of lm1b/1.1.0 are too few",
    )
    write_imdb(tmp_path, reviews(train=1, test=1))
    refusal(lambda: open_named("imdb", str(tmp_path)), "one training example", "none to hold out")


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "empty"])
def test_every_record_of_a_damaged_file_is_right_or_named(tmp_path, damage):
    directory, images = write_cifar(tmp_path, train=40)
    (file,) = directory.glob("cifar10-train.array_record*")
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        place = data.index(png(images["train"][23])[200:264])
        data[place : place + 64] = bytes(byte ^ 0xFF for byte in data[place : place + 64])
    file.write_bytes(
        data if damage == "flipped" else data[: len(data) // 2] if damage == "cut" else b""
    )
    if damage == "gone":
        file.unlink()
    source = open_named("cifar10", str(tmp_path))
    refused = []
    for split, first in (("train", 0), ("validation", 36)):
        examples = source.examples(split)
        for i in range(len(examples)):
            try:
                np.testing.assert_array_equal(examples[i].inputs[0], images["train"][first + i])
            except UserError as error:
                assert str(error).startswith(
                    f"{directory}: example {first + i} of the split 'train' cannot be read ("
                )
                assert "tfds build cifar10" in str(error) and "\n" not in str(error)
                refused.append(first + i)
    assert refused == ([23] if damage == "flipped" else list(range(40)))


def test_damaged_text_is_named_with_the_index(tmp_path):
    directory = write_text(tmp_path, train=3000, test=3)
    (file,) = directory.glob("lm1b-train.array_record*")
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 8] = bytes(byte ^ 0xFF for byte in data[middle : middle + 8])
    file.write_bytes(data)
    documents = open_tfds_text("lm1b", str(tmp_path)).documents("train")
    refusal(lambda: list(documents), str(directory), "of the split 'train' cannot be read")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", "{"])
def test_damaged_descriptions_are_refused(tmp_path, file, content):
    directory, _ = write_cifar(tmp_path)
    (directory / file).write_text(content)
    where = str(directory) if file == "features.json" else str(tmp_path)
    refusal(
        lambda: open_named("cifar10", str(tmp_path)),
        where,
        "prepare it again, with `tfds build cifar10 ",
    )


def test_records_that_are_not_what_the_dataset_promises_are_named(tmp_path):
    rows = reviews(train=20, test=3)
    rows["test"][1]["label"] = -1
    directory = write_imdb(tmp_path / "label", rows)
    examples = open_named("imdb", str(tmp_path / "label")).examples("test")
    assert examples[0].label == 0
    refusal(
        lambda: examples[1],
        f"{directory}: example 1 of the split 'test' has the label -1 where 0 to 1",
    )

    features = {"text": tfds.features.Text(), "stars": tfds.features.Scalar(np.int64)}
    rows = {split: [{"text": b"x", "stars": 1}] * 20 for split in ("train", "test")}
    write(tmp_path / "feature", "imdb_reviews", "1.0.0", features, rows, config="plain_text")
    refusal(
        lambda: open_named("imdb", str(tmp_path / "feature")),
        "has no feature 'label', only",
        "stars",
    )

    for number, (shape, dtype) in enumerate(
        [((32, 32, 1), np.uint8), ((32, 32), np.uint8), ((32, 32, 3), np.int32)]
    ):
        features = cifar_features(image=tfds.features.Tensor(shape=shape, dtype=dtype))
        row = {"id": "0", "image": np.zeros(shape, dtype), "label": 0}
        write(
            tmp_path / str(number),
            "cifar10",
            "3.0.2",
            features,
            {"train": [row] * 20, "test": [row]},
        )
        examples = open_named("cifar10", str(tmp_path / str(number))).examples("validation")
        refusal(
            lambda: examples[0],
            "example 18 of the split 'train'",
            "where uint8 [32,32,3] is expected in 'image'",
        )

    features = cifar_features(image=tfds.features.Image(shape=(None, None, 3)))
    rows, _ = cifar_rows(20, 2)
    rows["test"][1]["image"] = b"\x89PNG no picture"
    write(tmp_path / "png", "cifar10", "3.0.2", features, rows)
    refusal(
        lambda: open_named("cifar10", str(tmp_path / "png")).examples("test")[1],
        "example 1 of the split 'test' cannot be read",
    )


# ---- digits -------------------------------------------------------------------------------------------------------


def test_every_digit_is_in_exactly_one_split_with_all_classes_alike():
    from sklearn.datasets import load_digits

    loaded = load_digits()
    data = open_digits()
    assert (data.n_classes, data.vocab_size) == (10, 0)
    found, sizes = [], {}
    for split, share in zip(SPLITS, (0.70, 0.15, 0.15)):
        examples = data.examples(split)
        sizes[split] = len(examples)
        assert abs(len(examples) / 1797 - share) < 0.005
        pairs = [examples[i] for i in range(len(examples))]
        for label in range(10):
            n = int((loaded.target == label).sum())
            assert abs(sum(pair.label == label for pair in pairs) - share * n) <= 1
        assert all(p.inputs[0].dtype == np.uint8 and p.inputs[0].shape == (8, 8, 1) for p in pairs)
        found += [(p.inputs[0].tobytes(), p.label) for p in pairs]
        for i in (-1, len(examples)):
            with pytest.raises(IndexError):
                examples[i]
    scaled = np.floor(loaded.images * 255 / 16).astype(np.uint8)
    assert scaled.max() == 255
    assert sorted(found) == sorted(
        (image.tobytes(), int(label)) for image, label in zip(scaled, loaded.target)
    )
    assert data.record()["n_examples"] == sizes


def test_digits_do_not_move():
    """If this fails, every figure on the digits means something else."""
    data = open_digits()
    assert [data.examples("test")[i].label for i in range(12)] == GOLDEN_DIGITS
    assert (
        data.record()["sha256"].startswith(GOLDEN_SHA) and data.record() == open_digits().record()
    )


GOLDEN_IMDB = [11527, 1380, 1988, 13072]
GOLDEN_LM1B = [3319821, 13172142, 10121395]
GOLDEN_DIGITS = [2, 9, 5, 9, 9, 7, 3, 2, 4, 6, 5, 1]
GOLDEN_SHA = "cc60545fa7fa1a8c"

"""Datasets by their name in TensorFlow Datasets, prepared as array_record and read by index without TensorFlow.

What evaluation may look at while training is never the official test split: where a dataset has no split for that
purpose, some of its training examples are held out by the rules below. Nothing is downloaded or prepared here; a dataset
that is not there is refused with the command that makes it.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from uoe_jax.data.examples import Example, Input
from uoe_jax.data.prepared import SPLITS
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError, UserError

VERSION = "1"  # of the rules below: raise it when they choose other examples, or caches go stale
CHUNK = 256  # records read at a time where a whole split is wanted


@dataclasses.dataclass(frozen=True)
class Labelled:
    """How a dataset of labelled examples is used.

    Attributes:
      name: in TensorFlow Datasets.
      n_classes: labels are below it.
      feature: 'text' or 'image', the input; the label is 'label'.
      shape: of every image, 0 where images differ; empty for text.
      test: the split that is the test.
      one_in: one of so many training examples is held out as validation.
      last: the held-out ones are the last, as Long Range Arena takes them (tfds has shuffled them); else by `hash_order`.
      manual: what must be fetched by hand before it can be prepared.
    """

    name: str
    n_classes: int
    feature: str
    shape: tuple[int, ...] = ()
    test: str = "test"
    one_in: int = 10
    last: bool = False
    manual: str = ""


LABELLED = {
    "imdb": Labelled("imdb_reviews/plain_text", 2, "text"),
    "cifar10": Labelled("cifar10", 10, "image", (32, 32, 3), last=True),
    "cifar100": Labelled("cifar100", 100, "image", (32, 32, 3), last=True),  # its 'label' is the fine one
    "imagenet2012": Labelled(
        "imagenet2012", 1000, "image", (0, 0, 3), test="validation", one_in=100,
        manual="ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org into its downloads/manual",
    ),
}  # fmt: skip


def open_named(source: str, path: str) -> NamedExamples:
    """The labelled dataset that data.source names.

    Args:
      source: a key of `LABELLED`.
      path: the directory of TensorFlow Datasets' data; empty: its own default.

    Raises UserError where it is not prepared there as array_record, lacks a split or a feature, or cannot be read.
    """
    spec = LABELLED[source]
    return NamedExamples(spec, Prepared("data.source", source, spec.name, path, spec.manual))


def open_tfds_text(name: str, path: str) -> NamedText:
    """The documents of any text dataset by its name, such as 'lm1b' or 'c4/en:3.1.0'; `path` as in `open_named`.

    The documents are the feature 'text', or else the only feature of text. Raises UserError as `open_named` does.
    """
    if not name:
        raise ConfigError(
            "data.name",
            name,
            "data.source='tfds_text' needs the name of a dataset, such as 'lm1b'.",
        )
    return NamedText(Prepared("data.name", name, name, path))


def hash_order(salt: str, n: int, k: int) -> np.ndarray:
    """int64 [k]: the first k of the indices 0 … n-1 in an order that depends on `salt` and the index alone.

    Index i comes by splitmix64 of i plus the first 64 bits of SHA-256 of the salt: distinct for distinct i, and k numbers
    in memory where n is of hundreds of millions.
    """
    offset = np.uint64(int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big"))
    kept, hashes = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    for start in ticking(range(0, n, 1 << 20)):
        fresh = np.arange(start, min(n, start + (1 << 20)))
        fresh_hashes = _splitmix64(fresh.astype(np.uint64) + offset)
        if (
            len(kept) == k
        ):  # sorting only what can still be among the first makes this a pass at memory speed
            below = fresh_hashes < np.max(hashes, initial=0)
            fresh, fresh_hashes = fresh[below], fresh_hashes[below]
        kept, hashes = np.concatenate([kept, fresh]), np.concatenate([hashes, fresh_hashes])
        first = np.argsort(hashes)[:k]
        kept, hashes = kept[first], hashes[first]
    return kept


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Vigna's mixing of uint64 (public domain), modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Prepared:
    """A dataset in a directory of TensorFlow Datasets (imports it, half a second).

    Attributes:
      full_name: with configuration and version.
      directory: where its files are.
      features: what it says of them, by name.
    """

    def __init__(self, key: str, value: str, name: str, path: str, manual: str = "") -> None:
        """Args: `key` and `value` of the configuration, for errors; `name` and `path` as in `open_tfds_text`."""
        import tensorflow_datasets as tfds
        from etils import epath

        self.key, self.value, self._name, self._path, self._manual = key, value, name, path, manual
        try:
            self._builder = tfds.builder(name, data_dir=path or None)
        except tfds.core.DatasetNotFoundError as error:
            raise self._unknown(tfds.list_builders(with_community_datasets=False)) from error
        except (
            Exception
        ) as error:  # an unknown configuration or version, damaged files: tfds raises all kinds
            raise self._refusal(
                f"TensorFlow Datasets cannot open it in {self._where} ({_one_line(error)}): {self._choose} Or, if its "
                f"files there are damaged, delete them and prepare it again, {self._command}."
            ) from error
        self.directory = str(self._builder.data_dir)
        self._there = epath.Path(self.directory).exists()
        if (
            self._there
        ):  # what the files say of themselves, which need not be what this release of tfds says
            try:
                self._builder = tfds.builder_from_directory(self.directory)
            except Exception as error:
                raise self.damaged(
                    f"the prepared dataset cannot be read ({_one_line(error)})"
                ) from error
        self.full_name = self._builder.info.full_name
        self.features = dict(self._builder.info.features)

    def has(self, split: str) -> bool:
        return split in self._builder.info.splits

    def n_bytes(self, split: str) -> int:
        return self._builder.info.splits[split].num_bytes if self.has(split) else 0

    def records(self, split: str) -> Records:
        """Raises UserError where the split is not there, or not there as array_record."""
        splits = self._builder.info.splits
        if splits and split not in splits:
            raise self._refusal(
                f"{self.full_name} has no split {split!r}, only {', '.join(splits)}: {self._choose}"
            )
        try:
            source = self._builder.as_data_source(split=split)
            n = len(source)
        except Exception as error:
            raise self._unreadable(error) from error
        if not n:
            raise self._refusal(
                f"the split {split!r} of {self.full_name} holds no example: {self._choose}"
            )
        return Records(source, self, split)

    def damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.directory}: {what}: delete that directory and prepare it again, {self._command}."
        )

    @property
    def _where(self) -> str:
        return self._path or "TensorFlow Datasets' own directory"

    @property
    def _choose(self) -> str:
        return f"set {self.key} or data.path to another."

    @property
    def _command(self) -> str:
        where = f" --data_dir={shlex.quote(self._path)}" if self._path else ""
        return (
            f"with `tfds build {self._name} --file_format=array_record{where}` "
            "where tensorflow-datasets and tensorflow-cpu are installed"
        )

    def _refusal(self, remedy: str) -> ConfigError:
        return ConfigError(self.key, self.value, remedy)

    def _unknown(self, known: Sequence[str]) -> ConfigError:
        base = self._name.split("/")[0].split(":")[0]
        near = difflib.get_close_matches(base, known, n=1, cutoff=0.0)[0]
        return self._refusal(
            f"is not prepared in {self._where}, nor a dataset that can be known without TensorFlow: did you mean {near!r}? "
            f"Else prepare it {self._command}."
        )

    def _unreadable(self, error: Exception) -> UserError:
        if not self._there:
            first = f"put {self._manual}, then " if self._manual else ""
            return self._refusal(
                f"is not prepared in {self.directory}: {first}prepare it {self._command}."
            )
        if isinstance(error, NotImplementedError):
            return self._refusal(
                f"is prepared in {self.directory}, but not as array_record, which reading by index takes: add that with "
                f"`tfds convert_format --dataset_version_dir={shlex.quote(self.directory)} --out_file_format=array_record` "
                "where tensorflow-datasets and tensorflow-cpu are installed."
            )
        return self.damaged(f"the prepared dataset cannot be read ({_one_line(error)})")


class Records:
    """Random access to the examples of one split, as dicts."""

    def __init__(self, source: Any, prepared: Prepared, split: str) -> None:
        self._source = source
        self._prepared = prepared
        self._split = split

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict[str, Any]:
        try:
            return self._source[i]
        except Exception as error:  # array_record and the decoders each raise their own
            raise self.wrong(i, f"cannot be read ({_one_line(error)})") from error

    def many(self, indices: np.ndarray) -> list[dict[str, Any]]:
        try:
            return self._source.__getitems__(indices.tolist())
        except Exception:
            return [self[int(i)] for i in indices]  # names the one that is damaged

    def wrong(self, i: int, what: str) -> UserError:
        return self._prepared.damaged(f"example {i} of the split {self._split!r} {what}")

    def text(self, i: int, record: dict[str, Any], feature: str) -> bytes:
        value = record[feature]
        if isinstance(value, str):
            return value.encode("utf-8", "surrogateescape")
        if not isinstance(value, bytes):
            raise self.wrong(i, f"has {type(value).__name__} where text is expected in {feature!r}")
        return value

    def image(
        self, i: int, record: dict[str, Any], feature: str, shape: tuple[int, ...]
    ) -> np.ndarray:
        value = np.asarray(record[feature])
        fits = value.ndim == len(shape) and all(
            want in (0, got) for want, got in zip(shape, value.shape)
        )
        if not fits or value.dtype != np.uint8 or not value.size:
            wanted = ",".join(str(size or "any") for size in shape)
            raise self.wrong(
                i,
                f"has {value.dtype} {list(value.shape)} where uint8 [{wanted}] is expected in {feature!r}",
            )
        return value

    def label(self, i: int, record: dict[str, Any], n_classes: int) -> int:
        value = np.asarray(record["label"])
        if value.ndim or value.dtype.kind not in "iu" or not 0 <= value < n_classes:
            raise self.wrong(
                i, f"has the label {value.tolist()!r} where 0 to {n_classes - 1} is expected"
            )
        return int(value)


class NamedExamples:
    """An `ExampleSource` over a prepared dataset."""

    vocab_size = 0

    def __init__(self, spec: Labelled, prepared: Prepared) -> None:
        """Raises UserError as `open_named` does."""
        self.n_classes = spec.n_classes
        self.shape = spec.shape
        self._prepared = prepared
        for feature in (spec.feature, "label"):
            if feature not in prepared.features:
                has = ", ".join(sorted(prepared.features))
                raise prepared.damaged(
                    f"{prepared.full_name} has no feature {feature!r}, only {has}"
                )
        train, test = prepared.records("train"), prepared.records(spec.test)
        n = len(train)
        n_held = max(1, n // spec.one_in)
        if n_held >= n:
            raise prepared.damaged(
                f"one training example of {prepared.full_name} leaves none to hold out as validation"
            )
        held = np.arange(n - n_held, n) if spec.last else np.sort(hash_order(spec.name, n, n_held))
        kept = np.setdiff1d(np.arange(n), held, assume_unique=True)
        self._splits = {
            "train": PickedExamples(train, kept, spec),
            "validation": PickedExamples(train, held, spec),
            "test": PickedExamples(test, np.arange(len(test)), spec),
        }
        self._from = {"train": "train", "validation": "held out of train", "test": spec.test}

    def examples(self, split: str) -> PickedExamples:
        return self._splits[split]

    def record(self) -> dict[str, Any]:
        """JSON-able, for the run's record."""
        sizes = {split: len(self._splits[split]) for split in SPLITS}
        return {
            "dataset": self._prepared.full_name,
            "directory": self._prepared.directory,
            "from": self._from,
            "n_examples": sizes,
        }


class PickedExamples:
    """Some records of a split, by index."""

    def __init__(self, records: Records, indices: np.ndarray, spec: Labelled) -> None:
        self._records = records
        self._indices = indices
        self._spec = spec

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Example:
        """Raises UserError for a record that is damaged or is not what the dataset promises."""
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        at = int(self._indices[i])
        record = self._records[at]
        feature, shape = self._spec.feature, self._spec.shape
        data: Input = (
            self._records.image(at, record, feature, shape)
            if shape
            else self._records.text(at, record, feature)
        )
        return Example((data,), self._records.label(at, record, self._spec.n_classes))


class NamedText:
    """A `TextSource` over a prepared dataset.

    The test is the split 'test', or else 'validation' (as figures on datasets without a test are given); the validation is
    the split 'validation' where that is not the test. What is missing is held out of 'train': 1 % for each, at most
    100,000 documents.

    Attributes:
      key: of the dataset's name, version, sizes and of these rules; its content is not hashed.
    """

    def __init__(self, prepared: Prepared) -> None:
        """Raises UserError as `open_tfds_text` does."""
        self._prepared = prepared
        self._feature = _text_feature(prepared)
        names = {"train": "train"}
        if prepared.has("test"):
            names["test"] = "test"
        if prepared.has("validation"):
            names["validation" if "test" in names else "test"] = "validation"
        self._records = {split: prepared.records(name) for split, name in names.items()}
        missing = [split for split in ("validation", "test") if split not in names]
        n = len(self._records["train"])
        each = min(100_000, max(1, n // 100))
        if n <= each * len(missing):
            raise prepared.damaged(
                f"{n} documents in 'train' of {prepared.full_name} are too few to hold some out"
            )
        # By the whole name without the version: a new release of a dataset then holds out the same indices.
        order = hash_order(prepared.full_name.rsplit("/", 1)[0], n, each * len(missing))
        self._held = {
            split: np.sort(order[j * each : (j + 1) * each]) for j, split in enumerate(missing)
        }
        self._all_held = np.sort(order)
        self._from = {split: names.get(split, "held out of train") for split in SPLITS}

        sizes = {
            split: (len(records), prepared.n_bytes(names[split]))
            for split, records in self._records.items()
        }
        facts = json.dumps(
            [VERSION, prepared.full_name, self._feature, sizes, self._from], sort_keys=True
        )
        self.key = f"tfds-{hashlib.sha256(facts.encode()).hexdigest()[:24]}"

    def documents(self, split: str) -> Iterator[bytes]:
        """All of them, in the order of the prepared dataset. Raises UserError at a record that is damaged."""
        records = self._records["train" if split in self._held else split]
        for indices in self._indices(split):
            for i, record in ticking(zip(indices.tolist(), records.many(indices))):
                yield records.text(i, record, self._feature)

    def _indices(self, split: str) -> Iterator[np.ndarray]:
        """Ascending, a chunk at a time."""
        if split in self._held:
            held = self._held[split]
            yield from (held[start : start + CHUNK] for start in range(0, len(held), CHUNK))
            return
        n = len(self._records[split])
        left_out = self._all_held if split == "train" else np.zeros(0, np.int64)
        for start in range(0, n, CHUNK):
            lo, hi = np.searchsorted(left_out, [start, start + CHUNK])
            yield np.setdiff1d(
                np.arange(start, min(n, start + CHUNK)), left_out[lo:hi], assume_unique=True
            )

    def record(self) -> dict[str, Any]:
        """JSON-able, for the run's record."""
        sizes = {split: len(records) for split, records in self._records.items()}
        sizes |= {split: len(held) for split, held in self._held.items()}
        sizes["train"] -= len(self._all_held)
        return {
            "dataset": self._prepared.full_name,
            "directory": self._prepared.directory,
            "feature": self._feature,
            "from": self._from,
            "n_examples": {split: sizes[split] for split in SPLITS},
        }


def _text_feature(prepared: Prepared) -> str:
    """Raises UserError where it is not plain which feature holds the documents."""
    import tensorflow_datasets as tfds

    texts = [
        name
        for name, feature in prepared.features.items()
        if isinstance(feature, tfds.features.Text)
    ]
    if "text" in prepared.features:
        texts = ["text"]
    if len(texts) != 1:
        which = f"{len(texts)} features of text" if texts else "no feature of text"
        remedy = f"it has {which} among {', '.join(sorted(prepared.features))}, and none is named 'text': choose another dataset."
        raise ConfigError(prepared.key, prepared.value, remedy)
    return texts[0]


def _one_line(error: Exception) -> str:
    """The kind of an error and the beginning of what it says."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:200]}{'…' if len(words) > 200 else ''}"

"""Datasets by their name in TensorFlow Datasets, read from array_record without TensorFlow.

The official test split is never used for validation: without a validation split, some training
examples are held out. A missing dataset is refused with the command that prepares it.
"""

import difflib
import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from uoe_jax.data.examples import SPLITS, Documents, Example, Indexed, Input, LabelledSource
from uoe_jax.data.prepared import Records, one_line
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError, UserError

VERSION = "1"  # of the rules below: raise it when they choose other examples, or caches go stale
CHUNK = 256  # records read at a time from a whole split
_INSTALLED = "where tensorflow-datasets and tensorflow-cpu are installed"


class Labelled(NamedTuple):
    """How a dataset of labelled examples is used; the feature of the label is 'label'."""

    name: str  # in TensorFlow Datasets
    n_classes: int
    feature: str  # of the input: 'text' or 'image'
    shape: tuple[int, ...] = ()  # of every image, 0 where images differ
    test: str = "test"
    one_in: int = 10  # one of so many training examples is held out as validation
    last: bool = False  # the last are held out, as in Long Range Arena; else by `hash_order`
    manual: str = ""  # what must be downloaded by hand before it can be prepared


_ILSVRC = "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar from image-net.org"
IMAGENET = Labelled("imagenet2012", 1000, "image", (0, 0, 3), "validation", 100, manual=_ILSVRC)
LABELLED = {
    "imdb": Labelled("imdb_reviews/plain_text", 2, "text"),
    "cifar10": Labelled("cifar10", 10, "image", (32, 32, 3), last=True),
    "cifar100": Labelled("cifar100", 100, "image", (32, 32, 3), last=True),  # fine labels
    "imagenet2012": IMAGENET,
}


def open_named(source: str, path: str) -> LabelledSource:
    """The labelled dataset of data.source, in the directory `path` or (empty) tfds's default."""
    spec = LABELLED[source]
    dataset = NamedDataset("data.source", source, spec.name, path, spec.manual)
    name = dataset.full_name
    for feature in (spec.feature, "label"):
        if feature not in dataset.features:
            has = ", ".join(sorted(dataset.features))
            raise dataset.damaged(f"{name} has no feature {feature!r}, only {has}")
    train, test = dataset.records("train"), dataset.records(spec.test)
    n = len(train)
    n_held = max(1, n // spec.one_in)
    if n_held >= n:
        raise dataset.damaged(f"one training example of {name} leaves none to hold out")
    held = np.arange(n - n_held, n) if spec.last else np.sort(hash_order(spec.name, n, n_held))
    kept = np.setdiff1d(np.arange(n), held, assume_unique=True)
    every = np.arange(len(test))
    splits = {"train": (train, kept), "validation": (train, held), "test": (test, every)}

    def examples(split: str) -> Indexed:
        records, at = splits[split]
        return Indexed(len(at), lambda i: _example(records, int(at[i]), spec))

    facts = {
        "dataset": name,
        "directory": dataset.directory,
        "from": {"train": "train", "validation": "held out of train", "test": spec.test},
        "n_examples": {split: len(at) for split, (_, at) in splits.items()},
    }
    return LabelledSource(spec.n_classes, examples, facts)


def open_tfds_text(name: str, path: str) -> Documents:
    """The documents of a text dataset by its name, such as 'lm1b' or 'c4/en:3.1.0'.

    They are the feature 'text', or else the only feature of text. The test is the split 'test', or
    else 'validation' (as results on datasets without a test split are reported). A split that is
    missing then is held out of 'train': 1 % of it, at most 100,000 documents. The key is a hash of
    name, version, sizes and these rules, not of the content. Path: as of `open_named`.
    """
    if not name:
        remedy = "data.source='tfds_text' needs the name of a dataset, such as 'lm1b'."
        raise ConfigError("data.name", name, remedy)
    dataset = NamedDataset("data.name", name, name, path)
    feature = _text_feature(dataset)
    names = {split: split for split in SPLITS if split == "train" or split in dataset.splits}
    if "test" not in names and "validation" in names:
        names["test"] = names.pop("validation")
    records = {split: dataset.records(name) for split, name in names.items()}
    missing = [split for split in ("validation", "test") if split not in names]
    n = len(records["train"])
    each = min(100_000, max(1, n // 100))
    if n <= each * len(missing):
        few = f"{n} documents in 'train' of {dataset.full_name} are too few to hold some out"
        raise dataset.damaged(few)
    # By the name without the version: a new release holds out the same indices.
    order = hash_order(dataset.full_name.rsplit("/", 1)[0], n, each * len(missing))
    held = {s: np.sort(order[j * each : (j + 1) * each]) for j, s in enumerate(missing)}

    def documents(split: str) -> Iterator[bytes]:
        of_split = records["train" if split in held else split]
        chunks: Iterable[np.ndarray]
        if split in held:
            chunks = np.split(held[split], range(CHUNK, len(held[split]), CHUNK))
        else:
            chunks = _all_but(np.sort(order) if split == "train" else order[:0], len(of_split))
        for at in chunks:
            for i, record in ticking(zip(at.tolist(), of_split.many(at))):
                yield _text(of_split, i, record[feature], feature)

    origin = {split: names.get(split, "held out of train") for split in SPLITS}
    n_bytes = {s: getattr(dataset.splits.get(name), "num_bytes", 0) for s, name in names.items()}
    sizes = {split: (len(of_split), n_bytes[split]) for split, of_split in records.items()}
    content = json.dumps([VERSION, dataset.full_name, feature, sizes, origin], sort_keys=True)
    n_examples = {s: len(held[s] if s in held else records[s]) for s in SPLITS}
    n_examples["train"] -= len(order)
    facts = {
        "dataset": dataset.full_name,
        "directory": dataset.directory,
        "feature": feature,
        "from": origin,
        "n_examples": n_examples,
    }
    key = f"tfds-{hashlib.sha256(content.encode()).hexdigest()[:24]}"
    return Documents(key, documents, facts)


def _all_but(excluded: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """The indices 0 … n-1 without the ascending `excluded`, a chunk at a time."""
    for start in range(0, n, CHUNK):
        lo, hi = np.searchsorted(excluded, [start, start + CHUNK])
        chunk = np.arange(start, min(n, start + CHUNK))
        yield np.setdiff1d(chunk, excluded[lo:hi], assume_unique=True)


def hash_order(salt: str, n: int, k: int) -> np.ndarray:
    """int64 [k]: the first of the indices 0 … n-1 in an order of `salt` and the index alone.

    The order is that of splitmix64(i + the first 64 bits of SHA-256 of the salt); memory is O(k).
    """
    offset = np.uint64(int.from_bytes(hashlib.sha256(salt.encode()).digest()[:8], "big"))
    kept, hashes = np.zeros(0, np.int64), np.zeros(0, np.uint64)
    for start in ticking(range(0, n, 1 << 20)):
        kept = np.append(kept, np.arange(start, min(n, start + (1 << 20))))
        hashes = _splitmix64(kept.astype(np.uint64) + offset)
        first = np.argpartition(hashes, min(k, len(kept) - 1))[:k]
        kept, hashes = kept[first], hashes[first]
    return kept[np.argsort(hashes)]


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Vigna's mixing of uint64 (public domain), modulo 2^64; distinct for distinct x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class NamedDataset:
    """A dataset in a directory of TensorFlow Datasets (imports it, half a second)."""

    def __init__(self, key: str, value: str, name: str, path: str, manual: str = "") -> None:
        """key, value: of the configuration, for errors."""
        import tensorflow_datasets as tfds

        self._key, self._value, self._manual = key, value, manual
        where = path or "TensorFlow Datasets' own directory"
        data_dir = f" --data_dir={shlex.quote(path)}" if path else ""
        build = f"tfds build {name} --file_format=array_record{data_dir}"
        self._prepare = f"with `{build}` {_INSTALLED}"
        self._choose = f"set {key} or data.path to another."
        try:
            self._builder = tfds.builder(name, data_dir=path or None)
        except tfds.core.DatasetNotFoundError as error:
            base = name.split("/")[0].split(":")[0]
            known = tfds.list_builders(with_community_datasets=False)
            near = difflib.get_close_matches(base, known, n=1, cutoff=0.0)[0]
            unknown = f"is not prepared in {where}, nor known without TensorFlow"
            remedy = f"did you mean {near!r}? Else prepare it {self._prepare}."
            raise self.refusal(f"{unknown}: {remedy}") from error
        except Exception as error:  # an unknown configuration or version, damaged files
            bad = f"TensorFlow Datasets cannot open it in {where} ({one_line(error)})"
            again = f"if its files are damaged, delete them and prepare it again, {self._prepare}."
            raise self.refusal(f"{bad}: {self._choose} Or, {again}") from error
        self.directory = str(self._builder.data_dir)
        self._exists = epath.Path(self.directory).exists()
        if self._exists:  # its files may differ from what this release of tfds says of them
            try:
                self._builder = tfds.builder_from_directory(self.directory)
            except Exception as error:
                raise self._unreadable(error) from error
        info = self._builder.info
        self.full_name = info.full_name  # with configuration and version
        self.features, self.splits = info.features, info.splits  # by name

    def records(self, split: str) -> Records:
        """Raises UserError where the split is missing, empty, or not array_record."""
        if self.splits and split not in self.splits:
            has = f"{self.full_name} has no split {split!r}, only {', '.join(self.splits)}"
            raise self.refusal(f"{has}: {self._choose}")
        try:
            source = self._builder.as_data_source(split=split)
            n = len(source)
        except Exception as error:
            raise self._unreadable(error) from error
        if not n:
            empty = f"the split {split!r} of {self.full_name} holds no example"
            raise self.refusal(f"{empty}: {self._choose}")
        return Records(source, split, self.damaged)

    def damaged(self, what: str) -> UserError:
        remedy = f"delete that directory and prepare it again, {self._prepare}."
        return UserError(f"{self.directory}: {what}: {remedy}")

    def refusal(self, remedy: str) -> ConfigError:
        return ConfigError(self._key, self._value, remedy)

    def _unreadable(self, error: Exception) -> UserError:
        if not self._exists:
            manual = f"put {self._manual} into its downloads/manual, then " if self._manual else ""
            missing = f"is not prepared in {self.directory}"
            return self.refusal(f"{missing}: {manual}prepare it {self._prepare}.")
        if isinstance(error, NotImplementedError):
            other = f"is prepared in {self.directory}, but not as array_record, for access by index"
            place = f"--dataset_version_dir={shlex.quote(self.directory)}"
            convert = f"`tfds convert_format {place} --out_file_format=array_record`"
            return self.refusal(f"{other}: add that with {convert} {_INSTALLED}.")
        return self.damaged(f"the prepared dataset cannot be read ({one_line(error)})")


def _example(records: Records, i: int, spec: Labelled) -> Example:
    record = records[i]
    value, label = record[spec.feature], np.asarray(record["label"])
    if spec.shape:
        data: Input = _image(records, i, value, spec)
    else:
        data = _text(records, i, value, spec.feature)
    if label.ndim or label.dtype.kind not in "iu" or not 0 <= label < spec.n_classes:
        wanted = f"where 0 to {spec.n_classes - 1} is expected"
        raise records.wrong(i, f"has the label {label.tolist()!r} {wanted}")
    return Example((data,), int(label))


def _image(records: Records, i: int, value: Any, spec: Labelled) -> np.ndarray:
    image = np.asarray(value)
    fits = all(want in (0, got) for want, got in zip(spec.shape, image.shape))
    if image.ndim != len(spec.shape) or not fits or image.dtype != np.uint8 or not image.size:
        wanted = f"uint8 [{','.join(str(size or 'any') for size in spec.shape)}]"
        found = f"{image.dtype} {list(image.shape)}"
        raise records.wrong(i, f"has {found} where {wanted} is expected in {spec.feature!r}")
    return image


def _text(records: Records, i: int, value: Any, feature: str) -> bytes:
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "surrogateescape")
    raise records.wrong(i, f"has {type(value).__name__} where text is expected in {feature!r}")


def _text_feature(dataset: NamedDataset) -> str:
    """Raises UserError where several features, or none, may hold the documents."""
    import tensorflow_datasets as tfds

    if "text" in dataset.features:
        return "text"
    texts = [name for name, f in dataset.features.items() if isinstance(f, tfds.features.Text)]
    if len(texts) != 1:
        which = f"{len(texts)} features of text" if texts else "no feature of text"
        has = f"it has {which} among {', '.join(sorted(dataset.features))}"
        raise dataset.refusal(f"{has}, and none is named 'text': choose another dataset.")
    return texts[0]

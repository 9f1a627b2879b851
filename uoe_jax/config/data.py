"""The sections of the configuration that say what is learned from: sources, tokens, and what is done to images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from uoe_jax.config.fields import key

FROM_FILE = ("bpe", "library")  # tokenizers that data.tokenizer_file holds


class Facts(NamedTuple):
    """What a labelled source gives: classes, inputs of an example, and (height, width, channels) of images; 0: any.

    resize: images are of every size, and made to fit. text: a tokenizer makes tokens of the inputs. n_ids: where neither image
    nor text, how many token ids there are.
    """

    n_classes: int
    n_inputs: int = 1
    image: tuple[int, int, int] | None = None
    resize: bool = False
    text: bool = False
    n_ids: int = 256


class Source(NamedTuple):
    """A value of data.source.

    Attributes:
      facts: of labelled examples, for a classifier; None: documents, for a language model.
      open: of a source that a user added: takes the `data` section; None: it is built in.
    """

    facts: Facts | None = None
    open: Callable[[DataConfig], Any] | None = None


SOURCES = {  # `data.registry.add_source` adds to these
    **{name: Source() for name in ("stdlib", "text", "wikitext103", "tfds_text")},
    "listops": Source(Facts(10)),
    "imdb": Source(Facts(2, text=True)),
    "aan": Source(Facts(2, n_inputs=2, text=True)),
    "pathfinder": Source(Facts(2, image=(0, 0, 1))),
    "digits": Source(Facts(10, image=(8, 8, 1))),
    "cifar10": Source(Facts(10, image=(32, 32, 3))),
    "cifar100": Source(Facts(100, image=(32, 32, 3))),
    "imagenet2012": Source(Facts(1000, image=(0, 0, 3), resize=True)),
}


def sources_of(task: str) -> list[str]:
    """The values of data.source for model.task: of documents ("language") or labelled examples."""
    return [name for name, s in SOURCES.items() if (s.facts is None) == (task == "language")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListopsConfig:
    """Generated ListOps expressions (data.source='listops'); the defaults are those of Long Range Arena."""

    min_length: int = key(
        500,
        "expressions have more tokens than this, the closing bracket of an operator being one",
        low=1,
    )
    max_length: int = key(2000, "expressions have fewer tokens than this", low=1)
    max_depth: int = key(10, "levels, the last one of digits alone", low=1, high=100)
    max_args: int = key(10, "arguments of an operator", low=2, high=100)
    n_train: int = key(96_000, "training examples", low=1)
    n_eval: int = key(2_000, "examples of the validation split, and of the test split", low=1)
    seed: int = key(0, "which examples", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathfinderConfig:
    """Generated Pathfinder images (data.source='pathfinder' without data.path)."""

    size: int = key(32, "pixels of a side", low=16, high=512)
    length: int = key(6, "dashes of the two long paths", low=2, high=30)
    distractors: int = key(
        6, "short paths beside them, at most: as many as find room", low=0, high=100
    )
    n_train: int = key(160_000, "training examples", low=1)
    n_eval: int = key(20_000, "examples of the validation split, and of the test split", low=1)
    seed: int = key(0, "which examples", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where examples come from, and how text becomes tokens."""

    source: str = key("stdlib", "where documents, or labelled examples, come from", choices=SOURCES)
    path: str = key(
        "",
        "directory or glob of the source, or where TensorFlow Datasets keeps its data; empty: the source's own place",
        free=True,
    )
    name: str = key(
        "", "the dataset's name with source='tfds_text', such as 'lm1b' or 'c4/en:3.1.0'"
    )
    tokenizer: str = key(
        "bytes",
        "tokens are bytes, exact pieces of words (BPE), words, or what any tokenizer.json makes",
        choices=("bytes", "bpe", "words", "library"),
    )
    tokenizer_file: str = key(
        "",
        "of tokenizer='bpe' and 'library': what `uoe tokenizer train` or a tokenizers library wrote",
        free=True,
    )
    separator: str = key(
        "",
        "of tokenizer='bpe' and 'library': the token that ends a document, by its text; empty: as the files of the tokenizer say",
    )
    start: str = key(
        "", "the token that begins a document; empty: as the files of the tokenizer say"
    )
    min_count: int = key(
        3,
        "of tokenizer='words': how often a word must occur in the training split to be one",
        low=1,
    )
    buckets: int = key(
        1,
        "lengths a batch of labelled text is padded to: this many, evenly up to model.context_length",
        low=1,
    )
    sort_window: int = key(
        1,
        "with buckets: consecutive training batches that share their rows out by length, so that most need little padding",
        low=1,
    )
    held_out: int = key(
        1,
        "of source='text': percent of the documents for validation, and as many for test",
        low=1,
        high=40,
    )
    listops: ListopsConfig = dataclasses.field(default_factory=ListopsConfig)
    pathfinder: PathfinderConfig = dataclasses.field(default_factory=PathfinderConfig)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What training does to images, by a draw of its own for every row of every step; evaluation never does."""

    crop_padding: int = key(
        0,
        "black pixels added on every side before a random crop of the image's size",
        low=0,
        high=512,
    )
    crop_area: float = key(
        1.0,
        "smallest share of the image that a random crop keeps, which is then resized; 1: none",
        above=0,
        high=1,
    )
    flip: bool = key(False, "mirror every second image, left to right")
    rand_layers: int = key(0, "RandAugment: operations on each image", low=0, high=16)
    rand_magnitude: int = key(9, "RandAugment: strength of the operations, of 30", low=0, high=30)
    mixup: float = key(0.0, "alpha of mixup; 0: none", low=0, high=100)
    cutmix: float = key(
        0.0,
        "alpha of CutMix, which takes turns with mixup where both are on; 0: none",
        low=0,
        high=100,
    )

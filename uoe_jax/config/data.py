"""Sections of the configuration for data: sources, tokenizers and image augmentation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from uoe_jax.config.fields import free_key, key

FROM_FILE = ("bpe", "library")  # tokenizers that data.tokenizer_file holds
TOKENIZERS = ("bytes", "bpe", "words", "library")


class Facts(NamedTuple):
    """What is known of a labelled source before it is read."""

    n_classes: int
    n_inputs: int = 1  # per example
    image: tuple[int, int, int] | None = None  # (height, width, channels) of its images; 0: any
    resize: bool = False  # its images have all sizes and are resized
    text: bool = False  # its inputs are text, for a tokenizer
    n_ids: int = 256  # token ids of inputs that are neither images nor text


class Source(NamedTuple):
    """A value of data.source."""

    facts: Facts | None = None  # of labelled examples; None: documents, for a language model
    open: Callable[["DataConfig"], Any] | None = None  # of a source that a user added


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
    """Generated ListOps expressions (data.source='listops'), with Long Range Arena's defaults."""

    # Tokens of an expression count the closing bracket of every operator.
    min_length: int = key(500, "expressions have more tokens than this", low=1)
    max_length: int = key(2000, "expressions have fewer tokens than this", low=1)
    max_depth: int = key(10, "levels of nesting; the last has digits only", low=1, high=100)
    max_args: int = key(10, "maximum number of arguments per operator", low=2, high=100)
    n_train: int = key(96_000, "training examples", low=1)
    n_eval: int = key(2_000, "validation examples, and as many test examples", low=1)
    seed: int = key(0, "seed of the generator", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PathfinderConfig:
    """Generated Pathfinder images (data.source='pathfinder' without data.path)."""

    size: int = key(32, "side of an image in pixels", low=16, high=512)
    length: int = key(6, "dashes of each of the two long paths", low=2, high=30)
    distractors: int = key(6, "maximum number of short distractor paths", low=0, high=100)
    n_train: int = key(160_000, "training examples", low=1)
    n_eval: int = key(20_000, "validation examples, and as many test examples", low=1)
    seed: int = key(0, "seed of the generator", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Source of the examples, and the tokenizer of text."""

    source: str = key("stdlib", "source of documents or labelled examples", choices=SOURCES)
    path: str = free_key(
        "", "directory or glob of files, or data directory of TFDS; empty: the default"
    )
    name: str = key("", "dataset of source='tfds_text', such as 'lm1b' or 'c4/en:3.1.0'")
    tokenizer: str = key(
        "bytes", "byte, BPE or word tokenizer, or any tokenizer.json (library)", choices=TOKENIZERS
    )
    tokenizer_file: str = free_key(
        "", "file tokenizer.json of 'bpe' or 'library': of `uoe tokenizer` or of Hugging Face"
    )
    separator: str = key("", "end-of-document token ('bpe', 'library'); empty: the tokenizer's own")
    start: str = key("", "beginning-of-document token; empty: the tokenizer's own")
    min_count: int = key(3, "minimum count of a word in the training split ('words')", low=1)
    buckets: int = key(1, "number of padded lengths of labelled text, evenly spaced", low=1)
    sort_window: int = key(1, "with buckets: training batches sorted by length together", low=1)
    held_out: int = key(
        1, "percent of documents for validation, and for test, with source='text'", low=1, high=40
    )
    listops: ListopsConfig = ListopsConfig()
    pathfinder: PathfinderConfig = PathfinderConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentation of training images, drawn anew for every row of every step."""

    crop_padding: int = key(0, "pixels of padding before a random crop", low=0, high=512)
    crop_area: float = key(1.0, "smallest area of random resized crops; 1: off", above=0, high=1)
    flip: bool = key(False, "mirror half of the images, left to right")
    rand_layers: int = key(0, "RandAugment: operations per image", low=0, high=16)
    rand_magnitude: int = key(9, "RandAugment: strength of the operations", low=0, high=30)
    mixup: float = key(0.0, "alpha of mixup; 0: off", low=0, high=100)
    cutmix: float = key(0.0, "alpha of CutMix, in turn with mixup; 0: off", low=0, high=100)

"""What sources provide: documents for a language model, labelled examples for a classifier."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

SPLITS = ("train", "validation", "test")

Input = bytes | np.ndarray  # text, token ids (int [T]) or an image (uint8 [height,width,channels])


class TextSource(Protocol):
    """Where documents come from."""

    @property
    def key(self) -> str: ...  # names this content under these rules; caches are keyed by it
    def documents(self, split: str, /) -> Iterable[bytes]: ...
    def record(self) -> dict[str, Any]: ...  # JSON-able, for the run's record


@dataclasses.dataclass(frozen=True)
class Documents:
    """A built-in `TextSource`; `facts` are the record."""

    key: str
    documents: Callable[[str], Iterable[bytes]]
    facts: dict[str, Any]

    def record(self) -> dict[str, Any]:
        return self.facts


class Example(NamedTuple):
    """One labelled example."""

    inputs: tuple[Input, ...]  # one, or two to compare
    label: int  # the class, from 0


class Examples(Protocol):
    """One split, by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Example: ...


class ExampleSource(Protocol):
    """Where labelled examples come from."""

    @property
    def n_classes(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...  # 0 for text and images; else the inputs are ids below it
    def examples(self, split: str, /) -> Examples: ...
    def record(self) -> dict[str, Any]: ...  # JSON-able, for the run's record


@dataclasses.dataclass(frozen=True)
class Indexed:
    """`Examples` that are computed from their index."""

    n: int
    read: Callable[[int], Example]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < self.n:
            raise IndexError(f"example {i} of {self.n}")
        return self.read(i)


@dataclasses.dataclass(frozen=True)
class LabelledSource:
    """A built-in `ExampleSource`; `facts` are the record."""

    n_classes: int
    examples: Callable[[str], Examples]
    facts: dict[str, Any]
    vocab_size: int = 0

    def record(self) -> dict[str, Any]:
        return self.facts

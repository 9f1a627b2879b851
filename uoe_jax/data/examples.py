"""Labelled examples by index, and the rows of a batch that are made of them."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

Input = bytes | np.ndarray


class Example(NamedTuple):
    """One labelled example.

    Attributes:
      inputs: one, or two to be compared: text (bytes), token ids (int [T]), or an image (uint8 [height,width,channels]).
      label: the class, from 0.
    """

    inputs: tuple[Input, ...]
    label: int


class Examples(Protocol):
    """One split, by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Example: ...


class ExampleSource(Protocol):
    """Where labelled examples come from.

    Attributes:
      n_classes: labels are below it.
      vocab_size: 0 for text and images; else the inputs are token ids below it.
    """

    @property
    def n_classes(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def examples(self, split: str) -> Examples: ...
    def record(self) -> dict[str, Any]: ...

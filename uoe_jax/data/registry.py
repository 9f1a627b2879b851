"""From data.source to where the examples come from, and from data.tokenizer to tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from uoe_jax.config.data import FACTS, FROM_FILE, SOURCES, TEXT, DataConfig, Facts
from uoe_jax.config.schema import Config
from uoe_jax.data.examples import ExampleSource
from uoe_jax.data.tokenizers.load import Tokenizer, WordTokenizer, load_tokenizer, stored
from uoe_jax.errors import RunError, UserError
from uoe_jax.runtime_env import expanded


class TextSource(Protocol):
    """Where documents come from. key: names this content under these rules; caches derived from it are keyed by it."""

    @property
    def key(self) -> str: ...
    def documents(self, split: str) -> Iterable[bytes]: ...
    def record(self) -> dict[str, Any]: ...


_own: dict[str, Callable[[DataConfig], Any]] = {}


def add_source(
    name: str,
    opened: Callable[[DataConfig], TextSource | ExampleSource],
    facts: Facts | None = None,
) -> None:
    """Makes `data.source=name` mean a source of one's own, in every process that calls this, such as from a config file.

    Args:
      opened: the `data` section -> documents of a language model, or with `facts` the examples of a classifier. Among several
        processes every document counts as progress; what takes longer before the first calls `watch.tick` as it goes on.

    Raises:
      ValueError: the project has a source of that name.
    """
    if name in SOURCES and name not in _own:
        raise ValueError(f"data.source={name!r} is one of the project's own; choose another name")
    if name not in _own:
        SOURCES.append(name)
        if facts is None:
            TEXT.append(name)
    if facts is not None:
        FACTS[name] = facts
    _own[name] = opened


def text_source(c: DataConfig, cache_dir: Path, quiet: bool = False) -> TextSource:
    """The documents of a language model; the modules are imported as they are needed. Raises UserError.

    quiet: nothing is said of files that were passed over, as it was said before.
    """
    from uoe_jax.data.sources import stdlib, text, wikitext
    from uoe_jax.data.sources import tfds as named

    opened: dict[str, Callable[[], TextSource]] = {
        "stdlib": lambda: stdlib.prepare(c.path, cache_dir),
        "text": lambda: text.open_text(c.path, cache_dir, c.held_out, quiet),
        "wikitext103": lambda: wikitext.open_wikitext103(c.path, cache_dir),
        "tfds_text": lambda: named.open_tfds_text(c.name, c.path),
    }
    return _own[c.source](c) if c.source in _own else opened[c.source]()


def labelled_source(c: DataConfig, cache_dir: Path) -> ExampleSource:
    """The examples of a classifier. Raises UserError."""
    from uoe_jax.data.sources import aan, digits, listops, pathfinder
    from uoe_jax.data.sources import tfds as named

    opened: dict[str, Callable[[], ExampleSource]] = {
        "listops": lambda: listops.ListOps(c.listops),
        "aan": lambda: aan.open_aan(c.path, cache_dir),
        "pathfinder": lambda: pathfinder.open_pathfinder(c.path, c.pathfinder),
        "digits": digits.Digits,
    }
    if c.source in _own:
        return _own[c.source](c)
    return opened[c.source]() if c.source in opened else named.open_named(c.source, c.path)


def tokenizer_of(
    c: DataConfig, documents: Callable[[], Iterable[bytes]], cached: Path | None = None
) -> Tokenizer:
    """The tokenizer that data.tokenizer asks for; a vocabulary of words is counted in `documents`, the training split.

    cached: where that vocabulary stays for the next run.
    """
    known = load_tokenizer(c.tokenizer, c.tokenizer_file, c.separator, c.start)
    if known is not None:
        return known
    if cached is not None and cached.is_file():
        with contextlib.suppress(
            UserError, OSError, UnicodeError
        ):  # a damaged one is counted again
            return stored(cached.read_text(encoding="utf-8"))
    words = WordTokenizer.train(documents(), c.min_count)
    if cached is not None:
        from uoe_jax.workdir import write_text

        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_text(cached, words.to_json())
        except OSError as error:
            raise RunError(
                f"{cached}: cannot be written ({error}): free space there or set UOE_CACHE elsewhere."
            ) from error
    return words


def known_vocabulary(c: Config) -> tuple[int, Tokenizer | None]:
    """(token ids that the model must know, the tokenizer of text), as far as they are known before data are read.

    0 ids: the inputs are images, words that are still to be counted, or pieces of words whose file is not there.
    """
    m, d = c.model, c.data
    if m.stem == "image":
        return 0, None
    if d.source == "listops":
        from uoe_jax.data.sources.listops import SYMBOLS

        return len(SYMBOLS), None
    if d.source in FACTS and not FACTS[d.source].text:
        return FACTS[d.source].n_ids, None
    file = expanded(d.tokenizer_file, "config.data.tokenizer_file")
    if d.tokenizer in FROM_FILE and not (file and Path(file).is_file()):
        return 0, None  # a plan can do without, and a run that has kept its own
    tokenizer = load_tokenizer(d.tokenizer, d.tokenizer_file, d.separator, d.start)
    return (tokenizer.vocab_size if tokenizer else 0), tokenizer

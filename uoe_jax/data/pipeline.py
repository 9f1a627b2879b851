"""Batches as pure functions of (seed, step): without iterator state, resuming needs the step alone.

Row r of step s is entry s * B + r of one endless shuffled order. A process reads only its own rows
of the global batch, so the number of processes or devices changes neither a row nor its place.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config.data import SOURCES
from uoe_jax.config.schema import Config
from uoe_jax.config.validate import check_source
from uoe_jax.data.examples import SPLITS, Examples, ExampleSource, TextSource
from uoe_jax.data.registry import known_vocabulary, labelled_source, text_source
from uoe_jax.data.rows import Batch, LabelledRows, PackedRows, Row
from uoe_jax.data.store import open_or_build
from uoe_jax.data.tokenizers.base import Tokenizer
from uoe_jax.data.tokenizers.load import tokenizer_of
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError
from uoe_jax.runtime_env import default_cache_dir as default_cache_dir

Rows = PackedRows | LabelledRows  # one split, by index
LocalRows = Iterable[int] | None  # this process's rows of a global batch; None: all


@dataclasses.dataclass(frozen=True, eq=False)
class DataBundle:
    """The three splits and what the model must fit."""

    train: Rows
    validation: Rows
    test: Rows
    tokenizer: Tokenizer | None  # of text
    vocab_size: int  # of the token ids; 0 for images
    record: dict[str, Any]  # JSON-able facts for the run's record

    def described(self) -> str:
        sizes = " / ".join(f"{len(getattr(self, split)):,}" for split in SPLITS)
        text = f"{sizes} rows of {' / '.join(SPLITS)}"
        n_files, n_bytes = self.record.get("n_files"), self.record.get("n_bytes")
        if isinstance(n_files, int) and isinstance(n_bytes, int):  # some sources count by split
            text += f" from {n_files:,} files of {n_bytes / 1e6:,.3f} MB"
        return text


def load(config: Config, cache_dir: Path, tokenizer: Tokenizer | None = None) -> DataBundle:
    """Prepares, tokenises and packs all splits. tokenizer: a run's own, else the configured one."""
    check_source(config)
    make = _text_splits if SOURCES[config.data.source].facts is None else _labelled_splits
    rows, tokenizer, vocab_size, facts = make(config, cache_dir, tokenizer)
    n_rows = {split: len(rows[split]) for split in SPLITS}
    for split, n in n_rows.items():
        if not n:
            remedy = f"its {split} split holds nothing to learn from: choose another data.path."
            raise ConfigError("data.source", config.data.source, remedy)
    record = {"source": config.data.source, **facts, "n_rows": n_rows}
    return DataBundle(**rows, tokenizer=tokenizer, vocab_size=vocab_size, record=record)


_Splits = tuple[Mapping[str, Rows], Tokenizer | None, int, dict[str, Any]]


def _text_splits(config: Config, cache_dir: Path, tokenizer: Tokenizer | None) -> _Splits:
    """(rows by split, tokenizer, vocabulary size, facts)."""
    data, model = config.data, config.model
    source = text_source(data, cache_dir)
    if tokenizer is None:
        cached = cache_dir / "words" / f"{source.key}-{data.min_count}.json"
        tokenizer = tokenizer_of(data, lambda: source.documents("train"), cached)
    rows, stores = {}, {}
    for split in SPLITS:
        read = functools.partial(source.documents, split)
        store = open_or_build(read, tokenizer, cache_dir, source.key, split)
        rows[split] = PackedRows(store, model.context_length, model.patch_multiple, tokenizer)
        stores[split] = store
    facts = {
        "n_documents": {split: len(store) for split, store in stores.items()},
        **_record(source),
        "tokenizer": tokenizer.fingerprint,
        "n_targets": {split: rows[split].n_targets for split in SPLITS},
    }
    unknown = {split: s.bytes_unknown for split, s in stores.items() if s.bytes_unknown}
    if unknown:
        split, why = next(iter(unknown.items()))
        facts["bits_per_byte"] = f"not reported for {', '.join(unknown)}: {why} ({split})"
    return rows, tokenizer, tokenizer.vocab_size, facts


def _labelled_splits(config: Config, cache_dir: Path, tokenizer: Tokenizer | None) -> _Splits:
    source = labelled_source(config.data, cache_dir)
    facts = SOURCES[config.data.source].facts
    if tokenizer is None and facts is not None and facts.text:
        tokenizer = tokenizer_of(config.data, lambda: _texts(source.examples("train")))
    make = functools.partial(LabelledRows, config=config, tokenizer=tokenizer)
    rows = {split: make(source.examples(split), source.n_classes, split) for split in SPLITS}
    fingerprint = tokenizer.fingerprint if tokenizer else None
    ids = tokenizer.vocab_size if tokenizer else source.vocab_size or known_vocabulary(config)[0]
    return rows, tokenizer, ids, {**_record(source), "tokenizer": fingerprint}


def _texts(examples: Examples) -> Iterator[bytes]:
    for i in ticking(range(len(examples))):
        for text in examples[i].inputs:
            assert isinstance(text, bytes), type(text)
            yield text


def _record(source: TextSource | ExampleSource) -> dict[str, Any]:
    """The source's record; without a hash of the content, it gets one of the other facts."""
    record = source.record()
    known = {name: value for name, value in record.items() if name != "directory"}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return {"sha256": digest, **record}


class TrainBatches:
    """`batches[step]`: dict of arrays [B, …], or of `local_rows` of them; reshuffled every epoch.

    window: as many consecutive batches are filled by length and come in a drawn order; 1: none.
    """

    def __init__(
        self, rows: Rows, batch_size: int, seed: int, local_rows: LocalRows = None, window: int = 1
    ) -> None:
        import grain  # imports jax, a second or two, which only training pays for

        self._rows, self._batch_size, self._seed = rows, batch_size, seed
        self._local_rows = _checked_rows(local_rows, batch_size)
        self._window, self._group = window, (-1, [[0]])
        # grain orders indices only: it would measure each row that it fetched.
        self._order = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat(None)

    def __getitem__(self, step: int) -> Batch:
        entries = self._entries(step)

        def row(r: int) -> Row:
            entry = entries[r]  # the next one names the row that it may be mixed with
            i, other = int(self._order[entry]), int(self._order[entry + 1])
            return self._rows.augmented(i, (self._seed, entry), other)

        return _batch(self._rows, row, self._batch_size, self._local_rows)

    def _entries(self, step: int) -> Sequence[int]:
        """The entries of the endless order that make a batch."""
        b, w = self._batch_size, self._window
        if w == 1:
            return range(step * b, (step + 1) * b)
        group, turn = divmod(step, w)
        if self._group[0] != group:
            first = group * w * b
            rows = (self._rows[int(self._order[first + i])] for i in range(w * b))
            lengths = [
                np.sum(row["segments"], axis=-1).max() for row in rows
            ]  # of a pair, the longer
            by_length = first + np.argsort(lengths, kind="stable").reshape(w, b)
            drawn = np.random.default_rng((self._seed, group)).permutation(w)
            self._group = (group, by_length[drawn].tolist())
        return self._group[1][turn]


def eval_batches(
    rows: Rows, batch_size: int, limit: int = 0, local_rows: LocalRows = None
) -> Iterator[Batch]:
    """Every row once, in order, in at most `limit` batches (0: all); padding fills the last."""
    local, padding = _checked_rows(local_rows, batch_size), Row()
    if len(rows) % batch_size:
        padding = {name: np.zeros_like(a) for name, a in rows[0].items()}
        padding |= {name: np.int32(-1) for name in ("label", "other") if name in padding}
    starts = range(0, len(rows), batch_size)
    for start in starts[: limit or None]:
        row = lambda r: rows[start + r] if start + r < len(rows) else padding  # noqa: E731
        yield _batch(rows, row, batch_size, local)


def _batch(rows: Rows, row: Callable[[int], Row], batch_size: int, local: list[int]) -> Batch:
    """The rows `local` of a global batch, of the shape that all of its rows need."""
    made = [row(r) for r in (range(batch_size) if rows.needs_all_rows else local)]
    batch = {name: np.stack([one[name] for one in made]) for name in made[0]}
    if rows.needs_all_rows:
        batch = {name: a[local] for name, a in rows.trimmed(batch).items()}
    return batch


def _checked_rows(local_rows: LocalRows, batch_size: int) -> list[int]:
    rows = list(range(batch_size)) if local_rows is None else [int(r) for r in local_rows]
    if not rows or any(not 0 <= r < batch_size for r in rows):
        raise ValueError(f"local_rows={rows} are no rows of a batch of {batch_size}")
    return rows

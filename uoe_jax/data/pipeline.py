"""Batches as pure functions of (seed, step): there is no iterator state, so resuming needs the step alone.

Row r of step s is entry s * B + r of one endless shuffled order. A process that holds some rows of the global batch
reads just those, so neither the number of processes nor of devices changes any row or its place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from uoe_jax.config.data import FACTS, TEXT
from uoe_jax.config.schema import Config
from uoe_jax.config.validate import check_source
from uoe_jax.data.examples import Examples, ExampleSource
from uoe_jax.data.packing import Batch, PackedRows, Row
from uoe_jax.data.prepared import SPLITS
from uoe_jax.data.registry import (
    TextSource,
    known_vocabulary,
    labelled_source,
    text_source,
    tokenizer_of,
)
from uoe_jax.data.rows import LabelledRows
from uoe_jax.data.store import open_or_build
from uoe_jax.data.tokenizers.load import Tokenizer
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError
from uoe_jax.runtime_env import default_cache_dir as default_cache_dir

T = TypeVar("T")


class Rows(Protocol):
    """One split as rows of a batch, by index; PackedRows or LabelledRows."""

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Row:
        """Row i as evaluation sees it: a dict of arrays, in every row of the same shapes."""

    def augmented(self, i: int, seeds: Sequence[int], other: int) -> Row:
        """Row i as training sees it, a pure function of all three: of the draws of `seeds`, and of another row it may be mixed with."""

    def n_tokens(self, i: int) -> int:
        """Tokens of row i, padding left out where there is much of it."""

    def padding_row(self) -> Row:
        """A row that counts for nothing."""

    def trimmed(self, batch: Batch) -> Batch:
        """The batch without needless padding; where `needs_all_rows`, of a global batch."""

    @property
    def needs_all_rows(self) -> bool: ...


@dataclasses.dataclass(frozen=True, eq=False)
class DataBundle:
    """The three splits, what the model must fit, and the facts for the run's record (JSON-able).

    tokenizer: of text; None where the inputs are token ids or images. vocab_size: of the token ids; 0 for images.
    """

    train: Rows
    validation: Rows
    test: Rows
    tokenizer: Tokenizer | None
    vocab_size: int
    record: dict[str, Any]

    def described(self) -> str:
        """How much there is, for the person."""
        sizes = [f"{len(getattr(self, split)):,}" for split in SPLITS]
        n_files, n_bytes = self.record.get("n_files"), self.record.get("n_bytes")
        read = ""  # of some sources it is known for every split
        if isinstance(n_files, int) and isinstance(n_bytes, int):
            read = f" from {n_files:,} files of {n_bytes / 1e6:,.3f} MB"
        return f"{' / '.join(sizes)} rows of {' / '.join(SPLITS)}{read}"


def load(config: Config, cache_dir: Path, tokenizer: Tokenizer | None = None) -> DataBundle:
    """Prepares, tokenises and packs all splits, or finds them in the cache.

    tokenizer: the one that was stored with the run; None: the one that data.tokenizer asks for.

    Raises UserError for a source that cannot be read, a split without rows, and data that the model does not fit.
    """
    check_source(config)
    if config.data.source in TEXT:
        return _load_text(config, cache_dir, tokenizer)
    return _load_labelled(config, cache_dir, tokenizer)


def _load_text(config: Config, cache_dir: Path, tokenizer: Tokenizer | None) -> DataBundle:
    data, model = config.data, config.model
    source = text_source(data, cache_dir)
    if tokenizer is None:
        tokenizer = tokenizer_of(
            data,
            lambda: source.documents("train"),
            cache_dir / "words" / f"{source.key}-{data.min_count}.json",
        )
    rows, unknown = {}, {}
    for split in SPLITS:
        store = open_or_build(
            lambda: source.documents(split), tokenizer, cache_dir, source.key, split
        )
        rows[split] = PackedRows(
            store,
            model.context_length,
            model.patch_multiple,
            tokenizer.separator,
            tokenizer.bytes_per_token,
            tokenizer.start,
        )
        if store.bytes_unknown:
            unknown[split] = store.bytes_unknown
    n_targets = {split: rows[split].n_targets for split in SPLITS}
    facts = {**described(source), "tokenizer": tokenizer.fingerprint, "n_targets": n_targets}
    if unknown:
        split, why = next(iter(unknown.items()))
        facts["bits_per_byte"] = f"not reported for {', '.join(unknown)}: {why} ({split})"
    return _bundle(config, rows, tokenizer, tokenizer.vocab_size, facts)


def _load_labelled(config: Config, cache_dir: Path, tokenizer: Tokenizer | None) -> DataBundle:
    source = labelled_source(config.data, cache_dir)
    if FACTS[config.data.source].text and tokenizer is None:
        tokenizer = tokenizer_of(config.data, lambda: _texts(source.examples("train")))
    rows = {
        split: LabelledRows(source.examples(split), source.n_classes, split, config, tokenizer)
        for split in SPLITS
    }
    facts = {**described(source), "tokenizer": tokenizer.fingerprint if tokenizer else None}
    ids = tokenizer.vocab_size if tokenizer else source.vocab_size or known_vocabulary(config)[0]
    return _bundle(config, rows, tokenizer, ids, facts)


def _texts(examples: Examples) -> Iterator[bytes]:
    """The inputs of examples of text."""
    for i in ticking(range(len(examples))):
        for text in examples[i].inputs:
            assert isinstance(text, bytes), type(text)
            yield text


def described(source: TextSource | ExampleSource) -> dict[str, Any]:
    """The record of a source; where nobody hashes its content, with a hash of what else is known, its place left out."""
    record = source.record()
    known = json.dumps(
        {name: value for name, value in record.items() if name != "directory"}, sort_keys=True
    )
    return {"sha256": hashlib.sha256(known.encode()).hexdigest(), **record}


def _bundle(
    config: Config,
    rows: Mapping[str, Rows],
    tokenizer: Tokenizer | None,
    vocab_size: int,
    facts: dict[str, Any],
) -> DataBundle:
    for split in SPLITS:
        if not len(rows[split]):
            remedy = f"its {split} split holds nothing to learn from: choose another data.path."
            raise ConfigError("data.source", config.data.source, remedy)
    record = {
        "source": config.data.source,
        **facts,
        "n_rows": {split: len(rows[split]) for split in SPLITS},
    }
    return DataBundle(**rows, tokenizer=tokenizer, vocab_size=vocab_size, record=record)


class TrainBatches:
    """`batches[step]`: dict of arrays [B, …], or of the rows `held` of them; a new order every epoch.

    window: so many consecutive batches share their rows out by length, and come in an order drawn for them; 1: as they are.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        seed: int,
        held: Iterable[int] | None = None,
        window: int = 1,
    ) -> None:
        import grain  # imports jax, a second or two: only who trains pays for it

        if not 0 <= seed < 2**32:
            raise ConfigError("train.seed", seed, "must be from 0 to 4294967295.")
        self._rows = rows
        self._batch_size = batch_size
        self._seed = seed
        self._held = _checked_rows(held, batch_size)
        self._window, self._shared = window, (-1, np.zeros((0, 0), np.int64))
        # grain orders the indices and we fetch the rows: the order is the same, and grain need not measure each row.
        self._order = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat(None)

    def row_indices(self, step: int) -> list[int]:
        """Which rows this process takes at this step."""
        entries = self._entries(step)
        return [int(self._order[entries[r]]) for r in self._held]

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step {step}")
        entries = self._entries(step)
        return _batch(
            self._rows, lambda r: self._drawn(int(entries[r])), self._batch_size, self._held
        )

    def _entries(self, step: int) -> Sequence[int]:
        """The places in the endless order of the rows of a batch."""
        b, w = self._batch_size, self._window
        if w == 1:
            return range(step * b, (step + 1) * b)
        group, turn = divmod(step, w)
        if self._shared[0] != group:
            places = np.arange(group * w * b, (group + 1) * w * b)
            lengths = [self._rows.n_tokens(int(self._order[int(i)])) for i in places]
            by_length = places[np.argsort(lengths, kind="stable")].reshape(w, b)
            self._shared = (
                group,
                by_length[np.random.default_rng((self._seed, group)).permutation(w)],
            )
        return self._shared[1][turn]

    def _drawn(self, entry: int) -> Row:
        """A row by its place in the endless order; the one after it is the one it may be mixed with."""
        return self._rows.augmented(
            int(self._order[entry]), (self._seed, entry), int(self._order[entry + 1])
        )


def eval_batches(
    rows: Rows, batch_size: int, limit: int = 0, held: Iterable[int] | None = None
) -> Iterator[Batch]:
    """Every row exactly once, in order; the last batch is filled up with padding rows, which count for nothing.

    Args:
      limit: at most this many batches; 0 is all of them.
      held: this process's rows of each global batch; every process yields as many batches.
    """
    held = _checked_rows(held, batch_size)
    n_batches = -(-len(rows) // batch_size)
    for b in range(min(n_batches, limit) if limit else n_batches):
        base = b * batch_size
        row = lambda r: rows[base + r] if base + r < len(rows) else rows.padding_row()  # noqa: E731
        yield _batch(rows, row, batch_size, held)


def _batch(rows: Rows, row: Callable[[int], Row], batch_size: int, held: list[int]) -> Batch:
    """The rows `held` of a global batch, of the shape that all of its rows ask for."""
    if not rows.needs_all_rows:
        return _stack([row(r) for r in held])
    whole = rows.trimmed(_stack([row(r) for r in range(batch_size)]))
    return {name: a[held] for name, a in whole.items()}


def _checked_rows(held: Iterable[int] | None, batch_size: int) -> list[int]:
    rows = list(range(batch_size)) if held is None else [int(r) for r in held]
    if not rows or any(not 0 <= r < batch_size for r in rows):
        raise ValueError(f"held={rows} are no rows of a batch of {batch_size}")
    return rows


def _stack(rows: list[Row]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


class _Failed(NamedTuple):
    """What a fetch raised, in the place of what it did not give."""

    error: BaseException


class Prefetcher(Generic[T]):
    """Computes fetch(start), fetch(start + 1), … stop - 1 in a daemon thread, at most `depth` of them ahead.

    The steps are taken in order with `get(step)`. An error in `fetch` is raised by the `get` of that step. Use it as a
    context manager, or call `close`, so that no thread is left behind holding batches on the device.
    """

    def __init__(self, fetch: Callable[[int], T], start: int, stop: int, depth: int = 2) -> None:
        if depth < 1:
            raise ValueError(f"depth {depth} is below 1")
        self._fetch = fetch
        self._next = start
        self._stop = stop
        self._depth = depth
        self._ready: deque[T | _Failed] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(
            target=self._work, args=(start,), name="uoe-prefetch", daemon=True
        )
        self._thread.start()

    def get(self, step: int) -> T:
        """Waits for fetch(step). Raises what fetch raised; IndexError past `stop`; ValueError out of order."""
        with self._changed:
            if step >= self._stop:
                raise IndexError(f"step {step} is not before stop={self._stop}")
            if step != self._next:
                raise ValueError(
                    f"steps are taken in order: step {step} asked for, {self._next} is next"
                )
            self._changed.wait_for(lambda: self._ready or self._closed)
            if self._closed:
                raise RuntimeError("the prefetcher is closed")
            item = self._ready[0]
            if isinstance(item, _Failed):
                raise item.error  # stays at the head: whoever asks again is told again
            self._ready.popleft()
            self._next += 1
            self._changed.notify_all()
        return item

    def close(self, timeout: float = 10.0) -> None:
        """Stops the thread and drops what it held; waits at most `timeout` seconds for a fetch under way."""
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _work(self, start: int) -> None:
        for step in range(start, self._stop):
            with self._changed:
                # Wait before the fetch, not after: at most `depth` batches are alive besides the consumer's own.
                self._changed.wait_for(lambda: len(self._ready) < self._depth or self._closed)
                if self._closed:
                    return
            item: T | _Failed
            try:
                item = self._fetch(step)
            except (
                BaseException
            ) as error:  # everything is the consumer's to know, SystemExit included
                item = _Failed(error)
            with self._changed:
                if self._closed:
                    return
                self._ready.append(item)
                self._changed.notify_all()
            if isinstance(item, _Failed):
                return
            del item  # the queue owns it now: no second reference while waiting

"""Batches as pure functions of (seed, step): there is no iterator state, so resuming needs the step alone.

Row r of step s is entry s * B + r of one endless shuffled order. A process that holds some rows of the global batch
reads just those, so neither the number of processes nor of devices changes any row or its place.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from uoe_jax.data import stdlib
from uoe_jax.data.packing import PackedRows, Row
from uoe_jax.data.stdlib import SPLITS, PreparedSource
from uoe_jax.data.store import open_or_build
from uoe_jax.data.tokenizer import ByteTokenizer, Tokenizer
from uoe_jax.errors import ConfigError, UserError

Batch = dict[str, np.ndarray]  # as a row, with a leading B
T = TypeVar("T")

SOURCES: dict[str, Callable[[str, Path], PreparedSource]] = {"stdlib": stdlib.prepare}
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {"bytes": ByteTokenizer}


@dataclasses.dataclass(frozen=True, eq=False)
class DataBundle:
    """The three splits, the tokenizer, and the facts for the run's record (JSON-able)."""

    train: PackedRows
    validation: PackedRows
    test: PackedRows
    tokenizer: Tokenizer
    record: dict[str, Any]


def default_cache_dir() -> Path:
    """$UOE_CACHE, else ~/.cache/uoe_jax; made readable by its owner alone. Raises UserError if it cannot be written."""
    directory = Path(os.environ.get("UOE_CACHE") or "~/.cache/uoe_jax").expanduser()
    remedy = "set UOE_CACHE to a directory that can be written."
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"UOE_CACHE={directory}: cannot make the data cache ({error.strerror}): {remedy}") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UserError(f"UOE_CACHE={directory}: the data cache cannot be written: {remedy}")
    return directory


def load(source: str, path: str, tokenizer_name: str, length: int, multiple: int, cache_dir: Path) -> DataBundle:
    """Prepares, tokenises and packs all splits, or finds them in the cache.

    Args:
      source, path, tokenizer_name: data.source, data.path, data.tokenizer.
      length, multiple: L and P, see `PackedRows`.

    Raises UserError for an unknown name, a source that cannot be read, and a split without rows.
    """
    tokenizer = make_tokenizer(tokenizer_name)
    prepared = _known("data.source", source, SOURCES)(path, cache_dir)
    rows = {}
    for split in SPLITS:
        store = open_or_build(lambda: prepared.documents(split), tokenizer, cache_dir, prepared.key, split)
        rows[split] = PackedRows(store, length, multiple, tokenizer.separator, tokenizer.bytes_per_token)
        if not len(rows[split]):
            raise ConfigError("data.source", source, f"its {split} split holds no document: choose another data.path.")
    record = {
        "source": source,
        **prepared.record(),
        "tokenizer": tokenizer.fingerprint,
        "n_rows": {split: len(rows[split]) for split in SPLITS},
        "n_targets": {split: rows[split].n_targets for split in SPLITS},
    }
    return DataBundle(**rows, tokenizer=tokenizer, record=record)


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that data.tokenizer names."""
    return _known("data.tokenizer", name, TOKENIZERS)()


def _known(key: str, name: str, table: dict[str, Callable[..., T]]) -> Callable[..., T]:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.0)[0]
    raise ConfigError(key, name, f"is not known: did you mean {near!r}? Known: {', '.join(table)}.")


class TrainBatches:
    """`batches[step]`: dict of arrays [B, …], or of the rows `held` of them; a new order every epoch."""

    def __init__(self, rows: PackedRows, batch_size: int, seed: int, held: Sequence[int] | None = None) -> None:
        import grain  # imports jax, a second or two: only who trains pays for it

        if not 0 <= seed < 2**32:
            raise ConfigError("train.seed", seed, "must be from 0 to 4294967295.")
        self._rows = rows
        self._batch_size = batch_size
        self._held = _checked_rows(held, batch_size)
        # grain orders the indices and we fetch the rows: the order is the same, and grain need not measure each row.
        self._order = grain.MapDataset.source(range(len(rows))).seed(seed).shuffle().repeat(None)

    def row_indices(self, step: int) -> list[int]:
        """Which rows this process takes at this step."""
        base = step * self._batch_size
        return [int(self._order[base + r]) for r in self._held]

    def __getitem__(self, step: int) -> Batch:
        if step < 0:
            raise IndexError(f"step {step}")
        return _stack([self._rows[i] for i in self.row_indices(step)])


def eval_batches(
    rows: PackedRows, batch_size: int, limit: int = 0, held: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Every row exactly once, in order; the last batch is filled up with padding rows, which count for nothing.

    Args:
      limit: at most this many batches; 0 is all of them.
      held: this process's rows of each global batch; every process yields as many batches.
    """
    held = _checked_rows(held, batch_size)
    n_batches = -(-len(rows) // batch_size)
    for b in range(min(n_batches, limit) if limit else n_batches):
        indices = [b * batch_size + r for r in held]
        yield _stack([rows[i] if i < len(rows) else rows.padding_row() for i in indices])


def _checked_rows(held: Sequence[int] | None, batch_size: int) -> list[int]:
    rows = list(range(batch_size)) if held is None else [int(r) for r in held]
    if not rows or any(not 0 <= r < batch_size for r in rows):
        raise ValueError(f"held={rows} are no rows of a batch of {batch_size}")
    return rows


def _stack(rows: list[Row]) -> Batch:
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}


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
        self._ready: deque[tuple[T | None, BaseException | None]] = deque()
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, args=(start,), name="uoe-prefetch", daemon=True)
        self._thread.start()

    def get(self, step: int) -> T:
        """Waits for fetch(step). Raises what fetch raised; IndexError past `stop`; ValueError out of order."""
        with self._changed:
            if step >= self._stop:
                raise IndexError(f"step {step} is not before stop={self._stop}")
            if step != self._next:
                raise ValueError(f"steps are taken in order: step {step} asked for, {self._next} is next")
            self._changed.wait_for(lambda: self._ready or self._closed)
            if self._closed:
                raise RuntimeError("the prefetcher is closed")
            item, error = self._ready[0]
            if error is not None:
                raise error  # stays at the head: whoever asks again is told again
            self._ready.popleft()
            self._next += 1
            self._changed.notify_all()
        return item  # type: ignore[return-value]

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
            item, error = None, None
            try:
                item = self._fetch(step)
            except BaseException as e:  # everything is the consumer's to know, SystemExit included
                error = e
            with self._changed:
                if self._closed:
                    return
                self._ready.append((item, error))
                self._changed.notify_all()
            item = None  # the queue owns it now: no second reference while waiting
            if error is not None:
                return

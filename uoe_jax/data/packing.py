"""Rows of a fixed length out of documents of any length, by index arithmetic: row i is a pure function of i.

Letters: L row length, P patch size, D number of documents, T their tokens. Each document becomes the inputs
[START, t0 … t(n-1)] and the targets [t0 … t(n-1), SEP] (START is SEP with most tokenizers), padded to a multiple of P;
the padded documents are laid end to end in store order and cut every L positions. Since P divides both, no patch holds two
documents, and every patch that holds anything begins with a valid token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uoe_jax.data.store import TokenStore
from uoe_jax.errors import UserError

Row = dict[str, np.ndarray | np.int32 | np.float32]
Batch = dict[str, np.ndarray]  # as a row, with a leading B


class PackedRows:
    """Random access to packed rows; every target of every document is in exactly one row.

    `rows[i]` is a dict of int32 arrays:
      tokens, targets [L]: inputs and what follows them; 0 where padding.
      segments [L]: 1, 2, … for the pieces of documents in this row, in order; 0 where padding.
      positions [L]: counted from 0 at the first token of the piece in this row, so always below L; 0 where padding.
      n_bytes []: bytes of text that the valid targets stand for; 0 where they are unknown.
    """

    def __init__(
        self,
        store: TokenStore,
        length: int,
        multiple: int,
        separator: int,
        bytes_per_token: np.ndarray | None,
        start: int | None = None,
    ) -> None:
        """start: the first input of a document; None: the separator. bytes_per_token: None where the store has them.

        Raises UserError where `length` is not a positive multiple of `multiple`, the patch size.
        """
        if multiple < 1 or length < 1 or length % multiple:
            at_least = max(length, 1) + -max(length, 1) % max(multiple, 1)
            raise UserError(
                f"model.context_length={length} is not a multiple of the patch size {multiple}: "
                f"use {at_least}, or another patch_size."
            )
        self.length = length
        self.multiple = multiple
        self.separator, self.start = separator, separator if start is None else start
        self._bytes_V = None if bytes_per_token is None else np.asarray(bytes_per_token, np.int32)
        self._bytes_E = None if store.bytes_unknown else store.bytes_E
        # One token that is never a valid one, so that a split of empty documents needs no special case below.
        self._tokens_T = (
            store.tokens_T if store.tokens_T.size else np.zeros(1, store.tokens_T.dtype)
        )
        self._offsets = store.offsets  # int64 [D + 1], into the tokens
        sizes_D = np.diff(store.offsets) + 1  # targets per document: its tokens and the separator
        self._starts = np.zeros(
            len(sizes_D) + 1, np.int64
        )  # [D + 1], into the padded concatenation
        np.cumsum(-(-sizes_D // multiple) * multiple, out=self._starts[1:])
        self.n_targets = int(sizes_D.sum())

    def __len__(self) -> int:
        return int(-(-self._starts[-1] // self.length))

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        lo = i * self.length
        hi = lo + self.length
        # Padded documents are never empty, so `starts` ascends strictly: documents first … last - 1 meet this row.
        first = np.searchsorted(self._starts, lo, "right") - 1
        last = np.searchsorted(self._starts[:-1], hi, "left")
        starts = self._starts[first:last]

        at_L = np.arange(lo, hi)
        piece_L = np.searchsorted(starts, at_L, "right")  # 1, 2, …
        doc_L = first + piece_L - 1
        within_L = at_L - starts[piece_L - 1]  # 0 is the start's input, n the separator's target
        begin_L = self._offsets[doc_L]
        n_L = self._offsets[doc_L + 1] - begin_L
        valid_L = within_L <= n_L  # false past the end of the last document as well

        next_L = begin_L + within_L
        ids_L = self._tokens_T.take(next_L - 1, mode="clip")
        tokens_L = np.where(within_L == 0, self.start, ids_L) * valid_L
        ids_L = self._tokens_T.take(next_L, mode="clip")
        targets_L = np.where(within_L == n_L, self.separator, ids_L) * valid_L
        positions_L = (at_L - np.maximum(starts, lo)[piece_L - 1]) * valid_L
        return {
            "tokens": tokens_L.astype(np.int32),
            "targets": targets_L.astype(np.int32),
            "segments": (piece_L * valid_L).astype(np.int32),
            "positions": positions_L.astype(np.int32),
            "n_bytes": np.sum(
                self._bytes(targets_L, next_L + doc_L), where=valid_L, dtype=np.int32
            ),
        }

    def _bytes(self, targets_L: np.ndarray, place_L: np.ndarray) -> np.ndarray:
        """Bytes of text that each target stands for; 0 where that is unknown. place_L: in the store's bytes_E."""
        if self._bytes_V is not None:
            return self._bytes_V[targets_L]
        return (
            np.zeros(self.length, np.int32)
            if self._bytes_E is None
            else self._bytes_E.take(place_L, mode="clip")
        )

    needs_all_rows = False  # every row is full

    def trimmed(self, batch: Batch) -> Batch:
        return batch

    def n_tokens(self, i: int) -> int:
        """All rows are alike: full."""
        return self.length

    def augmented(self, i: int, seeds: Sequence[int], other: int) -> Row:
        """Row i; nothing of text is left to chance."""
        return self[i]

    def padding_row(self) -> Row:
        """A row that holds nothing and counts for nothing."""
        zeros_L = np.zeros(self.length, np.int32)
        return {
            **dict.fromkeys(("tokens", "targets", "segments", "positions"), zeros_L),
            "n_bytes": np.int32(0),
        }

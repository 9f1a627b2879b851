"""Rows of a fixed length out of documents of any length: row i is a pure function of i.

Letters: L row length, P patch size, D number of documents. A document of n tokens becomes the
inputs [START, t0 … t(n-1)] and the targets [t0 … t(n-1), SEP] (START is SEP with most tokenizers),
padded to a multiple of P. The padded documents are laid end to end in store order and cut every L
positions. P divides L, so no patch holds two documents, and a patch that is not all padding begins
with a valid token.
"""

from collections.abc import Sequence

import numpy as np

from uoe_jax.data.store import TokenStore
from uoe_jax.data.tokenizers.base import Tokenizer

Row = dict[str, np.ndarray | np.int32 | np.float32]
Batch = dict[str, np.ndarray]  # a row with a leading B


class PackedRows:
    """Random access to packed rows; each target of each document is in exactly one row.

    `rows[i]` is a dict of int32 arrays, with 0 at padding:
      tokens, targets [L]: inputs and what follows them.
      segments [L]: 1, 2, … for the pieces of documents in this row, in order.
      positions [L]: from 0 at the first token of the piece in this row.
      n_bytes []: bytes of text that the valid targets stand for; 0 where they are unknown.
    """

    needs_all_rows = False  # this and what no row of text needs: see LabelledRows

    def __init__(self, store: TokenStore, length: int, multiple: int, tokenizer: Tokenizer) -> None:
        """length, multiple: L and P; `config.validate` refuses an L that P does not divide."""
        self.length = length
        self._separator, self._start = tokenizer.separator, tokenizer.start
        self._bytes_V = tokenizer.bytes_per_token
        self._bytes_E = None if store.bytes_unknown else store.bytes_E
        # At least one element, so that a split of empty documents is no special case below.
        self._tokens_T = store.tokens_T if store.tokens_T.size else np.zeros(1, np.int64)
        self._offsets = store.offsets  # int64 [D + 1], into the tokens
        sizes_D = np.diff(store.offsets) + 1  # targets per document: its tokens and the separator
        padded_D = -(-sizes_D // multiple) * multiple
        self._starts = np.append(0, np.cumsum(padded_D))  # [D + 1], of documents laid end to end
        self.n_targets = int(sizes_D.sum())

    def __len__(self) -> int:
        return int(-(-self._starts[-1] // self.length))

    def __getitem__(self, i: int) -> Row:
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        lo, hi = i * self.length, (i + 1) * self.length
        # Padded documents are never empty, so the starts ascend strictly. These overlap the row:
        first = np.searchsorted(self._starts, lo, "right") - 1
        starts = self._starts[first : np.searchsorted(self._starts[:-1], hi, "left")]

        at_L = np.arange(lo, hi)
        piece_L = np.searchsorted(starts, at_L, "right")  # 1, 2, …
        doc_L = first + piece_L - 1
        within_L = at_L - starts[piece_L - 1]  # 0: the start token's input, n: the separator target
        begin_L = self._offsets[doc_L]
        n_L = self._offsets[doc_L + 1] - begin_L
        valid_L = within_L <= n_L  # false past the end of the last document as well

        next_L = begin_L + within_L
        inputs_L = self._tokens_T.take(next_L - 1, mode="clip")
        inputs_L = np.where(within_L == 0, self._start, inputs_L)
        targets_L = self._tokens_T.take(next_L, mode="clip")
        targets_L = np.where(within_L == n_L, self._separator, targets_L) * valid_L
        if self._bytes_V is not None:
            bytes_L = self._bytes_V[targets_L]
        elif self._bytes_E is not None:
            bytes_L = self._bytes_E.take(next_L + doc_L, mode="clip")
        else:
            bytes_L = np.zeros(self.length, np.int32)
        arrays = {"tokens": inputs_L, "targets": targets_L, "segments": piece_L}
        arrays["positions"] = at_L - np.maximum(starts, lo)[piece_L - 1]
        row: Row = {name: (a * valid_L).astype(np.int32) for name, a in arrays.items()}
        return row | {"n_bytes": np.sum(bytes_L, where=valid_L, dtype=np.int32)}

    def augmented(self, i: int, seeds: Sequence[int], other: int) -> Row:
        return self[i]

    def n_tokens(self, i: int) -> int:
        return self.length

    def trimmed(self, batch: Batch) -> Batch:
        return batch

"""Text that grows token by token: what may be shown already, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from uoe_jax.data.tokenizers.base import Tokenizer


class GrowingText:
    """What a model writes after a prompt.

    `shown` holds back what may still change: bytes that are no whole character yet, and what may be the beginning of a stop string.

    Attributes:
      ids: the tokens so far, a separator that ended it left out.
      ended: "document" (the model closed it), "stop" (a stop string; the text ends before it), "limit"; None: it goes on.
    """

    def __init__(
        self, tokenizer: Tokenizer, limit: int, stops: Sequence[str] = (), before: str = ""
    ) -> None:
        """limit: tokens at most. before: the prompt, after which words want a space."""
        self._tokenizer, self._limit, self._stops = tokenizer, limit, tuple(stops)
        self._space = (
            " "
            if tokenizer.tokens_are_words and before and not before.endswith((" ", "\n"))
            else ""
        )
        self.ids: list[int] = []
        self.ended: str | None = "limit" if limit < 1 else None
        self.text = ""  # all of it
        self.shown = ""  # the part of it that will not change

    def push(self, token: int) -> str:
        """Takes a token; returns what can be shown now that could not before."""
        if token == self._tokenizer.separator:
            return self._end("document")
        self.ids.append(token)
        self.text = self._tokenizer.decode(self.ids)
        if self.text:
            self.text = self._space + self.text
        found = [at for stop in self._stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text = self.text[: min(found)]
            return self._end("stop")
        if len(self.ids) >= self._limit:
            return self._end("limit")
        return self._show(len(self.text.rstrip("\N{REPLACEMENT CHARACTER}")) - self._held())

    def _held(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self._stops:
            for n in range(1, min(len(stop), len(self.text) + 1)):
                if self.text.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest

    def _end(self, why: str) -> str:
        self.ended = why
        return self._show(len(self.text))

    def _show(self, to: int) -> str:
        before, self.shown = self.shown, self.text[: max(to, len(self.shown))]
        return self.shown[len(before) :]

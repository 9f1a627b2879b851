"""Text that grows token by token: what may be shown already, and where it ends."""

from collections.abc import Sequence

from uoe_jax.data.tokenizers.base import Tokenizer


class GrowingText:
    """What a model writes after a prompt.

    Args:
      limit: the most tokens.
      stops: strings before which the text ends.
      before: the prompt; a text of words begins with a space after it.
    """

    def __init__(
        self, tokenizer: Tokenizer, limit: int, stops: Sequence[str] = (), before: str = ""
    ) -> None:
        self._tokenizer, self._limit, self._stops = tokenizer, limit, tuple(stops)
        spaced = tokenizer.tokens_are_words and before and not before.endswith((" ", "\n"))
        self._space = " " if spaced else ""
        self.ids: list[int] = []  # without a separator that ended them
        # "document" (by the separator), "stop" (by a stop string), "limit"; None: not yet.
        self.ended: str | None = "limit" if limit < 1 else None
        self.text = self.shown = ""  # shown: the part of the text that will not change

    def push(self, token: int) -> str:
        """Adds a token; returns what can be shown now and could not before."""
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
        # Held back: bytes of an incomplete character, and what may be the beginning of a stop.
        whole = len(self.text.rstrip("\N{REPLACEMENT CHARACTER}"))
        beginnings = [stop[:n] for stop in self._stops for n in range(len(stop))]
        partial = [len(b) for b in beginnings if self.text.endswith(b)]
        return self._show(whole - max(partial, default=0))

    def _end(self, why: str) -> str:
        self.ended = why
        return self._show(len(self.text))

    def _show(self, to: int) -> str:
        before, self.shown = self.shown, self.text[: max(to, len(self.shown))]
        return self.shown[len(before) :]

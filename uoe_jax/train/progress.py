"""What a command shows on stderr while it works: a bar in a terminal, lines anywhere else."""

import contextlib
import os
import sys
import time
from typing import Any, Iterator, TextIO

EVALUATION_LINE_S = 10  # between two lines about a running evaluation
_BAR = "step {n_fmt}/{total_fmt} |{bar}|{postfix}"


class Progress:
    """Step, loss, the task's other measures, tokens a second and time left.

    total, start: the last step (0: no training, and no bar), and steps done before. Only a terminal
    as stream gets carriage returns. silent: shows nothing; for all processes but process 0.
    """

    def __init__(
        self, total: int, start: int = 0, stream: TextIO | None = None, silent: bool = False
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._silent = total, silent
        self._first: tuple[float, int] | None = None  # time and step, after compilation
        self._counted = self._shown = 0.0  # times of the first batch, and of the last line on them
        self._bar: Any = None
        if total and not silent and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=start, file=self._stream, dynamic_ncols=True, bar_format=_BAR
            )

    def update(self, step: int, loss: float, measures: str, tokens_per_s: float | None) -> None:
        """Shows the state after `step` steps; measures: the task's others, as text."""
        facts, now = [f"loss {loss:.4f}", measures], time.monotonic()
        if tokens_per_s is not None:
            facts.append(f"{tokens_per_s:,.0f} tokens/s")
        if self._first is None or step <= self._first[1]:
            self._first = (now, step)
        else:
            start, first = self._first
            seconds = round((now - start) / (step - first) * max(self._total - step, 0))
            facts.append(f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left")
        if self._bar is None:
            self.print(f"step {step}/{self._total}  " + "  ".join(facts))
        else:
            self._bar.set_postfix_str("  ".join(facts), refresh=False)
            self._bar.update(step - self._bar.n)

    def print(self, text: str) -> None:
        """Prints a line, above the bar where there is one."""
        if self._silent:
            return
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    @contextlib.contextmanager
    def compiling(self, what: str, is_new: bool = True) -> Iterator[None]:
        """Says that `what`, where it is new, is compiled in the block, and how long that took."""
        start = time.monotonic()
        if is_new:
            self.print(f"compiling {what} …")
        yield
        if is_new:
            self.print(f"compiled {what} in {time.monotonic() - start:.1f} s")

    def count(self, what: str, done: int, total: int) -> None:
        """Says from time to time how many batches are done."""
        now = time.monotonic()
        if done == 1:  # which waited for the compiler
            self._counted = self._shown = now
        elif now - self._shown >= EVALUATION_LINE_S:
            self._shown = now
            left = round((now - self._counted) / (done - 1) * (total - done))
            self.print(f"{what}: {done:,} of {total:,} batches, {left // 60}:{left % 60:02} left")

    def close(self) -> None:
        """Leaves the last state of the bar on the screen; safe to call twice."""
        if self._bar is not None:
            self._bar.close()

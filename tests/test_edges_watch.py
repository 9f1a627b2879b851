"""Work that goes on counts as going on, also where it takes longer than a process may stand still; one that hangs is found."""

from __future__ import annotations

import json

import pytest
from helpers import TINY, finish, uoe_together

from uoe_jax.config import GuardConfig
from uoe_jax.data import prepared, store
from uoe_jax.data.tokenizers import words as vocabulary
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.distributed import watchdog
from uoe_jax.distributed.watchdog import Heartbeat, Status, Watchdog

LIMIT = 10


class Judge(Watchdog):
    """Process 0 of two, without threads and without a service; `hears` what process 1 says."""

    def __init__(self) -> None:
        self._me, self.guard = 0, GuardConfig(compile_timeout_s=LIMIT)
        self.status, self.progress = Status(timeout_s=LIMIT), 0
        self._last, self._since = None, 0.0
        self.now, self.verdict = 0.0, ""
        self._heartbeats = {1: Heartbeat(0, self.status, self.now)}

    def hears(self, **place) -> None:
        self._heartbeats[1] = Heartbeat(
            0, Status(**{"timeout_s": LIMIT, "phase": "preparing the data", **place}), self.now
        )

    def _end(self, code: int, culprit: int, why: str) -> None:
        assert code == 77
        self.verdict = self.verdict or why

    def goes_on(self, seconds: int, **place) -> str:
        """The verdict after some seconds of looking, while process 1 says the same."""
        for _ in range(seconds):
            self.now += 1
            self.hears(**place)
            self._find_hanging(self.now)
        return self.verdict


@pytest.fixture
def judge(monkeypatch):
    judge = Judge()
    monkeypatch.setattr(watchdog, "_watchdog", judge)
    watchdog.at("preparing the data", slow=True)
    return judge


def test_work_that_goes_on_is_no_hang(judge):
    """Of this process, and then of the other one while this one waits; what falls silent is found in time."""
    for _ in range(5 * LIMIT):
        watchdog.tick()
        assert not judge.goes_on(1, phases=1)
    for ticks in range(1, 5 * LIMIT):
        assert not judge.goes_on(1, phases=1, progress=ticks)
    assert not judge.goes_on(LIMIT, phases=1, progress=ticks)
    assert judge.goes_on(1, phases=1, progress=ticks).startswith(
        "process 0 hangs while preparing the data: nothing has happened there for 11 s"
    )


def test_what_one_does_who_is_further_on_does_not_help_one_that_hangs(judge):
    for ticks in range(LIMIT + 1):
        assert not judge.verdict
        judge.goes_on(1, phases=2, progress=ticks)
    assert judge.goes_on(1, phases=2, progress=99).startswith(
        "process 0 hangs while preparing the data"
    )


@pytest.mark.parametrize(
    "mine, theirs, culprit", [(True, False, 1), (False, True, 0), (False, False, 0)]
)
def test_the_one_that_waits_for_another_does_not_hang(mine, theirs, culprit, judge, monkeypatch):
    monkeypatch.setattr(watchdog.coordination, "waiting", mine)
    assert judge.goes_on(2 * LIMIT, phases=1, waiting=theirs).startswith(f"process {culprit} hangs")


def test_a_heartbeat_says_that_a_process_waits():
    seen = []

    class Service:
        def blocking_key_value_get(self, name, timeout):
            seen.append(watchdog.coordination.waiting)
            return json.dumps({"value": 3})

    assert (
        watchdog.coordination._receive(Service(), "x", 1) == 3
        and seen == [True]
        and not watchdog.coordination.waiting
    )


def ticks_of(do) -> int:
    before = watchdog._watchdog.progress
    do()
    return watchdog._watchdog.progress - before


def test_every_part_of_a_preparation_is_progress(judge, tmp_path):
    """And nothing else is: an iterator that gives nothing does not tick."""
    (tmp_path / "file").write_bytes(b"some text\n" * 300_000)
    assert ticks_of(lambda: prepared._sha256(tmp_path / "file")) == 3  # blocks of 1 MiB
    raw = prepared.RawFiles(tmp_path)
    (digest,) = raw.sha256([tmp_path / "file"])

    def read() -> None:
        with raw.open(tmp_path / "file", digest) as reader:
            reader.readline()

    assert ticks_of(read) >= 3
    documents = [b"a b c"] * 7
    assert ticks_of(lambda: store.TokenStore.write(documents, ByteTokenizer(), tmp_path)) == 7
    assert (
        ticks_of(lambda: vocabulary.WordTokenizer.train([*documents, b"d " * (3 << 20)], 1))
        >= 7 + 3
    )
    assert ticks_of(lambda: list(prepared._batches({"text": b"x"} for _ in range(5)))) == 5
    assert ticks_of(lambda: list(watchdog.ticking([]))) == 0


def test_one_process_has_nobody_to_tell():
    assert watchdog._watchdog is None
    watchdog.tick()
    assert list(watchdog.ticking("ab")) == ["a", "b"]


# --- two processes ----------------------------------------------------------------------------------------------

SLOW = """
import runpy, time
from uoe_jax.distributed import watchdog
from uoe_jax.data.registry import add_source
from uoe_jax.train import main

class Source:
    key = "slow-%(name)s"
    def documents(self, split):
        for i in range(20):
            time.sleep(%(wait)s)
            yield b"def f(x):\\n    return x\\n" * 20
    def record(self):
        return {"sha256": "%(name)s"}

def train(config, workdir, *more):
    watchdog.at("preparing the data", slow=True)
    main.agreed_data(config, workdir)
    return 0

add_source("slow", lambda data: Source())
main.train = train  # up to the first compilation, which takes its time on a busy machine

def get_config():
    c = runpy.run_path(%(tiny)r)["get_config"]()
    c.data.source = "slow"
    return c
"""


def pair(tmp_path, name: str, wait: str, limit: int) -> list[tuple[int, str, str]]:
    file, cache = tmp_path / "slow.py", tmp_path / "cache"
    file.write_text(SLOW % {"name": name, "wait": wait, "tiny": TINY})
    args = ["train", f"--config={file}", f"--workdir={tmp_path / 'run'}", "--config.train.steps=1"]
    limits = [f"--config.guard.compile_timeout_s={limit}", "--config.guard.peer_timeout_s=5"]
    return finish(
        uoe_together(
            2, 1, *args, *limits, each_env=[{"UOE_CACHE": str(cache / str(i))} for i in range(2)]
        )
    )


@pytest.mark.slow
def test_a_preparation_longer_than_the_limit_ends_well(tmp_path):
    """Four times as long, in each of two processes."""
    ended = pair(tmp_path, "works", "0.4", limit=6)
    assert [code for code, _, _ in ended] == [0, 0], ended


@pytest.mark.slow
def test_a_document_that_never_comes_ends_both(tmp_path):
    """In one of them: the other waits for it, and is not named."""
    ended = pair(
        tmp_path,
        "hangs",
        "1e6 if i == 5 and __import__('os').environ['UOE_PROCESS_ID'] == '1' else 0.1",
        limit=6,
    )
    assert [code for code, _, _ in ended] == [77, 77], ended
    for _, _, err in ended:
        assert (
            "uoe: process 1 hangs while preparing the data: nothing has happened there for 6 s"
            in err
        ), err

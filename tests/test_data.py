"""The data room: exact bytes, stable splits, packing that loses nothing, batches that are functions of (seed, step)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import Config, from_dict
from uoe_jax.data import pipeline
from uoe_jax.data.pipeline import TrainBatches, eval_batches
from uoe_jax.data.prefetch import Prefetcher
from uoe_jax.data.rows import PackedRows
from uoe_jax.data.sources import stdlib
from uoe_jax.data.store import DamagedStore, TokenStore, open_or_build
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.errors import RunError, UserError

BYTES = ByteTokenizer()
REPO = Path(__file__).resolve().parent.parent
SPECIAL = {
    "empty.py": b"",
    "latin1.py": "# -*- coding: latin-1 -*-\nname = 'Zoë'\n".encode("latin-1"),
    "every_byte.py": bytes(range(256)) * 3,
    "windows.py": b"a = 1\r\nb = 2\r\n\x00\x1a",
    "no_newline.py": b"x = 1",
    "deep/er/utf8.py": "s = '日本語 🐍'\n".encode(),
}


def write_sources(root: Path, n: int = 60) -> dict[str, bytes]:
    """Some .py files of many lengths under `root`, and what must be left out. Returns path -> bytes of the former."""
    rng = np.random.default_rng(0)
    files = {
        f"pkg{i % 5}/mod{i}.py": rng.bytes(int(rng.integers(0, 400))) for i in range(n)
    } | SPECIAL
    left_out = (
        "test/a.py",
        "pkg0/tests/b.py",
        "site-packages/c.py",
        ".git/e.py",
        "notes.txt",
        "_sysconfigdata_x.py",
    )
    for name, data in [*files.items(), *((name, b"never read") for name in left_out)]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return files


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    root = tmp_path_factory.mktemp("sources")
    return root, write_sources(root)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def text_config(path: Path | str, length: int, patch: int) -> Config:
    """A language model's rows out of the sources under `path`."""
    model = {"context_length": length, "smha": {"patch_size": patch}, "uome": {"patch_size": patch}}
    return from_dict({"model": model, "data": {"path": str(path)}})


LOADS = """
import sys; from pathlib import Path; from uoe_jax.config import from_dict; from uoe_jax.data import pipeline
patch = {"patch_size": 4}
config = from_dict({"model": {"context_length": 32, "smha": patch, "uome": patch}, "data": {"path": sys.argv[1]}})
d = pipeline.load(config, Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def bundle(sources, cache) -> pipeline.DataBundle:
    return pipeline.load(text_config(sources[0], 32, 4), cache)


def row_indices(batches: TrainBatches, step: int) -> list[int]:
    """The rows of the split that a process reads at a step."""
    entries = batches._entries(step)
    return [int(batches._order[entries[r]]) for r in batches._local_rows]


def memory_store(documents: list[bytes]) -> TokenStore:
    ids = [BYTES.encode(d) for d in documents]
    offsets = np.cumsum([0] + [len(d) for d in ids]).astype(np.int64)
    return TokenStore(np.concatenate([np.zeros(0, np.uint16), *ids]), offsets)


def packed(documents: list[bytes], length: int, multiple: int) -> PackedRows:
    return PackedRows(memory_store(documents), length, multiple, BYTES)


def assert_rows_equal(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == np.int32 and b[key].dtype == np.int32, key
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def clean(directory: Path) -> bool:
    return not [
        p for p in directory.iterdir() if p.name.startswith(".")
    ]  # work directories begin with a dot


def path_hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def split_by_hand(name: str) -> str:
    return (["train"] * 90 + ["validation"] * 5 + ["test"] * 5)[int(path_hash(name)[:16], 16) % 100]


# ---- source -------------------------------------------------------------------------------------------------------


def test_every_file_survives_byte_for_byte_in_exactly_one_split(sources, cache, bundle):
    root, files = sources
    prepared = stdlib.open_stdlib(str(root), cache)
    read = {split: list(prepared.documents(split)) for split in stdlib.SPLITS}
    assert sorted(d for docs in read.values() for d in docs) == sorted(files.values())
    for split in stdlib.SPLITS:
        mine = [name for name in sorted(files, key=path_hash) if split_by_hand(name) == split]
        assert read[split] == [files[name] for name in mine]
        assert prepared.facts["n_bytes"][split] == sum(len(files[name]) for name in mine)
        # The same through the token store, which is what training sees.
        tokens = open_or_build(pytest.fail, BYTES, cache, prepared.key, split)
        assert [BYTES.decode_bytes(tokens[d]) for d in range(len(tokens))] == read[split]


def test_splits_and_order_do_not_move(tmp_path):
    """If this fails, every cached dataset and every published figure means something else: raise stdlib.VERSION."""
    golden = {
        "train": ["abc.py", "asyncio/streams.py", "typing.py"],
        "validation": ["bdb.py", "json/decoder.py", "os.py"],
        "test": ["ast.py", "asyncio/sslproto.py", "email/__init__.py"],
    }
    for split, names in golden.items():
        assert [stdlib.SourceFile(name, 0, "").split for name in names] == [split] * 3
    many = [f"pkg/mod{i}.py" for i in range(1000)]
    assert [stdlib.SourceFile(name, 0, "").split for name in many] == [
        split_by_hand(name) for name in many
    ]
    write_sources(tmp_path)
    before = {f.relative: f.split for f in stdlib.scan(tmp_path)}
    (tmp_path / "pkg0/mod0.py").write_bytes(b"edited")
    (tmp_path / "added.py").write_bytes(b"added")
    after = {f.relative: f.split for f in stdlib.scan(tmp_path)}
    assert after.pop("added.py") and after == before


def test_content_is_the_key(tmp_path):
    write_sources(tmp_path / "a")
    write_sources(tmp_path / "b")
    cache = tmp_path / "cache"
    a, b = (stdlib.open_stdlib(str(tmp_path / name), cache) for name in "ab")
    assert (a.key, a.facts["sha256"]) == (b.key, b.facts["sha256"])
    (tmp_path / "b/pkg0/mod0.py").write_bytes(b"edited")
    edited = stdlib.open_stdlib(str(tmp_path / "b"), cache)
    assert edited.key != a.key and b"edited" in list(edited.documents("train"))


@pytest.mark.parametrize("make", ["nothing", "file", "empty", "one file"])
def test_unusable_source_directory_is_named(tmp_path, make):
    path = tmp_path / "here"
    if make == "file":
        path.write_bytes(b"")
    elif make != "nothing":
        path.mkdir()
    if make == "one file":
        (path / "a.py").write_bytes(b"a")
    with pytest.raises(UserError, match="^data.path='.*here'.*director"):
        stdlib.open_stdlib(str(path), tmp_path / "cache")


def test_file_that_changes_under_the_builder_is_refused(tmp_path, monkeypatch):
    write_sources(tmp_path / "src")
    stale = stdlib.scan(tmp_path / "src")
    monkeypatch.setattr(stdlib, "scan", lambda *_: stale)
    (tmp_path / "src/pkg1/mod1.py").write_bytes(b"edited in between")
    with pytest.raises(UserError, match="pkg1/mod1.py: changed while it was being read"):
        stdlib.open_stdlib(str(tmp_path / "src"), tmp_path / "cache")
    assert list((tmp_path / "cache/sources").iterdir()) == []


def test_damaged_prepared_dataset_is_reported_with_the_remedy(tmp_path):
    write_sources(tmp_path / "src")
    prepared = stdlib.open_stdlib(str(tmp_path / "src"), tmp_path / "cache")
    home = tmp_path / "cache/sources" / prepared.key
    record = next(home.rglob("*train*"))
    record.write_bytes(record.read_bytes()[:-100000])
    with pytest.raises(UserError, match="delete it and run again") as error:
        [*prepared.documents("train")]
    assert str(home) in str(error.value)


def test_two_processes_may_prepare_at_once(tmp_path):
    write_sources(tmp_path / "src")
    code = LOADS + "import json; print(json.dumps([d.record, d.train[3]['targets'].tolist()]))"
    command = [sys.executable, "-c", code, str(tmp_path / "src"), str(tmp_path / "cache")]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    racers = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    results = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], results
    assert results[0][0] == results[1][0]  # and nothing else on stdout: tfds prints there
    json.loads(results[0][0])
    assert len(list((tmp_path / "cache/sources").iterdir())) == 1
    assert len(list((tmp_path / "cache/tokens").iterdir())) == 3


# ---- tokenizer ----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_byte_tokenizer_is_exact(data):
    ids = BYTES.encode(data)
    assert ids.dtype == np.uint16 and BYTES.separator not in ids
    assert BYTES.decode_bytes(ids) == data
    assert BYTES.bytes_per_token[ids].sum() == len(data)


def test_byte_tokenizer_text_separator_and_range():
    assert BYTES.decode(BYTES.encode("naïve 🐍")) == "naïve 🐍"
    assert BYTES.decode([72, 256, 105, 255]) == "Hi\ufffd"
    assert BYTES.vocab_size == len(BYTES.bytes_per_token) == 257
    assert BYTES.bytes_per_token[BYTES.separator] == 0 and BYTES.bytes_per_token.dtype == np.int32
    for outside in ([257], [-1]):
        with pytest.raises(ValueError, match="257"):
            BYTES.decode_bytes(outside)


# ---- store --------------------------------------------------------------------------------------------------------

DOCS = [b"", b"a", bytes(range(256)), b"", b"tail"]


@pytest.mark.parametrize("docs", [DOCS, [b"", b""], []], ids=["some", "empty documents", "none"])
def test_store_gives_back_its_documents_without_building_twice(tmp_path, docs):
    built = open_or_build(lambda: iter(docs), BYTES, tmp_path, "key", "train")
    again = open_or_build(pytest.fail, BYTES, tmp_path, "key", "train")
    for tokens in (built, again):
        assert tokens.tokens_T.dtype == np.uint16 and tokens.offsets.dtype == np.int64
        assert not tokens.tokens_T.flags.writeable and not tokens.offsets.flags.writeable
        assert [BYTES.decode_bytes(tokens[d]) for d in range(len(tokens))] == docs
    with pytest.raises(IndexError):
        built[len(docs)]
    assert np.load(next(tmp_path.glob("tokens/*/tokens.npy"))).tobytes() == built.tokens_T.tobytes()
    assert clean(tmp_path / "tokens")


@pytest.mark.parametrize(
    "damage", ["cut", "flip", "flip offsets", "no meta", "half a meta", "no tokens", "not a dict"]
)
def test_damaged_store_is_noticed_and_built_again(tmp_path, damage, caplog):
    open_or_build(lambda: DOCS, BYTES, tmp_path, "key", "train")
    (home,) = (tmp_path / "tokens").iterdir()
    name = {"flip offsets": "offsets.npy", "no meta": "store.json", "half a meta": "store.json",
            "not a dict": "store.json"}.get(damage, "tokens.npy")  # fmt: skip
    data = bytearray((home / name).read_bytes())
    data[-20] ^= 1
    damaged = {"cut": data[:-2], "half a meta": data[:30], "not a dict": b"[]"}.get(damage, data)
    (home / name).unlink() if damage.startswith("no ") else (home / name).write_bytes(damaged)
    with pytest.raises(DamagedStore):
        TokenStore.open(home)
    again = open_or_build(lambda: DOCS, BYTES, tmp_path, "key", "train")
    assert "built again" in caplog.text
    assert [BYTES.decode_bytes(again[d]) for d in range(len(again))] == DOCS
    assert len(TokenStore.open(home)) == len(DOCS) and clean(tmp_path / "tokens")


def test_store_that_cannot_be_written_says_where_and_what_to_do(tmp_path):
    (tmp_path / "tokens").write_bytes(b"a file in the way")
    with pytest.raises(RunError, match="tokens.*UOE_CACHE"):
        open_or_build(lambda: DOCS, BYTES, tmp_path, "key", "train")


def test_failed_build_leaves_nothing_behind(tmp_path):
    def documents():
        yield b"first"
        raise UserError("the source went away")

    with pytest.raises(UserError, match="went away"):
        open_or_build(documents, BYTES, tmp_path, "key", "train")
    assert list((tmp_path / "tokens").iterdir()) == []


@pytest.mark.parametrize("damaged_first", [False, True])
def test_builders_may_race(tmp_path, damaged_first):
    home = tmp_path / "tokens" / f"key-{BYTES.fingerprint}-train"
    if damaged_first:
        home.mkdir(parents=True)
        (home / "store.json").write_text("{")
    n = 6
    barrier = threading.Barrier(n)  # all are inside the build before any has finished
    results: list[TokenStore | BaseException] = []

    def build() -> None:
        def documents():
            barrier.wait(20)
            return DOCS

        try:
            results.append(open_or_build(documents, BYTES, tmp_path, "key", "train"))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=build) for _ in range(n)]
    [thread.start() for thread in threads]
    [thread.join(30) for thread in threads]
    assert [[BYTES.decode_bytes(r[d]) for d in range(len(r))] for r in results] == [DOCS] * n
    assert len(TokenStore.open(home)) == len(DOCS)
    assert [p.name for p in (tmp_path / "tokens").iterdir()] == [home.name]


def test_another_builder_may_win_at_the_last_moment(tmp_path, monkeypatch):
    real_rename = os.rename

    def rename(new, home):
        shutil.copytree(new, home)
        real_rename(new, home)  # refused: the directory is there by now, and not empty

    monkeypatch.setattr(os, "rename", rename)
    built = open_or_build(lambda: DOCS, BYTES, tmp_path, "key", "train")
    assert [BYTES.decode_bytes(built[d]) for d in range(len(built))] == DOCS
    assert [
        BYTES.decode_bytes(d) for d in open_or_build(pytest.fail, BYTES, tmp_path, "key", "train")
    ] == DOCS


def test_large_vocabularies_get_the_smallest_type_that_holds_them(tmp_path):
    class Wide(ByteTokenizer):
        def __init__(self, vocab_size: int) -> None:
            self.vocab_size = vocab_size
            self.fingerprint = f"wide-{vocab_size}"

        def encode(self, text):
            return np.array([self.vocab_size - 1])

    for vocab_size, dtype in (
        (256, np.uint8),
        (257, np.uint16),
        (65536, np.uint16),
        (65537, np.uint32),
    ):
        tokens = open_or_build(lambda: [b"x"], Wide(vocab_size), tmp_path, "key", "train")
        assert tokens.tokens_T.dtype == dtype and tokens.tokens_T.tolist() == [vocab_size - 1]


# ---- packing ------------------------------------------------------------------------------------------------------


def reference_rows(
    documents: list[bytes], length: int, multiple: int
) -> list[dict[str, np.ndarray]]:
    """Packing by loops: one (input, target, document) per position, None where padding, cut every `length`."""
    flat: list[tuple[int, int, int] | None] = []
    for d, document in enumerate(documents):
        ids = list(document)
        flat += [(t, u, d) for t, u in zip([256, *ids], [*ids, 256], strict=True)]
        flat += [None] * (-len(flat) % multiple)
    flat += [None] * (-len(flat) % length)
    rows = []
    for lo in range(0, len(flat), length):
        cells = flat[lo : lo + length]
        row = {
            key: np.zeros(length, np.int32)
            for key in ("tokens", "targets", "segments", "positions")
        }
        pieces: list[int] = []
        for i, cell in enumerate(cells):
            if cell is None:
                continue
            if cell[2] not in pieces:
                pieces.append(cell[2])
                start = i
            row["tokens"][i], row["targets"][i] = cell[:2]
            row["segments"][i], row["positions"][i] = len(pieces), i - start
        rows.append(
            {**row, "n_bytes": np.int32(sum(cell is not None and cell[1] != 256 for cell in cells))}
        )
    return rows


DOCUMENTS = st.lists(
    st.one_of(st.binary(max_size=6), st.binary(min_size=30, max_size=90)), max_size=12
)


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.sampled_from([1, 2, 3, 4, 8]), st.integers(1, 9))
def test_packing_agrees_with_the_loop(documents, multiple, patches):
    length = multiple * patches
    rows = packed(documents, length, multiple)
    want = reference_rows(documents, length, multiple)
    assert len(rows) == len(want)
    for i in range(len(rows)):
        assert_rows_equal(rows[i], want[i])


@settings(max_examples=150, deadline=None)
@given(DOCUMENTS, st.sampled_from([1, 2, 4, 8]), st.integers(1, 9))
def test_every_target_is_in_exactly_one_row(documents, multiple, patches):
    """Stated without the reference: what comes out, read in order, is what went in."""
    length = multiple * patches
    rows = packed(documents, length, multiple)
    out = [rows[i] for i in range(len(rows))]
    targets = [int(t) for row in out for t in row["targets"][row["segments"] > 0]]
    assert targets == [t for d in documents for t in [*d, 256]]
    assert len(targets) == rows.n_targets
    assert sum(int(row["n_bytes"]) for row in out) == sum(map(len, documents))
    for row in out:
        segments, valid = row["segments"], row["segments"] > 0
        # A document begins with the separator and ends with it as a target, so a piece crosses no document if a
        # separator is only ever a piece's first input and its last target.
        for piece in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == piece)
            assert at[-1] - at[0] == len(at) - 1 and at[0] % multiple == 0
            assert 256 not in row["tokens"][at[1:]] and 256 not in row["targets"][at[:-1]]
            np.testing.assert_array_equal(row["positions"][at], np.arange(len(at)))
            np.testing.assert_array_equal(row["tokens"][at[1:]], row["targets"][at[:-1]])
        patches_valid = valid.reshape(-1, multiple)
        assert (
            patches_valid[:, 0] == patches_valid.any(1)
        ).all()  # the router reads a patch's first token
        assert not any(row[key][~valid].any() for key in ("tokens", "targets", "positions"))


def test_many_tiny_one_huge_and_a_jump_to_any_row():
    documents = [b""] * 300 + [bytes(range(256)) * 40] + [b"ab"] * 300
    rows, want = packed(documents, 64, 4), reference_rows(documents, 64, 4)
    for i in (len(rows) - 1, 0, len(rows) // 2, 18, 19):
        assert_rows_equal(rows[i], want[i])
    assert rows[0]["segments"].max() == 16  # 64 / 4 empty documents
    for outside in (len(rows), -1):
        with pytest.raises(IndexError):
            rows[outside]


# ---- batches ------------------------------------------------------------------------------------------------------

ROWS = packed([bytes([65 + i % 26]) * (i % 37) for i in range(100)], 16, 4)  # 130-odd rows


def test_data_order_does_not_move():
    """A resumed run must see the data of the run it resumes. If grain changes its order, pin it or write our own."""
    assert row_indices(TrainBatches(packed([b"x" * 7] * 100, 8, 4), 8, seed=0), 0) == [
        96,
        77,
        31,
        79,
        9,
        70,
        28,
        83,
    ]


def test_train_batches_are_pure_in_seed_and_step():
    forward, backward = TrainBatches(ROWS, 8, seed=3), TrainBatches(ROWS, 8, seed=3)
    late = {step: backward[step] for step in (40, 7, 0, 100_000)}
    for step in sorted(late):
        assert_rows_equal(forward[step], late[step])
    assert forward[0]["tokens"].shape == (8, 16) and forward[0]["n_bytes"].shape == (8,)
    assert row_indices(TrainBatches(ROWS, 8, seed=4), 0) != row_indices(forward, 0)
    order = grain.MapDataset.source(ROWS).seed(3).shuffle().repeat(None)
    for r in range(8):
        assert_rows_equal(order[7 * 8 + r], {key: value[r] for key, value in late[7].items()})


def test_every_epoch_has_every_row_once_in_a_new_order():
    n = len(ROWS)
    batches = TrainBatches(ROWS, n, seed=0)
    epochs = [row_indices(batches, step) for step in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0] and epochs[0] != list(range(n))
    # An epoch need not be a whole number of batches: the next one begins inside a batch.
    odd = TrainBatches(ROWS, 7, seed=0)
    flat = [i for step in range(3 * n // 7) for i in row_indices(odd, step)]
    assert flat == [i for epoch in epochs for i in epoch][: len(flat)]


def test_batches_that_share_rows_out_by_length_hold_the_same_rows_in_any_process():
    """LabelledRows of random lengths: every w steps hold what they held, cut by length; a function of the step alone."""
    lengths = np.random.default_rng(0).integers(1, 33, 64)

    class Ragged:
        needs_all_rows = True

        def __len__(self):
            return len(lengths)

        def __getitem__(self, i):
            return {"segments": np.ones(lengths[i], np.int32)}

        def augmented(self, i, seeds, other):
            return {"row": np.int32(i), "tokens": np.int32(lengths[i])}

        def trimmed(self, batch):
            return batch

    plain, shared = TrainBatches(Ragged(), 8, seed=1), TrainBatches(Ragged(), 8, seed=1, window=4)
    orders = []
    for group in range(4):  # two epochs
        steps = range(4 * group, 4 * group + 4)
        assert sorted(i for s in steps for i in row_indices(plain, s)) == sorted(
            i for s in steps for i in row_indices(shared, s)
        )
        spans = [(shared[s]["tokens"].min(), shared[s]["tokens"].max()) for s in steps]
        assert all(a[1] <= b[0] for a, b in zip(sorted(spans), sorted(spans)[1:]))
        orders.append(tuple(np.argsort([low for low, _ in spans])))
    assert len(set(orders)) > 1
    again = TrainBatches(Ragged(), 8, seed=1, local_rows=[2, 5], window=4)
    for step in (13, 2, 14, 3):
        assert (
            again[step]["row"].tolist()
            == shared[step]["row"][[2, 5]].tolist()
            == row_indices(again, step)
        )


@pytest.mark.parametrize("n_processes", [1, 2, 4])
def test_processes_share_one_global_batch(n_processes):
    whole = TrainBatches(ROWS, 8, seed=1)
    share = 8 // n_processes
    parts = [
        TrainBatches(ROWS, 8, 1, range(p * share, (p + 1) * share)) for p in range(n_processes)
    ]
    for step in (0, 5, 60):
        got = [part[step] for part in parts]
        assert_rows_equal(
            {key: np.concatenate([g[key] for g in got]) for key in got[0]}, whole[step]
        )
    with pytest.raises(ValueError, match="local_rows"):
        TrainBatches(ROWS, 8, 1, range(4, 9))


@pytest.mark.parametrize("batch_size", [1, 3, 8, len(ROWS), len(ROWS) + 5])
@pytest.mark.parametrize("n_processes", [1, 2])
def test_evaluation_counts_every_row_once(batch_size, n_processes):
    cut = batch_size // 2
    slices = [None] if n_processes == 1 or not cut else [range(cut), range(cut, batch_size)]
    per_process = [list(eval_batches(ROWS, batch_size, local_rows=s)) for s in slices]
    assert {len(batches) for batches in per_process} == {-(-len(ROWS) // batch_size)}
    steps = zip(*per_process, strict=True)
    got = [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in steps
    ]
    assert all(batch["tokens"].shape == (batch_size, 16) for batch in got)
    flat = {key: np.concatenate([batch[key] for batch in got]) for key in got[0]}
    for i in range(len(ROWS)):
        assert_rows_equal({key: value[i] for key, value in flat.items()}, ROWS[i])
    assert not any(value[len(ROWS) :].any() for value in flat.values())
    assert len(list(eval_batches(ROWS, 8, limit=3))) == 3


# ---- prefetcher ---------------------------------------------------------------------------------------------------


def test_prefetcher_gives_the_steps_in_order_and_never_runs_far_ahead():
    fetched: list[int] = []
    taken = 0
    ahead: list[int] = []

    def fetch(step: int) -> int:
        fetched.append(step)
        ahead.append(len(fetched) - taken)
        return step * step

    with Prefetcher(fetch, 5, 30, depth=3) as prefetcher:
        while len(fetched) < 3:  # it starts without being asked …
            time.sleep(0.001)
        time.sleep(0.05)
        assert len(fetched) == 3  # … and goes no further
        for step in range(5, 30):
            assert prefetcher.get(step) == step * step
            taken += 1
        with pytest.raises(IndexError, match="stop=30"):
            prefetcher.get(30)
    assert fetched == list(range(5, 30))
    assert (
        max(ahead) <= 4
    )  # depth, and the one that `get` has handed out but the test has not counted yet


def test_prefetcher_raises_the_error_of_the_step_that_failed():
    def fetch(step: int) -> int:
        if step == 2:
            raise UserError("disk gone")
        return step

    with Prefetcher(fetch, 0, 10, depth=4) as prefetcher:
        assert [prefetcher.get(0), prefetcher.get(1)] == [0, 1]
        for _ in range(2):  # and again: it must not hang
            with pytest.raises(UserError, match="disk gone"):
                prefetcher.get(2)
        with pytest.raises(ValueError, match="2 is next"):
            prefetcher.get(3)


def test_prefetcher_closes_while_full_while_waited_for_and_twice():
    full = Prefetcher(lambda step: step, 0, 1000, depth=2)
    full.get(0)
    full.close()
    full.close()
    assert not full._thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        full.get(1)

    gate = threading.Event()
    slow = Prefetcher(lambda step: gate.wait(20), 0, 10)
    errors: list[Exception] = []

    def consume() -> None:
        try:
            slow.get(0)
        except RuntimeError as error:
            errors.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    slow.close(
        timeout=0.01
    )  # the fetch is still under way: close does not wait for ever, and wakes the consumer
    consumer.join(5)
    assert len(errors) == 1 and not consumer.is_alive()
    gate.set()
    slow._thread.join(5)
    assert not slow._thread.is_alive()


# ---- load ---------------------------------------------------------------------------------------------------------


def test_load_records_what_was_loaded(bundle, sources):
    record = json.loads(json.dumps(bundle.record))
    assert record["source"] == "stdlib" and record["python_version"] is None
    assert sum(record["n_files"].values()) == len(sources[1])
    assert sum(record["n_bytes"].values()) == sum(map(len, sources[1].values()))
    for split in stdlib.SPLITS:
        rows = getattr(bundle, split)
        assert record["n_rows"][split] == len(rows)
        assert sum(int(rows[i]["n_bytes"]) for i in range(len(rows))) == record["n_bytes"][split]


def test_a_cached_load_imports_neither_tfds_nor_jax(bundle, sources, cache):
    code = (
        LOADS
        + "d.train[0]; print([m for m in ('tensorflow', 'tensorflow_datasets', 'jax', 'grain') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(sources[0]), str(cache)]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    assert (
        subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )


def test_cache_directory_is_private_and_must_be_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("UOE_CACHE", str(tmp_path / "a/b"))
    assert pipeline.default_cache_dir() == tmp_path / "a/b"
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o700
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("UOE_CACHE", str(tmp_path / "file/below"))
    with pytest.raises(UserError, match="UOE_CACHE=.*file/below"):
        pipeline.default_cache_dir()
    monkeypatch.delenv("UOE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert pipeline.default_cache_dir() == tmp_path / ".cache/uoe_jax"


def test_the_true_standard_library(tmp_path):
    data = pipeline.load(text_config("", 256, 4), tmp_path)
    n_files, n_bytes = data.record["n_files"], data.record["n_bytes"]
    assert data.record["python_version"] == ".".join(map(str, sys.version_info[:3]))
    assert sum(n_files.values()) > 400 and sum(n_bytes.values()) > 8e6
    assert all(
        0.02 < n_bytes[split] / sum(n_bytes.values()) < 0.12 for split in ("validation", "test")
    )
    tokens = open_or_build(
        pytest.fail, BYTES, tmp_path, stdlib.open_stdlib("", tmp_path).key, "validation"
    )
    documents = [BYTES.decode_bytes(tokens[d]) for d in range(len(tokens))]
    assert Path(sysconfig.get_path("stdlib"), "os.py").read_bytes() in documents
    rows = data.validation
    assert sum(int(rows[i]["n_bytes"]) for i in range(len(rows))) == n_bytes["validation"]

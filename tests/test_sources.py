"""Sources on disk: every byte comes back, in one split, in one order; what is wrong is named with its place."""

from __future__ import annotations

import concurrent.futures
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from lra_data import ARTICLES, PAIRS, RAW, TSV, ZIP, tsv, write, write_zip

from uoe_jax.data import prepared
from uoe_jax.data.sources import aan, text, wikitext
from uoe_jax.data.store import open_or_build
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.errors import ConfigError, RunError, UserError

REPO = Path(__file__).resolve().parent.parent
SPLITS = ("train", "validation", "test")
LIMIT = 65536


def python(code: str, *args: object, **popen) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [
        sys.executable,
        "-c",
        "import sys; from pathlib import Path\n" + code,
        *map(str, args),
    ]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


# ---- prepared datasets --------------------------------------------------------------------------------------------


def numbered(n: int):
    return ({"name": f"{i}".encode(), "number": i, "text": bytes([i % 256]) * i} for i in range(n))


def prepare_numbered(cache: Path, n: int = 300, key: str = "key") -> Path:
    fields = {"name": bytes, "number": int, "text": bytes}
    splits = {"train": lambda: numbered(n), "test": lambda: numbered(1)}
    return prepared.dataset_directory(cache, key, "some_name", "1.2.3", fields, splits)


@pytest.mark.parametrize("batch_bytes", [1, 1000, 1 << 20])
def test_records_are_read_by_index_in_the_order_they_were_written(
    tmp_path, monkeypatch, batch_bytes
):
    monkeypatch.setattr(prepared, "BATCH_BYTES", batch_bytes)
    directory = prepare_numbered(tmp_path)
    assert prepared.record_counts(directory) == {"train": 300, "test": 1}
    records = prepared.open_records(directory, "train", 300)
    for i in (299, 0, 7, 256):
        assert records[i] == {"name": f"{i}".encode(), "number": i, "text": bytes([i % 256]) * i}
    assert [len(record["text"]) for record in records] == list(range(300))
    for outside in (-1, 300):
        with pytest.raises(IndexError):
            records[outside]
    assert [path.name for path in (tmp_path / "sources").iterdir()] == ["key"]


def test_records_may_be_read_by_many_threads(tmp_path):
    records = prepared.open_records(prepare_numbered(tmp_path), "train", 300)
    indices = [int(i) for i in np.random.default_rng(0).integers(0, 300, 2000)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [record["number"] for record in pool.map(records.__getitem__, indices)] == indices


@pytest.mark.parametrize(
    "error, raised", [(UserError("the source went away"), UserError), (ValueError("x"), ValueError)]
)
def test_a_build_that_fails_leaves_nothing_behind(tmp_path, error, raised):
    def records():
        yield {"text": b"first"}
        raise error

    with pytest.raises(raised) as caught:
        prepared.dataset_directory(
            tmp_path, "key", "name", "1.0.0", {"text": bytes}, {"train": records}
        )
    assert caught.value is error and list((tmp_path / "sources").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    def full(*_):
        raise RuntimeError(
            "write() failed: No space left on device"
        )  # what array_record says of a full disk

    with monkeypatch.context() as patch:
        patch.setattr(tfds.core.SequentialWriter, "add_examples", full)
        with pytest.raises(
            RunError, match="sources/key: cannot prepare .*No space left.*UOE_CACHE"
        ):
            prepare_numbered(tmp_path)
    assert list((tmp_path / "sources").iterdir()) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match="UOE_CACHE"):
        prepare_numbered(tmp_path / "file")


def test_a_killed_build_leaves_no_half_dataset(tmp_path):
    code = (
        "import time; from uoe_jax.data import prepared\n"
        "def records():\n"
        "    for i in range(100): yield {'text': bytes(100)}\n"
        "    print('half', flush=True); time.sleep(60)\n"
        "prepared.BATCH_BYTES = 1\n"
        "prepared.dataset_directory(Path(sys.argv[1]), 'key', 'some_name', '1.2.3', {'text': bytes}, {'train': records})"
    )
    process = python(code, tmp_path)
    assert process.stdout.readline() == "half\n", process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert not (tmp_path / "sources/key").exists()
    assert len(prepared.open_records(prepare_numbered(tmp_path), "train", 300)) == 300


def test_a_damaged_dataset_is_named_with_record_and_remedy(tmp_path):
    texts = [np.random.default_rng(i).bytes(2000) for i in range(300)]
    splits = {"train": lambda: ({"text": one} for one in texts)}
    directory = prepared.dataset_directory(
        tmp_path, "key", "some_name", "1.2.3", {"text": bytes}, splits
    )
    (file,) = directory.glob("*train*")
    whole = file.read_bytes()
    at = whole.index(texts[150]) + 1000
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    records = prepared.open_records(directory, "train", 300)
    assert records[149]["text"] == texts[149]
    with pytest.raises(
        UserError, match="sources/key: .*example 150 of the split .train..*delete it and run again"
    ):
        records[150]
    file.write_bytes(whole[:-LIMIT])
    with pytest.raises(
        UserError,
        match="sources/key: the prepared dataset cannot be read .*delete it and run again",
    ):
        prepared.open_records(directory, "train", 300)[0]
    file.write_bytes(whole)
    with pytest.raises(
        UserError, match="300 records in its train split where 301 were prepared.*delete it"
    ):
        prepared.open_records(directory, "train", 301)
    (directory / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="sources/key: .*delete it and run again"):
        prepared.record_counts(directory)


# ---- text ---------------------------------------------------------------------------------------------------------

LONG = ("Zoë said 日本語 🐍, and then nothing.\n" * 9000).encode()
TEXTS = {
    "a.txt": b"one\r\ntwo\x00\n",
    "deep/er/b.txt": "Zoë".encode(),
    "lines.txt": LONG,
    "exact.txt": b"x" * LIMIT,
    "one_more.txt": b"y" * (LIMIT + 1),
    "short_then_long.txt": b"short\n" + "語".encode() * 70000 + b"\nend",
    "packed.txt.gz": LONG[: 3 * LIMIT],
    **{f"many/{i}.txt": f"document {i}\n".encode() for i in range(900)},
}


def cut_by_hand(data: bytes) -> list[bytes]:
    if len(data) <= LIMIT:
        return [data] if data else []
    head = data[:LIMIT]
    head = (
        head[: head.rindex(b"\n") + 1] if b"\n" in head else head.decode("utf-8", "ignore").encode()
    )
    return [head, *cut_by_hand(data[len(head) :])]


def split_by_hand(document: bytes) -> str:
    return (["train"] * 98 + ["validation", "test"])[
        int(hashlib.sha256(document).hexdigest()[:16], 16) % 100
    ]


def test_more_is_held_out_of_a_little_text(tmp_path):
    place = write(tmp_path / "in", {f"{i}.txt": f"document {i}".encode() for i in range(200)})
    one, ten = (text.open_text(str(place), tmp_path, held_out) for held_out in (1, 10))
    with pytest.raises(ConfigError, match="split empty.*98/1/1"):
        list(
            text.open_text(
                str(write(tmp_path / "few", {"a.txt": b"a", "b.txt": b"b"})), tmp_path
            ).documents("test")
        )
    sizes = [len(list(ten.documents(split))) for split in SPLITS]
    assert sum(sizes) == 200 and all(10 <= n <= 32 for n in sizes[1:]) and one.key != ten.key
    documents = [
        f"document {i}".encode() for i in range(2000)
    ]  # of test stays of test where more is held out
    assert {d for d in documents if text.split_of(d) == "test"} < {
        d for d in documents if text.split_of(d, 10) == "test"
    }


def read(source) -> dict[str, list[bytes]]:
    return {split: list(source.documents(split)) for split in SPLITS}


def every(source) -> Counter:
    """All documents of a source that may be too small for three splits."""
    found = Counter()
    for split in SPLITS:
        try:
            for document in source.documents(split):
                found[document] += 1
        except ConfigError as error:
            if "split empty" not in str(error):
                raise
    return found


def test_text_comes_back_byte_for_byte_each_document_in_one_split(tmp_path):
    source = text.open_text(str(write(tmp_path / "in", {**TEXTS, "empty.txt": b""})), tmp_path)
    expected = [document for data in TEXTS.values() for document in cut_by_hand(data)]
    found = read(source)
    for split in SPLITS:
        assert Counter(found[split]) == Counter(d for d in expected if split_by_hand(d) == split), (
            split
        )
        tokens = open_or_build(
            lambda: source.documents(split), ByteTokenizer(), tmp_path, source.key, split
        )
        assert [ByteTokenizer().decode_bytes(tokens[d]) for d in range(len(tokens))] == found[split]
    record = json.loads(json.dumps(source.record()))
    assert (record["n_files"], record["n_empty_files"], record["sha256"]) == (
        len(TEXTS),
        1,
        source.facts["sha256"],
    )


def test_documents_end_at_lines_and_between_characters():
    assert (
        max(map(len, cut_by_hand(TEXTS["short_then_long.txt"]))) == LIMIT - 1
    )  # 語 takes three bytes
    for data in TEXTS.values():
        documents = list(text._from_text(io.BytesIO(data), Path("x")))
        assert documents == cut_by_hand(data) and b"".join(documents) == data
        assert all(len(document) <= LIMIT and document.decode() for document in documents)


def test_a_line_of_json_is_a_document(tmp_path):
    rows = [
        {"text": "Zoë\n🐍", "id": 7},
        {"text": ""},
        {"text": "z" * 200_000},
        {"id": None, "text": "last"},
    ]
    lines = "\n\n".join(json.dumps(row) for row in rows).encode()
    expected = Counter([b"Zo\xc3\xab\n\xf0\x9f\x90\x8d", b"z" * 200_000, b"last"])
    for name in ("x.jsonl", "x.jsonl.gz", "x.ndjson", "x.json", "x.json.gz"):
        file = write(tmp_path / name, {name: lines}) / name
        assert every(text.open_text(str(file), tmp_path)) == expected, name


def test_names_and_places_do_not_matter_but_content_does(tmp_path):
    files = {f"{i}.txt": f"document {i}".encode() for i in range(700)}
    one = text.open_text(str(write(tmp_path / "one", files)), tmp_path / "c1")
    moved = {
        f"{hashlib.sha256(name.encode()).hexdigest()}/{name}": data for name, data in files.items()
    }
    two = text.open_text(str(write(tmp_path / "two", moved) / "**/*.txt"), tmp_path / "c2")
    assert one.key == two.key and read(one) == read(two)
    (tmp_path / "two/more.txt").write_bytes(b"one document more")
    more = text.open_text(str(tmp_path / "two"), tmp_path / "c2")
    assert more.key != two.key and all(
        not Counter(read(two)[s]) - Counter(read(more)[s]) for s in SPLITS
    )
    (tmp_path / "line.txt").write_bytes(b'{"text": "a"}')
    (tmp_path / "line.jsonl").write_bytes(b'{"text": "a"}')
    one, two = (text.open_text(str(tmp_path / f"line.{end}"), tmp_path) for end in ("txt", "jsonl"))
    assert one.key == two.key and set(every(one)) == set(every(two)) == {b"a"}


def test_which_files_are_taken(tmp_path, monkeypatch):
    taken = ["a.txt", "b.jsonl", "c/d.txt.gz", "c/e.ndjson", "f[1].txt", "g.jsonl.gz"]
    others = [".hidden.txt", ".git/x.txt", "notes.md", "info.json", "c/image.gz"]
    root = write(tmp_path / "in", dict.fromkeys([*taken, *others], b"x"))
    (root / "folder.txt").mkdir()
    (root / "again.txt").symlink_to(root / "a.txt")
    (root / "loop").symlink_to(root)

    def found(path: str) -> list[str]:
        return sorted(
            Path(os.path.realpath(file)).relative_to(root).as_posix() for file in text.find(path)[0]
        )

    assert found(str(root)) == taken
    (root / "again.txt").unlink()  # glob itself walks in circles until the links are too many
    assert found(f"{root}/**/*.txt*") == ["a.txt", "c/d.txt.gz", "f[1].txt"]
    assert found(f"{root}/f[1].txt") == ["f[1].txt"]
    assert found(f"{root}/*.md") == ["notes.md"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/in/info.json") == ["info.json"]


def test_text_that_cannot_be_used_is_answered_with_its_place(tmp_path):
    def refused(name: str, data: bytes | None, match: str, path: str | None = None) -> None:
        folder = tmp_path / f"case{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if data is not None:
            write(folder, {name: data})
        with pytest.raises(UserError, match=match) as error:
            source = text.open_text(path or str(folder), tmp_path / "cache")
            [list(source.documents(split)) for split in SPLITS]
        assert "\n" not in str(error.value) and "data.path" in str(error.value)

    (tmp_path / "cache").mkdir()
    refused("", None, "data.path='.*case.*': holds no .txt, .jsonl or .ndjson file")
    refused("x.md", b"x", "holds no .txt")
    refused(
        "",
        None,
        "data.path='/nowhere/\\*.txt': is neither a directory nor a glob",
        "/nowhere/*.txt",
    )
    refused("x.txt", b"", "its 1 files are all empty: name files with text")
    refused("x.txt.gz", b"", "its 1 files hold no text")
    refused(
        "x.txt",
        b"one document",
        "its 1 documents leave the (train|validation|test) split empty.*98/1/1.*raise data.held_out",
    )
    refused("x.txt", b"abc\xff", "x.txt, byte 3.*is not UTF-8: convert")
    refused("x.txt", b"a" * LIMIT + b"\n\xe8\xaa\n", f"x.txt, byte {LIMIT + 1}.*is not UTF-8")
    refused("x.txt", b"\x80" * (LIMIT + 9), "x.txt, byte 0.*is not UTF-8")
    refused("x.txt", "語".encode()[1:] * LIMIT, "x.txt, byte 0.*is not UTF-8")
    refused(
        "x.txt",
        b"ab" * (LIMIT - 8) + "語".encode()[:2],
        f"x.txt, byte {2 * (LIMIT - 8)}.*is not UTF-8",
    )
    refused(
        "x.jsonl",
        b'{"text": "a"}\n{"text": 1}',
        "x.jsonl, line 2'.*a JSON object with its text as a string",
    )
    refused("x.jsonl", b'\n{"txt": "a"}', "x.jsonl, line 2'.*a JSON object with its text")
    refused("x.jsonl", b'["text"]', "x.jsonl, line 1'.*a JSON object with its text")
    refused("x.jsonl", b'{"text": "a"}\n{"text": "b', "x.jsonl, line 2'.*is no JSON.*fix it")
    refused("x.jsonl", b"[" * 100_000, "x.jsonl, line 1'.*is no JSON")
    refused("x.jsonl", b'{"text": "\xff"}', "x.jsonl, line 1, byte 10 of the line.*is not UTF-8")
    refused(
        "x.jsonl",
        b'{"text": "ab\\ud800"}',
        "x.jsonl, line 1, character 2 of its text.*is not UTF-8",
    )
    write(tmp_path / "gz", {"whole.txt.gz": b"x" * 999, "cut/x.txt.gz": b""})
    (tmp_path / "gz/cut/x.txt.gz").write_bytes((tmp_path / "gz/whole.txt.gz").read_bytes()[:-9])
    refused(
        "", None, "cut/x.txt.gz: cannot be read .*ended.*fix or remove it", str(tmp_path / "gz/cut")
    )
    (tmp_path / "gz/cut/x.txt.gz").write_bytes(b"not packed")
    refused(
        "",
        None,
        "cut/x.txt.gz: cannot be read .*[Nn]ot a gzip.*fix or remove it",
        str(tmp_path / "gz/cut"),
    )
    (tmp_path / "links").mkdir()
    (tmp_path / "links/gone.txt").symlink_to("/nowhere")
    refused(
        "",
        None,
        "links/gone.txt: cannot be read .No such file.*fix or remove it",
        str(tmp_path / "links"),
    )
    with pytest.raises(ConfigError, match="data.path='': set it to a directory"):
        text.open_text("", tmp_path)


def test_a_directory_that_cannot_be_read_is_not_skipped(tmp_path, monkeypatch):
    write(tmp_path, {"a.txt": b"a", "closed/b.txt": b"b"})
    real = os.scandir

    def scandir(path="."):  # root may read what chmod forbids
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for path in (tmp_path, tmp_path / "**/*.txt"):
        with pytest.raises(UserError, match="closed: cannot be read .Permission denied"):
            text.open_text(str(path), tmp_path / "cache")


def test_a_json_line_beyond_reason_is_refused_before_memory_is(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "LINE_BYTES", 1000)
    write(tmp_path, {"x.jsonl": b'{"text": "a"}\n' + json.dumps({"text": "b" * 2000}).encode()})
    with pytest.raises(UserError, match="x.jsonl, line 2: is longer than 1,000 bytes: cut it"):
        list(text.open_text(str(tmp_path), tmp_path / "cache").documents("train"))


@pytest.mark.parametrize("name", ["long.txt", "long.txt.gz"])
def test_a_line_of_50_mb_is_streamed(tmp_path, name):
    line = "日本語🐍".encode() * 4_000_000  # no line end at all
    (tmp_path / name).write_bytes(gzip.compress(line, 1) if name.endswith(".gz") else line)
    digest, size, largest = hashlib.sha256(), 0, 0
    file = tmp_path / name
    of_file = text.TextFile(file, hashlib.sha256(file.read_bytes()).hexdigest(), *text.look(file))
    tracemalloc.start()
    try:
        for document in text.read_text(of_file, prepared.RawFiles(tmp_path)):
            digest.update(document)
            size += len(document)
            largest = max(largest, len(document))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (size, digest.digest()) == (len(line), hashlib.sha256(line).digest())
    assert largest <= LIMIT and size > 50e6 and peak < 4e6


# ---- raw files ----------------------------------------------------------------------------------------------------


def test_hashes_are_remembered_until_a_file_changes(tmp_path, monkeypatch):
    files = [tmp_path / "a", tmp_path / "b"]
    [file.write_bytes(file.name.encode()) for file in files]
    expected = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    hashed: list[str] = []
    real = prepared._sha256
    monkeypatch.setattr(prepared, "_sha256", lambda file: hashed.append(file.name) or real(file))

    def hashes() -> list[str]:
        """Which files were read to answer, always rightly."""
        hashed.clear()
        assert prepared.RawFiles(tmp_path / "cache").sha256(files) == expected
        return list(hashed)

    assert hashes() == ["a", "b"]
    assert hashes() == ["a", "b"]  # so young that an edit might not change their times
    monkeypatch.setattr(prepared, "SETTLED_NS", 0)
    time.sleep(0.01)
    assert hashes() == ["a", "b"] and hashes() == []
    times = files[0].stat()
    files[0].write_bytes(b"A")
    os.utime(files[0], ns=(times.st_atime_ns, times.st_mtime_ns))  # of the same size and age
    expected[0] = hashlib.sha256(b"A").hexdigest()
    assert hashes() == ["a"] and hashes() == []
    (memo,) = (tmp_path / "cache").iterdir()
    for damage in (
        "",
        "{",
        "[]",
        json.dumps({str(files[0]): [1, 2]}),
        json.dumps({str(file): None for file in files}),
    ):
        memo.write_text(damage)
        assert hashes() == ["a", "b"] and hashes() == []


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "SETTLED_NS", -(2**62))
    write(tmp_path / "in", {f"{i}.txt": f"document {i}".encode() for i in range(600)})
    source = text.open_text(str(tmp_path / "in"), tmp_path / "cache")
    changing = tmp_path / "in/300.txt"
    times = changing.stat()
    changing.write_bytes(changing.read_bytes()[::-1])
    os.utime(changing, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(
        UserError, match=f"{changing.name}: changed while it was being read: run again"
    ):
        list(source.documents("train"))
    read(text.open_text(str(tmp_path / "in"), tmp_path / "cache"))  # running again helps
    memo = tmp_path / "cache/hashes.json"
    known = json.loads(memo.read_text())
    known[str(changing)][-1] = (
        "0" * 64
    )  # also where the file's times did not show that it had changed
    memo.write_text(json.dumps(known))
    with pytest.raises(
        UserError, match=f"{changing.name}: changed while it was being read: run again"
    ):
        list(text.open_text(str(tmp_path / "in"), tmp_path / "cache").documents("train"))
    read(text.open_text(str(tmp_path / "in"), tmp_path / "cache"))
    changing.unlink()
    with pytest.raises(UserError, match=f"{changing.name}: cannot be read .No such file"):
        list(source.documents("train"))


def test_a_file_that_grows_while_it_is_hashed_is_noticed(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"a")
    monkeypatch.setattr(prepared, "_sha256", lambda file: file.write_bytes(b"ab") and "0")
    with pytest.raises(UserError, match="a: changed while it was being read: run again"):
        prepared.RawFiles(tmp_path / "cache").sha256([file])


# ---- WikiText-103 -------------------------------------------------------------------------------------------------


def test_wikitext_is_kept_byte_for_byte_article_by_article(tmp_path):
    write_zip(tmp_path / "packed")
    write(tmp_path / "unpacked", RAW)
    places = ["packed", f"packed/{ZIP}", "unpacked", "unpacked/wikitext-103-raw"]
    sources = [
        wikitext.open_wikitext103(str(tmp_path / place), tmp_path / "cache") for place in places
    ]
    assert sources[0].key == sources[1].key and sources[2].key == sources[3].key
    for source in sources:
        assert {split: list(source.documents(split)) for split in SPLITS} == ARTICLES
        record = json.loads(json.dumps(source.record()))
        assert record["n_bytes"] == {split: len(b"".join(ARTICLES[split])) for split in SPLITS}
    assert (
        sources[0].facts["sha256"]
        == hashlib.sha256((tmp_path / "packed" / ZIP).read_bytes()).hexdigest()
    )
    assert not (tmp_path / "cache/sources").exists()  # read where it is, not copied


def test_wikitext_is_looked_for_where_tfds_keeps_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(
        ConfigError, match=f"^data.path='': neither .*{tmp_path}/downloads/manual.*download"
    ):
        wikitext.open_wikitext103("", tmp_path / "cache")
    write_zip(tmp_path / "downloads/manual")
    (document,) = wikitext.open_wikitext103("", tmp_path / "cache").documents("test")
    assert document == ARTICLES["test"][0]


def test_wikitext_that_cannot_be_used_is_answered_with_what_to_download(tmp_path):
    def refused(place: Path, match: str) -> None:
        with pytest.raises(ConfigError, match=match) as error:
            read(wikitext.open_wikitext103(str(place), tmp_path / "cache"))
        for part in ("data.path=", ZIP, "191,984,949 bytes", "download"):
            assert part in str(error.value)

    refused(
        tmp_path / "nothing",
        f"neither {ZIP} nor wikitext-103-raw/ is in .*nothing.*put it into .*nothing",
    )
    for i, name in enumerate(RAW):
        without = {key: value for key, value in RAW.items() if key != name}
        refused(write_zip(tmp_path / f"a{i}", without), f"is without {name}: download")
        refused(write(tmp_path / f"b{i}", without), f"is without {Path(name).name}: download")
        refused(
            write_zip(tmp_path / f"c{i}", RAW | {name: b""}),
            f"is without text in {Path(name).name}",
        )
        refused(
            write(tmp_path / f"d{i}", RAW | {name: b""}), f"is without text in {Path(name).name}"
        )
        refused(
            write_zip(tmp_path / f"e{i}", RAW | {name: b" No title here . \n"}),
            "is without a line ' = Title = '",
        )
        place = write_zip(tmp_path / f"f{i}")
        whole = (place / ZIP).read_bytes()
        at = whole.index(name.encode()) + len(name) + 20
        (place / ZIP).write_bytes(whole[:at] + b"????" + whole[at + 4 :])
        refused(place, f"{ZIP}': is damaged in {name}")
    for n_bytes in (0, 100, len(whole) - 30):
        (place / ZIP).write_bytes(whole[:n_bytes])
        refused(place, f"{ZIP}': is no whole zip archive")


def test_an_archive_that_is_replaced_meanwhile_is_noticed(tmp_path, monkeypatch):
    place = write_zip(tmp_path / "in")
    monkeypatch.setattr(prepared.RawFiles, "sha256", lambda *_: ["0" * 64])
    with pytest.raises(UserError, match=f"{ZIP}: changed while it was being read: run again"):
        list(wikitext.open_wikitext103(str(place), tmp_path / "cache").documents("train"))


def test_two_processes_may_prepare_one_dataset_at_once(tmp_path):
    write(tmp_path / "in", TSV)
    code = (
        "from uoe_jax.data.sources import aan\n"
        "source = aan.open_aan(sys.argv[1], Path(sys.argv[2]))\n"
        "print(source.record(), source.examples('train')[49])"
    )
    racers = [python(code, tmp_path / "in", tmp_path / "cache") for _ in range(2)]
    results = [racer.communicate(timeout=60) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], results
    assert results[0][0] == results[1][0] and repr(PAIRS["train"][-1][1]) in results[0][0]
    assert len(list((tmp_path / "cache/sources").iterdir())) == 1


# ---- AAN ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("below", ["", "tsv_data", "lra_release/lra_release/tsv_data"])
def test_pairs_are_read_by_index_as_the_file_has_them(tmp_path, below):
    source = aan.open_aan(
        str(write(tmp_path / "in" / below, TSV) and tmp_path / "in"), tmp_path / "cache"
    )
    assert (source.n_classes, source.vocab_size) == (2, 0)
    for split in SPLITS:
        examples = source.examples(split)
        assert len(examples) == len(PAIRS[split])
        for i in reversed(range(len(examples))):
            label, one, two = PAIRS[split][i]
            assert examples[i].inputs == (one, two) and examples[i].label == int(label)
            assert type(examples[i].label) is int
    assert json.loads(json.dumps(source.record()))["n_examples"] == {
        "train": 50,
        "validation": 2,
        "test": 1,
    }


def test_line_ends_of_windows_belong_to_no_text(tmp_path):
    write(tmp_path, TSV | {"new_aan_pairs.test.tsv": tsv(PAIRS["test"], b"\r\n")})
    assert aan.open_aan(str(tmp_path), tmp_path / "cache").examples("test")[0].inputs == (
        b"c",
        b"d",
    )


@pytest.mark.parametrize(
    "line, match",
    [
        (b"1.0\tid1\tid2\ttext", "has 4 fields between tabs instead of 5"),
        (b"1.0\tid1\tid2\ta\tb\tc", "has 6 fields"),
        (b"", "has 1 fields"),
        (b"2\tid1\tid2\ta\tb", "has the label b'2' instead of 0 or 1"),
        (b"label\tid1\tid2\ttext1\ttext2", "has the label b'label'"),
        (b"nan\tid1\tid2\ta\tb", "has the label b'nan'"),
        (b"0\tid1\tid2\t\tb", "has an empty text"),
    ],
)
def test_a_line_that_is_no_pair_is_named(tmp_path, line, match):
    name = "new_aan_pairs.eval.tsv"
    write(tmp_path, TSV | {name: TSV[name] + line + b"\n" + TSV[name]})
    with pytest.raises(
        ConfigError,
        match=f"data.path='.*{name}, line 3': {match}.*fix the line, or unpack it again",
    ):
        aan.open_aan(str(tmp_path), tmp_path / "cache")
    assert list((tmp_path / "cache/sources").iterdir()) == []


def test_pairs_that_are_missing_are_answered_with_what_to_download(tmp_path, monkeypatch):
    with pytest.raises(
        ConfigError,
        match="data.path='.*new_aan_pairs.train.tsv, .* not in .*lra_release.gz .*tsv_data",
    ):
        aan.open_aan(str(tmp_path / "nothing"), tmp_path / "cache")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=f"data.path='': .* not in {tmp_path}/downloads/manual: download lra_release.gz",
    ):
        aan.open_aan("", tmp_path / "cache")
    write(tmp_path / "in", {name: data for name, data in TSV.items() if "eval" not in name})
    with pytest.raises(
        ConfigError, match="data.path='.*': new_aan_pairs.eval.tsv not in .*in: download"
    ):
        aan.open_aan(str(tmp_path / "in"), tmp_path / "cache")
    write(tmp_path / "in", {"new_aan_pairs.eval.tsv": b""})
    with pytest.raises(
        ConfigError, match="data.path='.*new_aan_pairs.eval.tsv': is empty: unpack it again"
    ):
        aan.open_aan(str(tmp_path / "in"), tmp_path / "cache")


def test_what_is_prepared_opens_without_heavy_imports(tmp_path):
    write_zip(tmp_path / "wiki")
    write(tmp_path / "aan", TSV)
    write(tmp_path / "text", {"a.txt": b"a"})
    code = (
        "from uoe_jax.data.sources import aan, text, wikitext\n"
        "cache = Path(sys.argv[1]) / 'cache'\n"
        "for opened, name in ((wikitext.open_wikitext103, 'wiki'), (aan.open_aan, 'aan'), (text.open_text, 'text')):\n"
        "    opened(str(Path(sys.argv[1]) / name), cache).record()\n"
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'jax', 'flax') if m in sys.modules])"
    )
    wikitext.open_wikitext103(str(tmp_path / "wiki"), tmp_path / "cache")
    aan.open_aan(str(tmp_path / "aan"), tmp_path / "cache")
    assert python(code, tmp_path).communicate(timeout=60) == ("[]\n", "")

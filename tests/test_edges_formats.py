"""Users' files: formats by content or name, byte-order marks, locales, skipped files."""

from __future__ import annotations

import ast
import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import subprocess
import sys
import tarfile
import types
import zipfile

import pytest
from helpers import ROOT, TINY

from uoe_jax import cli
from uoe_jax.config import from_dict, to_dict
from uoe_jax.config.load import evaluate
from uoe_jax.data.pipeline import default_cache_dir, load
from uoe_jax.data.sources import stdlib, text, wikitext
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.data.tokenizers.hf import HFTokenizer
from uoe_jax.data.tokenizers.load import load_tokenizer
from uoe_jax.errors import UserError
from uoe_jax.infer.command import read_prompts
from uoe_jax.workdir import read_config, read_json

BOM = codecs.BOM_UTF8
ROWS = [f"document {i}" for i in range(40)]
LINES = "".join(json.dumps({"id": i, "text": row}) + "\n" for i, row in enumerate(ROWS)).encode()
DOCUMENTS = sorted(row.encode() for row in ROWS)


def sentence(capsys, *args) -> str:
    """The one line that `uoe ARGS` prints on its way to exit code 2."""
    assert cli.main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("uoe: ") and err.count("\n") == 1, err
    return err


def documents(path, cache) -> list[bytes]:
    """Those of all splits, of which some may be empty."""
    source, found = text.open_text(str(path), cache), []
    for split in ("train", "validation", "test"):
        try:
            found += source.documents(split)
        except UserError as error:
            if "split empty" not in str(error):
                raise
    return sorted(found)


# ---- formats ----


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.jsonl", LINES),
        ("a.JSONL", LINES),
        ("a.Ndjson", LINES),
        ("a.JSON", LINES),
        ("a.jsonl.GZ", gzip.compress(LINES, mtime=0)),
        ("a.JsonL.gz", gzip.compress(BOM + LINES, mtime=0)),
        ("packed.jsonl", gzip.compress(LINES, mtime=0)),
        ("a.txt", LINES),
        ("a.TXT.gz", gzip.compress(LINES, mtime=0)),
        ("a", LINES),
        ("a.bin", gzip.compress(LINES, mtime=0)),
        ("a.log", BOM + b"\n \r\n" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("a.jsonl", BOM + LINES),
        ("a.md", b"\n" * 5000 + LINES),
    ],
)
def test_json_lines_are_recognised_by_name_in_any_case_or_by_content(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert documents(tmp_path / name, tmp_path / "cache") == DOCUMENTS


@pytest.mark.parametrize(
    "name, data",
    [
        ("a.TXT", "Zoë".encode()),
        ("a.txt.GZ", "Zoë".encode()),
        ("a", b'{\n  "text": "a"\n}\n'),
        ("a.txt", b'[\n  {"text": "a"}\n]\n'),
        ("a.c", b"{ int text; }\n{ int text; }\n"),
        ("a.txt", b'{"text": "an example"}\nand what it says\n'),
        ("a.txt", b'{"only": "one"}'),
        ("a.txt", b"[1, 2]\n[3]\n"),
        ("a.txt", b"PAR1 is a receptor"),
        ("a.txt", b"BZh is a word\0"),
        ("a.txt", b" \n"),
    ],
)
def test_text_stays_text(name, data, tmp_path):
    for mark in (b"", BOM):
        whole = mark + data
        (tmp_path / name).write_bytes(
            gzip.compress(whole, mtime=0) if name.lower().endswith("gz") else whole
        )
        assert documents(tmp_path / name, tmp_path / "cache") == [data]


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", "a")
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return out.getvalue()


OTHERS = {
    "Parquet": b"PAR1\x15\x04\x15",
    "Arrow": b"ARROW1\0\0",
    "Feather": b"FEA1\0",
    "zstandard": b"\x28\xb5\x2f\xfd\x04",
    "zip": zipped(),
    "bzip2": bz2.compress(LINES),
    "xz": lzma.compress(LINES),
    "tar": tarred(),
    "PDF": b"%PDF-1.7\n",
    "gzip": gzip.compress(LINES, mtime=0),
    "UTF-16": "text".encode("utf-16"),
    "UTF-32": "text".encode("utf-32"),
    "UTF-16 ": "text".encode("utf-16-le"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.data"])
def test_other_formats_are_refused_by_their_name(kind, name, tmp_path):
    file = tmp_path / name
    if kind == "gzip" and not name.endswith(".gz"):
        return  # it is read
    file.write_bytes(gzip.compress(OTHERS[kind], mtime=0) if name.endswith(".gz") else OTHERS[kind])
    with pytest.raises(
        UserError, match=f"^data.path='{file}': (is|holds) {kind.strip()}.*: convert it to "
    ) as error:
        text.open_text(str(tmp_path / "a*"), tmp_path / "cache")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, data, said",
    [
        (
            "a.log",
            b'{"id": 1, "content": "x"}\n{"id": 2}\n',
            """keys 'id', 'content' and no string "text": put""",
        ),
        ("a.txt", b'{"meta": 1}\n{"text": "x"}\n', """keys 'meta' and no string "text": put"""),
        ("a", b'{"text": ["x"]}\n\n{"text": 2}\n', """keys 'text' and no string "text": put"""),
        ("a.JSON", b'\n[\n{"text": "x"}]', "one JSON array: write its objects one a line"),
        (
            "a.txt",
            b'[{"text": "x"}, {"text": "y"}]',
            "one JSON array: write its objects one a line",
        ),
        ("a.jsonl", b'{"content": "x"}', """{"text": "..."} (it has the keys 'content')"""),
        ("a.txt", LINES + b'{"text": "b', "line 41': is no JSON"),
        ("a.txt.GZ", b"text", "is named .gz and is not a gzip file"),
    ],
)
def test_json_without_texts_is_refused_and_not_trained_on(name, data, said, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        documents(tmp_path / name, tmp_path / "cache")
    assert (
        said in str(error.value)
        and "data.path" in str(error.value)
        and "\n" not in str(error.value)
    )


def test_documents_keys_and_records_are_those_they_were(tmp_path):
    """If this fails, runs on plain files are refused their data, and caches go stale."""
    plain = {
        "a.txt": b"one\n",
        "b.jsonl": LINES,
        "c.txt.gz": bytes.fromhex("1f8b08000000000002032b29cf0700668aca1103000000"),
    }
    for name, data in plain.items():
        (tmp_path / name).write_bytes(data)
    before = text.open_text(str(tmp_path), tmp_path / "cache")
    assert (
        before.facts["sha256"] == "4363db992b6f1cb02beefdd24b0e59cfe384a65bdeb98b8e8d3f836fefad2def"
    )
    assert before.key == "text-1.0.0-" + before.facts["sha256"][:24]
    (tmp_path / "a.txt").write_bytes(BOM + b"one\n")
    assert b"one\n" in documents(tmp_path, tmp_path / "cache")
    # Its bytes gave another document once: the key of then must not be found.
    file = tmp_path / "a.txt"
    assert text.TextFile(file, "0", *text.look(file)).content == ("0", False, False, "bom")
    (tmp_path / "b.jsonl").rename(tmp_path / "b.TXT")
    (tmp_path / "a.txt").write_bytes(b"one\n")
    assert text.open_text(str(tmp_path), tmp_path / "cache").key == before.key


# ---- skipped files ----


@pytest.fixture
def mixed(tmp_path):
    """A directory as users upload it: three files are read, two are not, one is hidden."""
    place = tmp_path / "up"
    place.mkdir()
    for i, name in enumerate(("a.jsonl", "b.JSONL", "c.jsonl.GZ")):
        lines = "".join(json.dumps({"text": f"{name} {row}"}) + "\n" for row in range(100)).encode()
        (place / name).write_bytes(gzip.compress(lines, mtime=0) if i == 2 else lines)
    (place / "d.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    (place / "e.parquet").write_bytes(b"PAR1")
    (place / ".hidden").write_bytes(b"x")
    return place


def said_of(place) -> str:
    return (
        f"uoe: data.path={place}: 2 of 5 files skipped (d.jsonl.zst, e.parquet); "
        ".txt, .jsonl and .ndjson are read, also gzipped; name others by a glob\n"
    )


def test_skipped_files_are_named_once_by_every_command(mixed, tmp_path, capsys):
    from uoe_jax.infer.evaluation import targets_per_word

    config = small(source="text", path=str(mixed), held_out=10)
    bundle = load(config, default_cache_dir())
    targets_per_word(config, bundle, "validation")  # what `uoe eval` reads, too
    assert capsys.readouterr().err == said_of(mixed)
    assert (bundle.record["n_files"], bundle.record["n_passed_over"]) == (3, 2)
    options = [
        "--config.data.source=text",
        f"--config.data.path={mixed}",
        "--config.data.held_out=10",
    ]
    assert (
        cli.main(
            [
                "tokenizer",
                "train",
                f"--config={TINY}",
                *options,
                "--vocab=300",
                f"--out={tmp_path}/t.json",
            ]
        )
        == 0
    )
    assert capsys.readouterr().err == said_of(mixed)


def small(**data):
    routing = dict(n_experts=4, k=2)
    model = dict(
        d_model=32,
        n_layers=1,
        n_heads=4,
        d_hidden=64,
        context_length=64,
        vocab_size=257,
        smha=routing,
        uome=routing,
    )
    return from_dict({"model": model, "data": data})


def test_skipped_files_are_named_by_process_0_alone(mixed, tmp_path, capsys, monkeypatch):
    for me, said in (("", said_of(mixed)), ("0", said_of(mixed)), ("1", "")):
        monkeypatch.setenv("UOE_PROCESS_ID", me)
        text.open_text(str(mixed), tmp_path / "cache")
        assert capsys.readouterr().err == said
    monkeypatch.delenv("UOE_PROCESS_ID")
    text.open_text(f"{mixed}/*.*[lLZ]", tmp_path / "cache")  # a glob names what it wants
    assert capsys.readouterr().err == ""
    (mixed / "more").mkdir()
    for i in range(9):
        (mixed / "more" / f"{i}.md").write_bytes(b"")
    text.open_text(str(mixed), tmp_path / "cache")
    assert (
        "11 of 14 files skipped (d.jsonl.zst, e.parquet, more/0.md, …); " in capsys.readouterr().err
    )
    with pytest.raises(
        UserError,
        match=r"holds no .txt, .* but 9 other files \(0.md, 1.md, 2.md, …\): name a directory",
    ):
        text.open_text(str(mixed / "more"), tmp_path / "cache")


# ---- other files by name ----


@pytest.mark.parametrize(
    "name, data, prompts",
    [
        ("p.JSONL", b'{"prompt": "a"}\n\n{"prompt": "b\\nc"}\n', {1: "a", 3: "b\nc"}),
        ("p.ndjson", b'{"prompt": "a"}\n', {1: "a"}),
        ("p.txt", b'\n{"prompt": "a", "id": 1}\r\n{"prompt": "b"}', {2: "a", 3: "b"}),
        ("p.jsonl", BOM + b'{"prompt": "a"}\n', {1: "a"}),
        ("p", BOM + "Zoë\r\n\n x \x85y\u2028z\n".encode(), {1: "Zoë", 3: " x \x85y\u2028z"}),
        ("p.txt", b'[1, 2]\n3\n"a"\n{ x\n', {1: "[1, 2]", 2: "3", 3: '"a"', 4: "{ x"}),
    ],
)
def test_prompts_are_recognised_by_name_in_any_case_or_by_content(name, data, prompts, tmp_path):
    (tmp_path / name).write_bytes(data)
    assert read_prompts(str(tmp_path / name)) == prompts


@pytest.mark.parametrize(
    "name, data, said",
    [
        ("p.txt", b'{"text": "a"}\n', """line 1: is JSON with the keys 'text' where"""),
        ("p.txt", b'{"prompt": "a"}\nb\n', "line 2: is no JSON where"),
        (
            "p.JSONL",
            b'{"prompt": "a"}\n\n{"prompt": 3}\n',
            "line 3: is JSON with the keys 'prompt' where",
        ),
        ("p.JSON", b'[{"prompt": "a"}]', "line 1: is JSON where"),
        ("p.txt", b'[{"prompt": "a"}]', "is one JSON value and not JSON lines"),
        ("p.txt", b'{\n "prompt": "a"\n}', "is one JSON value and not JSON lines"),
        ("p.jsonl", b'{"prompt": "\\ud800"}', "line 1: its prompt holds half a character"),
        ("p.txt", "Zoë".encode("latin-1"), "cannot be read ('utf-8' codec"),
        ("p.txt", "Zoë".encode("utf-16"), "is UTF-16: convert it to UTF-8"),
        ("p.jsonl.gz", gzip.compress(b"x", mtime=0), "holds gzip, which is not read here"),
        ("p.txt", BOM + b"\n", "holds no prompts"),
    ],
)
def test_prompts_that_are_none_are_named_with_their_line(name, data, said, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        read_prompts(str(tmp_path / name))
    assert str(error.value).startswith(f"--prompts={tmp_path / name}: {said}") and "\n" not in str(
        error.value
    )


def test_a_prompt_that_does_not_fit_is_named_with_its_line():
    from uoe_jax.infer.sample import Sampler

    one = types.SimpleNamespace(config=small(), tokenizer=ByteTokenizer())
    with pytest.raises(
        UserError,
        match="^--prompts=p.txt: line 7: 101 tokens leave no room in model.context_length=64",
    ):
        Sampler.encoded(one, "x" * 100, "--prompts=p.txt: line 7")


def test_byte_order_marks_are_no_part_of_configurations_and_tokenizers(tmp_path):
    values = {"train": {"steps": 3}}
    for name in ("c.JSON", "c.json"):
        (tmp_path / name).write_bytes(BOM + json.dumps(values).encode())
        assert evaluate(str(tmp_path / name)) == values
    program = (
        "# -*- coding: {} -*-\nfrom uoe_jax import config as uoe\n"
        "def get_config():\n    c = uoe.base()\n    c.generate.prompt = 'Zoë'\n    return c\n"
    )
    latin = program.format("latin-1").encode("latin-1")
    for name, data in (("a.py", BOM + program.format("utf-8").encode()), ("b.py", latin)):
        (tmp_path / name).write_bytes(data)
        assert evaluate(str(tmp_path / name))["generate"]["prompt"] == "Zoë"
    (tmp_path / "config.json").write_bytes(BOM + json.dumps(to_dict(small())).encode())
    assert read_config(str(tmp_path)) == small()
    assert read_json(tmp_path / "c.json", "") == values
    trained = HFTokenizer.train([b"ab ab ab"], 258)
    (tmp_path / "t.json").write_bytes(BOM + trained.to_json().encode())
    assert load_tokenizer("bpe", str(tmp_path / "t.json")).fingerprint == trained.fingerprint


def test_byte_order_marks_are_no_part_of_sources_of_python(tmp_path):
    for folder, mark in (("plain", b""), ("marked", BOM)):
        (tmp_path / folder).mkdir()
        for i in range(60):
            (tmp_path / folder / f"{i}.{'PY' if i % 2 else 'py'}").write_bytes(mark + b"x = 1\n")
    plain, marked = (
        stdlib.open_stdlib(str(tmp_path / folder), tmp_path / "cache")
        for folder in ("plain", "marked")
    )
    assert plain.key != marked.key and sum(plain.facts["n_files"].values()) == 60
    assert set(marked.documents("train")) == set(plain.documents("train")) == {b"x = 1\n"}
    (tmp_path / "wiki").mkdir()
    for member in wikitext.MEMBERS.values():
        (tmp_path / "wiki" / member).write_bytes(BOM + b"\n = A = \n\nText.\n\n = B = \n\nText.\n")
    with pytest.raises(UserError, match="changed, with a byte-order mark.*download"):
        list(
            wikitext.open_wikitext103(str(tmp_path / "wiki"), tmp_path / "cache").documents("test")
        )


# ---- locales ----


def test_text_is_read_and_written_in_a_stated_encoding():
    """Else a locale such as en_US.ISO-8859-1 silently makes other text of users' files."""
    for file in sorted((ROOT / "uoe_jax").rglob("*.py")):
        calls = (
            node for node in ast.walk(ast.parse(file.read_bytes())) if isinstance(node, ast.Call)
        )
        for call in calls:
            given = {keyword.arg for keyword in call.keywords}
            assert "encoding" in given or not of_text(call), f"{file}, line {call.lineno}"


def of_text(call: ast.Call) -> bool:
    """Whether a call reads or writes text; not the functions of uoe_jax.workdir."""
    method = getattr(call.func, "attr", "")
    modes = {arg.value for arg in call.args if isinstance(arg, ast.Constant)}
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and not modes & {"rb", "wb", "ab"}
    if method in ("run", "Popen"):
        return any(keyword.arg in ("text", "universal_newlines") for keyword in call.keywords)
    return (
        method in ("read_text", "write_text") or method == "open" and bool(modes & {"r", "w", "a"})
    )


def test_an_odd_locale_changes_no_text(tmp_path):
    (tmp_path / "p.txt").write_bytes("Zoë\n".encode())
    code = (
        "import sys; from pathlib import Path\n"
        "from uoe_jax.infer.command import read_prompts\n"
        "from uoe_jax.workdir import read_json, write_json, write_text\n"
        "place = Path(sys.argv[1])\n"
        "(prompt,) = read_prompts(str(place / 'p.txt')).values()\n"
        "write_text(place / 'out.txt', prompt)\n"
        "(place / 'in.json').write_bytes(b'{\"a\": \"Zo\\xc3\\xab\"}')\n"
        "assert read_json(place / 'in.json', '')['a'] == prompt == 'Zo\\xeb'\n"
    )
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, **odd}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.txt").read_bytes() == "Zoë".encode()


# ---- data in a report ----


def test_no_data_of_a_report_begin_a_tag_or_a_comment(tmp_path):
    import numpy as np
    from report_runs import write_run

    from uoe_jax.report.page import page
    from uoe_jax.report.sample import RoutingSample, Sample
    from uoe_jax.report.series import read_log

    odd = ["<!--", "<script>", "</script>", "]]>", "\u2028", "&lt;", "\ud800", "'\"\\"]
    run = write_run(tmp_path / "run", 20)
    found = read_log(str(run), read_config(str(run)), "".join(odd))
    sample = Sample({}, [odd], None, (0, 0), 0, odd)
    look = RoutingSample(sample, {"smha": np.zeros((1, 1, 1, 1))}, 3, "<!--")
    whole = page([found, found], [look, look])
    assert whole.encode()  # which a file can hold
    data = whole.partition('<script type="application/json" id="data">')[2].partition("</script>")[
        0
    ]
    assert not set("<\u2028\u2029") & set(data)
    assert json.loads(data)[0]["sample"]["texts"][0][:6] == odd[:6]
    figures = whole.partition("</section>")[2].partition('<script type="application/json"')[0]
    inside = figures.partition(">")[2].rpartition("</script>")[0]
    assert (
        "docs_json" in inside
        and "<!--" not in inside
        and "<script" not in inside
        and "\u2028" not in inside
    )

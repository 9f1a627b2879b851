"""Streams, homes and terminals that do not work: a sentence, or a default that is reported once."""

from __future__ import annotations

import io
import json
import os
import pwd
import stat
import subprocess
import sys
import tempfile

import pytest
from helpers import TINY, environment, metric_lines, write_source

from uoe_jax import cli, runtime_env
from uoe_jax.config import Config
from uoe_jax.data.prepared import manual_dir
from uoe_jax.errors import UserError
from uoe_jax.infer import command
from uoe_jax.infer.sample import Completion
from uoe_jax.runtime_env import default_cache_dir

SETTLED = "import os, sys; from uoe_jax import runtime_env; runtime_env.prepare_process(); "


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files")


def python(code: str, *args: str, **popen) -> tuple[int, bytes, bytes]:
    """(exit code, stdout, stderr) of a program."""
    for stream in ("stdout", "stderr"):
        popen.setdefault(stream, subprocess.PIPE)
    popen.setdefault("env", environment())
    done = subprocess.run([sys.executable, "-c", code, *args], timeout=60, **popen)
    return done.returncode, done.stdout or b"", done.stderr or b""


def sentence(capsys, *args) -> str:
    assert cli.main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("uoe: ") and err.count("\n") == 1, err
    return err


# --- home -----------------------------------------------------------------------------------------


@pytest.fixture
def homeless(monkeypatch, tmp_path):
    """No HOME, no entry in passwd, no UOE_CACHE; the system's temporary directory is tmp_path."""

    def unknown(*_):
        raise KeyError

    for name in ("HOME", "UOE_CACHE"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)
    for name in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(pwd, name, unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_without_a_home_the_cache_is_a_private_temporary_directory(homeless, capfd):
    found = default_cache_dir()
    assert (
        found == homeless / f"uoe_jax-{os.getuid()}" and stat.S_IMODE(found.stat().st_mode) == 0o700
    )
    assert default_cache_dir() == found  # said once
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and str(found) in err and "set UOE_CACHE" in err


@pytest.mark.parametrize("taken", ["writable by others", "a link", "of another user", "a file"])
def test_a_temporary_cache_in_which_others_can_write_is_passed_over(homeless, monkeypatch, taken):
    user = os.getuid() + (taken == "of another user")
    place = homeless / f"uoe_jax-{user}"
    if taken == "a link":
        (homeless / "elsewhere").mkdir()
        place.symlink_to(homeless / "elsewhere")
    elif taken == "a file":
        place.write_text("")
    else:
        place.mkdir()
        place.chmod(0o777 if taken == "writable by others" else 0o700)
    monkeypatch.setattr(os, "getuid", lambda: user)
    found = default_cache_dir()
    assert found.name.startswith(f"{place.name}-") and stat.S_IMODE(found.stat().st_mode) == 0o700
    assert os.environ["UOE_CACHE"] == str(found)


@pytest.mark.parametrize("home", ["/dev/null", "/etc/passwd", "/proc/nowhere"])
def test_a_home_that_cannot_be_written_is_passed_over(homeless, monkeypatch, capfd, home):
    monkeypatch.setenv("HOME", home)
    assert default_cache_dir().parent == homeless
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "given", ["/etc/passwd", "~/x", "~nobody-here/x", "/proc/x", "/tmp/\udcff"]
)
def test_a_given_cache_that_cannot_be_used_is_refused(homeless, monkeypatch, given):
    monkeypatch.setenv("UOE_CACHE", given)
    with pytest.raises(UserError, match="^UOE_CACHE="):
        default_cache_dir()


def test_the_cache_is_an_absolute_path(homeless, monkeypatch):
    monkeypatch.chdir(homeless)
    monkeypatch.setenv("UOE_CACHE", "below")
    assert default_cache_dir() == homeless / "below"


def test_libraries_find_a_home_to_fail_in(tmp_path):
    """In the one of a user without any nothing can be made; an empty HOME is none."""
    code = "import os, pwd\ndef none(*_): raise KeyError\npwd.getpwuid = none\n"
    env = {k: v for k, v in environment().items() if k != "HOME"}
    for more in ({}, {"HOME": ""}):
        found = python(
            code + SETTLED + "from pathlib import Path; print(Path.home())", env=env | more
        )
        assert found == (0, b"/dev/null\n", b"")


NOWHERE, FILE = "~nobody-here/x", "data.tokenizer_file"


@pytest.mark.parametrize("name,args", [
    ("--workdir", ["eval", f"--workdir={NOWHERE}"]),
    ("--workdir", ["train", f"--config={TINY}", f"--workdir={NOWHERE}"]),
    ("--workdir", ["report", f"--workdir={NOWHERE}"]),
    ("--out", ["tokenizer", "train", f"--config={TINY}", "--vocab=300", f"--out={NOWHERE}"]),
    ("--from", ["import", f"--from={NOWHERE}", "--experts=2", "--k=1", "--workdir=never"]),
    (f"config.{FILE}", ["train", f"--config={TINY}", "--workdir=never",
                        f"--config.{FILE}={NOWHERE}", "--config.data.tokenizer=bpe"]),
])  # fmt: skip
def test_a_home_that_is_not_known_is_refused_wherever_it_is_given(
    capsys, monkeypatch, tmp_path, name, args
):
    monkeypatch.chdir(tmp_path)
    assert f"{name}={NOWHERE}: ~nobody-here is no home" in sentence(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_paths_of_data_and_files_of_such_a_name(homeless, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(UserError, match="TFDS_DATA_DIR=~/tensorflow_datasets"):
        manual_dir("")
    monkeypatch.chdir(homeless)
    (homeless / "~notes.txt").write_text("")
    assert runtime_env.expanded("~notes.txt", "config.data.path") == "~notes.txt"


def test_a_workdir_that_is_not_text_or_has_no_place_is_refused(capsys, monkeypatch, tmp_path):
    assert "holds bytes that are not UTF-8" in sentence(
        capsys, "train", f"--config={TINY}", f"--workdir={tmp_path}/\udcff"
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the current directory is gone" in sentence(
        capsys, "train", f"--config={TINY}", "--workdir=run"
    )


# --- streams --------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)], ids=str)
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, closed):
    def close():
        for number in closed:
            os.close(number)

    code = SETTLED + (
        "file = open(sys.argv[1], 'w'); os.write(2, b'from C++')\n"
        "print('out'); print('err', file=sys.stderr)\n"
        "import subprocess; subprocess.run(['sh', '-c', 'echo child; echo child >&2'])\n"
        "file.write(f'{file.fileno() > 2} {sys.stdin is None}')"
    )
    assert python(code, str(tmp_path / "file"), preexec_fn=close)[0] == 0
    assert (tmp_path / "file").read_text() == f"True {0 in closed}"


def test_a_chat_without_an_input_is_refused(monkeypatch):
    options = cli._parser().parse_args(["generate", "--workdir=x", "--chat"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="--chat: standard input is closed"):
        command.run_generate(options, Config())
    with (
        open(os.devnull, "w") as unreadable,
        pytest.raises(UserError, match="--chat: standard input cannot be read"),
    ):
        command.chat(None, [], unreadable)


@pytest.mark.parametrize("where", ["full", "gone"])
def test_results_that_nobody_takes_are_one_sentence(where):
    if where == "full":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    code, _, err = python("from uoe_jax.cli import console; console()", "--help", stdout=out)
    os.close(out)
    assert (
        code == 1
        and err.startswith(b"uoe: standard output: cannot be written (")
        and err.count(b"\n") == 1
    ), err


def test_progress_that_nobody_takes_ends_nothing():
    code = (
        SETTLED
        + "[print('x' * 5000, file=sys.stderr, flush=True) for _ in range(9)]; "
        + "runtime_env.print_result('done'); print('more')"
    )
    with open("/dev/full", "wb") as full:
        assert python(code, stderr=full) == (0, b"done\nmore\n", b"")
        assert (
            python(SETTLED + "runtime_env.print_result('done')", stdout=full, stderr=full)[0] == 0
        )


@pytest.mark.parametrize("env,shown", [
    ({"PYTHONIOENCODING": "ascii"}, rb"\xe9\u2026" + b"\xff"),
    ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, rb"\xe9\u2026" + b"\xff"),
    ({"PYTHONIOENCODING": "latin-1"}, b"\xe9" + rb"\u2026" + b"\xff"),
    ({"PYTHONIOENCODING": "utf-8:strict"}, "é…".encode() + b"\xff"),
])  # fmt: skip
def test_text_that_a_stream_cannot_show_is_escaped_with_one_notice(env, shown):
    code, out, err = python(
        SETTLED + r"[print('\u00e9\u2026\udcff') for _ in range(2)]", env=environment(**env)
    )
    assert code == 0 and out == 2 * (shown + b"\n")
    assert err.count(b"\n") == (rb"\u" in shown) and (
        not err or b"set PYTHONIOENCODING=utf-8" in err
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_lines_are_exact_on_every_stream(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    command._write(None, [Completion("é…\U0001f600", "\ufffd", 1, "limit")])
    found = json.loads(stream.buffer.getvalue())
    assert (found["prompt"], found["text"]) == ("é…\U0001f600", "\ufffd")


@pytest.mark.parametrize("chosen", [{}, {"TQDM_MININTERVAL": "x", "TQDM_NCOLS": "9"}])
def test_variables_of_the_progress_bar(chosen):
    code = (
        SETTLED
        + "runtime_env.check_variables('0.12.0'); import tqdm; "
        + "print([n for n in os.environ if n.startswith('TQDM')])"
    )
    code, out, err = python(code, env=environment(XLA_FLAGS="", **chosen))
    assert (code, out) == (0, b"[]\n") and err.count(b"\n") == bool(chosen)
    assert all(f"{name}={value}".encode() in err for name, value in chosen.items())


@pytest.mark.slow
def test_a_run_and_its_results_with_streams_closed_or_full(source, tmp_path):
    args = ["train", f"--config={TINY}", f"--config.data.path={source}", "--config.train.steps=2"]
    for i, end in enumerate(("<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | head -c 1")):
        run = tmp_path / str(i)
        command = (
            f"set -o pipefail; {sys.executable} -m uoe_jax {' '.join(args)} --workdir={run} {end}"
        )
        assert (
            subprocess.run(["bash", "-c", command], env=environment(), timeout=300).returncode == 0
        )
        assert [line["step"] for line in metric_lines(run) if "train/loss" in line] == [1, 2]
        assert set(json.loads((run / ".lock").read_text())) == {"host", "pid", "since"}

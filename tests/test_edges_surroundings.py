"""Surroundings that do not work (streams, home, terminal, names, variables): a sentence, or a default that is told once."""

from __future__ import annotations

import io
import json
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile

import pytest
from helpers import QUICK_CODE, TINY, environment, finish, metric_lines, uoe, uoe_together, write_source

from uoe_jax import cli, processes, surroundings
from uoe_jax.data.prepared import manual_dir
from uoe_jax.errors import UserError
from uoe_jax.infer import command
from uoe_jax.infer.sample import Completion
from uoe_jax.surroundings import default_cache_dir

SETTLED = "import os, sys; from uoe_jax import surroundings; surroundings.settle(); "


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


# --- home -------------------------------------------------------------------------------------------------------


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
    assert found == homeless / f"uoe_jax-{os.getuid()}" and stat.S_IMODE(found.stat().st_mode) == 0o700
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


@pytest.mark.parametrize("given", ["/etc/passwd", "~/x", "~nobody-here/x", "/proc/x", "/tmp/\udcff"])
def test_a_given_cache_that_cannot_be_used_is_refused(homeless, monkeypatch, given):
    monkeypatch.setenv("UOE_CACHE", given)
    with pytest.raises(UserError, match="^UOE_CACHE="):
        default_cache_dir()


def test_the_cache_is_an_absolute_path(homeless, monkeypatch):
    monkeypatch.chdir(homeless)
    monkeypatch.setenv("UOE_CACHE", "below")
    assert default_cache_dir() == homeless / "below"


def test_libraries_find_a_home_to_fail_in(tmp_path):
    """One of a user without a home is such that nothing can be made in it; an empty HOME is none."""
    code = "import os, pwd\ndef none(*_): raise KeyError\npwd.getpwuid = none\n"
    env = {k: v for k, v in environment().items() if k != "HOME"}
    for more in ({}, {"HOME": ""}):
        found = python(code + SETTLED + "from pathlib import Path; print(Path.home())", env=env | more)
        assert found == (0, b"/dev/null\n", b"")


NOWHERE = "~nobody-here/x"


@pytest.mark.parametrize("name,args", [
    ("--workdir", ["eval", f"--workdir={NOWHERE}"]),
    ("--workdir", ["train", f"--config={TINY}", f"--workdir={NOWHERE}"]),
    ("--workdir", ["report", f"--workdir={NOWHERE}"]),
    ("--out", ["tokenizer", "train", f"--config={TINY}", "--vocab=300", f"--out={NOWHERE}"]),
    ("--from", ["import", f"--from={NOWHERE}", "--experts=2", "--k=1", "--workdir=never"]),
    ("config.data.tokenizer_file", ["train", f"--config={TINY}", "--workdir=never", "--config.data.tokenizer=bpe",
                                    f"--config.data.tokenizer_file={NOWHERE}"]),
])  # fmt: skip
def test_a_home_that_is_not_known_is_refused_wherever_it_is_given(capsys, monkeypatch, tmp_path, name, args):
    monkeypatch.chdir(tmp_path)
    assert f"{name}={NOWHERE}: ~nobody-here is no home" in sentence(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_paths_of_data_and_files_of_such_a_name(homeless, monkeypatch):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(UserError, match="TFDS_DATA_DIR=~/tensorflow_datasets"):
        manual_dir("")
    monkeypatch.chdir(homeless)
    (homeless / "~notes.txt").write_text("")
    assert surroundings.expanded("~notes.txt", "config.data.path") == "~notes.txt"


def test_a_workdir_that_is_not_text_or_has_no_place_is_refused(capsys, monkeypatch, tmp_path):
    assert "holds bytes that are not UTF-8" in sentence(capsys, "train", f"--config={TINY}", f"--workdir={tmp_path}/\udcff")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert "the current directory is gone" in sentence(capsys, "train", f"--config={TINY}", "--workdir=run")


# --- streams ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [(2,), (0, 1, 2)], ids=str)
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, closed):
    def close():
        for number in closed:
            os.close(number)

    code = SETTLED + (
        "file = open(sys.argv[1], 'w'); os.write(2, b'from C++'); print('out'); print('err', file=sys.stderr)\n"
        "import subprocess; subprocess.run(['sh', '-c', 'echo child; echo child >&2'])\n"  # children have them, too
        "file.write(f'{file.fileno() > 2} {sys.stdin is None}')"
    )
    assert python(code, str(tmp_path / "file"), preexec_fn=close)[0] == 0
    assert (tmp_path / "file").read_text() == f"True {0 in closed}"


def test_a_chat_without_an_input_is_refused(monkeypatch):
    options = cli._parser().parse_args(["generate", "--workdir=x", "--chat"])
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="--chat: standard input is closed"):
        command.run_generate(options, cli.Config())
    with open(os.devnull, "w") as unreadable, pytest.raises(UserError, match="--chat: standard input cannot be read"):
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
    assert code == 1 and err.startswith(b"uoe: standard output: cannot be written (") and err.count(b"\n") == 1, err


def test_progress_that_nobody_takes_ends_nothing():
    code = SETTLED + "[print('x' * 5000, file=sys.stderr, flush=True) for _ in range(9)]; surroundings.tell('done'); print('never')"
    with open("/dev/full", "wb") as full:
        assert python(code, stderr=full) == (0, b"done\nnever\n", b"")
        assert python(SETTLED + "surroundings.tell('done')", stdout=full, stderr=full)[0] == 0


@pytest.mark.parametrize("env,shown", [
    ({"PYTHONIOENCODING": "ascii"}, rb"\xe9\u2026" + b"\xff"),
    ({"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, rb"\xe9\u2026" + b"\xff"),
    ({"PYTHONIOENCODING": "latin-1"}, b"\xe9" + rb"\u2026" + b"\xff"),
    ({"PYTHONIOENCODING": "utf-8:strict"}, "é…".encode() + b"\xff"),
])  # fmt: skip
def test_text_that_a_stream_cannot_show_is_escaped_and_told_once(env, shown):
    code, out, err = python(SETTLED + r"[print('\u00e9\u2026\udcff') for _ in range(2)]", env=environment(**env))
    assert code == 0 and out == 2 * (shown + b"\n")
    assert err.count(b"\n") == (rb"\u" in shown) and (not err or b"set PYTHONIOENCODING=utf-8" in err)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_lines_are_exact_on_every_stream(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    command._write(None, [Completion("é…\U0001f600", "\ufffd", 1, "limit")])
    found = json.loads(stream.buffer.getvalue())
    assert (found["prompt"], found["text"]) == ("é…\U0001f600", "\ufffd")


@pytest.mark.parametrize("chosen", [{}, {"TQDM_MININTERVAL": "x", "TQDM_NCOLS": "9"}])
def test_variables_of_the_progress_bar(chosen):
    code = SETTLED + "surroundings.check_variables('0.12.0'); import tqdm; print([n for n in os.environ if n.startswith('TQDM')])"
    code, out, err = python(code, env=environment(XLA_FLAGS="", **chosen))
    assert (code, out) == (0, b"[]\n") and err.count(b"\n") == bool(chosen)
    assert all(f"{name}={value}".encode() in err for name, value in chosen.items())


# --- variables of XLA and JAX -----------------------------------------------------------------------------------


def test_flags_that_xla_does_not_know_are_refused(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_nonsense=1")
    with pytest.raises(UserError, match="^XLA_FLAGS=.*Unknown flag in XLA_FLAGS: --xla_nonsense=1.; correct it, or unset it"):
        surroundings.check_variables("0.12.0")


@pytest.mark.parametrize("flags", [
    "--xla_force_host_platform_device_count=abc", "--xla_force_host_platform_device_count=0",
    "--xla_force_host_platform_device_count", "--xla_backend_optimization_level=x", "--xla_cpu_use_fusion_emitters=true",
    "--xla_gpu_deterministic_ops=yes", "-xla",
])  # fmt: skip
def test_flags_that_are_not_known_to_work_are_tried_in_another_process(monkeypatch, flags):
    def ended(command, env, **_):
        assert env["JAX_PLATFORMS"] == "cpu" and env["XLA_FLAGS"] == flags and "JAX_NUM_CPU_DEVICES" not in env
        return subprocess.CompletedProcess(command, -6, b"", b"E1129 12:00:00.1  1 a.cc:63] Couldn't interpret it\nusage: many lines\n")

    monkeypatch.setattr(subprocess, "run", ended)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    with pytest.raises(UserError, match="^XLA_FLAGS=.*does not take this .Couldn't interpret it.; correct it"):
        surroundings.check_variables("0.12.0")


@pytest.mark.parametrize("flags", ["", "  ", QUICK_CODE, "--xla_force_host_platform_device_count=8 --xla_gpu_deterministic_ops=true"])
def test_flags_that_are_known_cost_nothing(monkeypatch, flags):
    import jax

    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setenv("XLA_FLAGS", flags)
    surroundings.check_variables(jax.lib.__version__)
    assert os.environ.get("XLA_FLAGS", "").strip() == flags.strip()


def test_a_file_of_flags_is_read_and_can_be_added_to(monkeypatch, tmp_path):
    file = tmp_path / "flags"
    file.write_text("\n--xla_force_host_platform_device_count=3\n--xla_backend_optimization_level=0\n")
    monkeypatch.setenv("XLA_FLAGS", str(file))
    surroundings.check_variables("0.12.0")
    assert os.environ["XLA_FLAGS"].split() == file.read_text().split()
    file.write_text("xla_nonsense")
    for name, said in ((file, "begin with a flag"), (tmp_path, "Is a directory"), ("xla_x=1", "No such file or directory")):
        monkeypatch.setenv("XLA_FLAGS", str(name))
        with pytest.raises(UserError, match=f"^XLA_FLAGS={name}: .*{said}"):
            surroundings.check_variables("0.12.0")


def refused(env, *args) -> str:
    """The one line with which `uoe ARGS` ends with 2."""
    code, out, err = uoe(*args, env=environment(**env))
    said = [line for line in err.splitlines() if line.startswith("uoe: ")]
    assert code == 2 and len(said) == 1 and "Traceback" not in err and not out, (code, err)
    return said[0]


def test_a_variable_that_jax_does_not_take_is_named():
    args = ("plan", f"--config={TINY}", "--devices=1")
    assert "uoe: JAX_NUM_CPU_DEVICES=abc: jax cannot be imported with this (" in refused({"JAX_NUM_CPU_DEVICES": "abc"}, *args)


@pytest.mark.parametrize("name,error", [("JAX_PLATFORMS", AssertionError()), ("", RuntimeError("Unable\nto"))])
def test_no_device_is_a_sentence(monkeypatch, name, error):
    for given in [n for n in os.environ if surroundings._OF_DEVICES.match(n)]:
        monkeypatch.delenv(given)
    if name:
        monkeypatch.setenv(name, "cuda")
    said = str(surroundings.no_device(error))
    assert "\n" not in said and said.startswith("JAX_PLATFORMS=cuda: " if name else "JAX_PLATFORMS: ")


def test_a_platform_that_is_not_there_leaves_no_workdir(source, tmp_path):
    args = ("train", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", f"--config.data.path={source}")
    assert refused({"JAX_PLATFORMS": "nonsense"}, *args).startswith("uoe: JAX_PLATFORMS=nonsense: jax finds no device to run on (")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"XLA_FLAGS": "--xla_nonsense=1"}, {"JAX_PLATFORMS": "cuda"}, {"JAX_NUM_CPU_DEVICES": "0"}], ids=str)
def test_no_command_begins_with_such_variables(source, tmp_path, env):
    run, table = tmp_path / "run", tmp_path / "table"
    assert uoe("train", f"--config={TINY}", f"--workdir={run}", f"--config.data.path={source}", "--config.train.steps=1")[0] == 0
    before = sorted(os.listdir(run))
    for args in (
        ("train", f"--config={TINY}", f"--workdir={tmp_path / 'new'}", f"--config.data.path={source}"),
        ("compare", "--config=compare/lm_stdlib:tiny", f"--workdir={table}", f"--config.base.data.path={source}"),
        ("eval", f"--workdir={run}"),
        ("generate", f"--workdir={run}"),
        ("export", f"--workdir={run}", "--format=safetensors", f"--out={tmp_path / 'out'}"),
        ("report", f"--workdir={run}"),
    ):
        assert all(f"{name}={value}" in refused(env, *args) for name, value in env.items())
    assert sorted(os.listdir(tmp_path)) == ["run"] and sorted(os.listdir(run)) == before


@pytest.mark.slow
def test_a_run_and_its_results_with_streams_closed_or_full(source, tmp_path):
    args = ["train", f"--config={TINY}", f"--config.data.path={source}", "--config.train.steps=2"]
    for i, end in enumerate(("<&- >&- 2>&-", ">/dev/full 2>/dev/full", "2>&1 | head -c 1")):
        run = tmp_path / str(i)
        command = f"set -o pipefail; {sys.executable} -m uoe_jax {' '.join(args)} --workdir={run} {end}"
        assert subprocess.run(["bash", "-c", command], env=environment(), timeout=300).returncode == 0
        assert [line["step"] for line in metric_lines(run) if "train/loss" in line] == [1, 2]
        assert set(json.loads((run / ".lock").read_text())) == {"host", "pid", "since"}


# --- several processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host,me,code", [("no-such-host.invalid", 0, 2), ("bad..name", 1, 77)])
def test_a_coordinator_without_an_address_is_waited_for_and_told(monkeypatch, capfd, host, me, code):
    monkeypatch.setattr(processes, "_OWN_NAME_S", 0.02)
    monkeypatch.setattr(processes, "_NAME_S", 0.02)
    monkeypatch.setattr(processes.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=f"^UOE_COORDINATOR={host}:1234: {host} has no address here") as caught:
        processes._await_name(f"{host}:1234", me)
    assert caught.value.exit_code == code and capfd.readouterr().err.count("waiting for one") == 1
    processes._await_name("[::1]:1234", me)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host, here in (("127.0.0.1", True), ("node1", False)):
            with pytest.raises(UserError, match=f"^UOE_COORDINATOR={host}:{port}: process 0 cannot listen at port {port} .Address"):
                processes._check_port(f"{host}:{port}", here)
    processes._check_port(f"127.0.0.1:{port}", True)
    with pytest.raises(UserError, match="give host:port"):  # gRPC waits for ever for an address of IPv6 without brackets
        processes.told({"UOE_COORDINATOR": "::1:80", "UOE_PROCESSES": "1", "UOE_PROCESS_ID": "0"})


def test_gloo_needs_an_address_for_this_machine(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    said = str(surroundings.no_device(RuntimeError("[enforce fail at external/gloo/gloo/transport/tcp/device.cc:99] rv == 0. -2 vs 0")))
    assert "the name of this machine, no-such-host.invalid, has no address" in said and "/etc/hosts" in said


@pytest.mark.slow
def test_what_one_process_cannot_run_on_ends_all_with_2(source, tmp_path):
    args = ("train", f"--config={TINY}", f"--workdir={tmp_path / 'run'}", f"--config.data.path={source}")
    for bad in ({"JAX_PLATFORMS": "nonsense"}, {"XLA_FLAGS": "--xla_nonsense"}):
        ended = finish(uoe_together(2, 1, *args, each_env=[{}, bad]), timeout=60)
        assert [code for code, _, _ in ended] == [2, 2] and not (tmp_path / "run").exists(), ended


# --- no half-made workdir ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    ("--config.mesh.fsdp=3", "--config.train.batch_size=9"), ("--config.train.init_from=/nowhere",), ("--config.data.path=/nowhere",),
])  # fmt: skip
def test_a_start_that_is_refused_leaves_no_workdir(capsys, source, tmp_path, more):
    run = tmp_path / "run"
    data = [] if "data.path" in more[0] else [f"--config.data.path={source}"]
    assert sentence(capsys, "train", f"--config={TINY}", f"--workdir={run}", *data, *more).count(more[0].partition("=")[2])
    assert not run.exists()

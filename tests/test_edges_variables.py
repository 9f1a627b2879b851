"""Variables of XLA and JAX and names of machines that do not work are refused in a sentence."""

from __future__ import annotations

import os
import socket
import subprocess

import pytest
from helpers import QUICK_CODE, TINY, environment, finish, uoe, uoe_together, write_source

from uoe_jax import cli, runtime_env
from uoe_jax.distributed import coordination
from uoe_jax.errors import UserError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files")


def sentence(capsys, *args) -> str:
    assert cli.main(list(args)) == 2
    err = capsys.readouterr().err
    assert err.startswith("uoe: ") and err.count("\n") == 1, err
    return err


# --- variables of XLA and JAX ---------------------------------------------------------------------


def test_flags_that_xla_does_not_know_are_refused(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_nonsense=1")
    with pytest.raises(
        UserError,
        match="^XLA_FLAGS=.*Unknown flag in XLA_FLAGS: --xla_nonsense=1.; correct it, or unset it",
    ):
        runtime_env.check_variables("0.12.0")


@pytest.mark.parametrize("flags", [
    "--xla_force_host_platform_device_count=abc", "--xla_force_host_platform_device_count=0",
    "--xla_force_host_platform_device_count", "--xla_backend_optimization_level=x",
    "--xla_cpu_use_fusion_emitters=true",
    "--xla_gpu_deterministic_ops=yes", "-xla",
])  # fmt: skip
def test_flags_that_are_not_known_to_work_are_tried_in_another_process(monkeypatch, flags):
    def ended(command, env, **_):
        assert (
            env["JAX_PLATFORMS"] == "cpu"
            and env["XLA_FLAGS"] == flags
            and "JAX_NUM_CPU_DEVICES" not in env
        )
        return subprocess.CompletedProcess(
            command,
            -6,
            b"",
            b"E1129 12:00:00.1  1 a.cc:63] Couldn't interpret it\nusage: many lines\n",
        )

    monkeypatch.setattr(subprocess, "run", ended)
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    with pytest.raises(
        UserError, match="^XLA_FLAGS=.*does not take this .Couldn't interpret it.; correct it"
    ):
        runtime_env.check_variables("0.12.0")


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "  ",
        QUICK_CODE,
        "--xla_force_host_platform_device_count=8 --xla_gpu_deterministic_ops=true",
    ],
)
def test_flags_that_are_known_cost_nothing(monkeypatch, flags):
    import jax

    monkeypatch.setattr(subprocess, "run", None)
    monkeypatch.setenv("XLA_FLAGS", flags)
    runtime_env.check_variables(jax.lib.__version__)
    assert os.environ.get("XLA_FLAGS", "").strip() == flags.strip()


def test_a_file_of_flags_is_read_and_can_be_added_to(monkeypatch, tmp_path):
    file = tmp_path / "flags"
    file.write_text(
        "\n--xla_force_host_platform_device_count=3\n--xla_backend_optimization_level=0\n"
    )
    monkeypatch.setenv("XLA_FLAGS", str(file))
    runtime_env.check_variables("0.12.0")
    assert os.environ["XLA_FLAGS"].split() == file.read_text().split()
    file.write_text("xla_nonsense")
    for name, said in (
        (file, "begin with a flag"),
        (tmp_path, "Is a directory"),
        ("xla_x=1", "No such file or directory"),
    ):
        monkeypatch.setenv("XLA_FLAGS", str(name))
        with pytest.raises(UserError, match=f"^XLA_FLAGS={name}: .*{said}"):
            runtime_env.check_variables("0.12.0")


def refused(env, *args) -> str:
    """The one line with which `uoe ARGS` ends with 2."""
    code, out, err = uoe(*args, env=environment(**env))
    said = [line for line in err.splitlines() if line.startswith("uoe: ")]
    assert code == 2 and len(said) == 1 and "Traceback" not in err and not out, (code, err)
    return said[0]


def test_a_variable_that_jax_does_not_take_is_named():
    args = ("plan", f"--config={TINY}", "--devices=1")
    assert "uoe: JAX_NUM_CPU_DEVICES=abc: jax cannot be imported with this (" in refused(
        {"JAX_NUM_CPU_DEVICES": "abc"}, *args
    )


@pytest.mark.parametrize(
    "name,error", [("JAX_PLATFORMS", AssertionError()), ("", RuntimeError("Unable\nto"))]
)
def test_no_device_is_a_sentence(monkeypatch, name, error):
    for given in [n for n in os.environ if runtime_env._DEVICE_VARIABLES.match(n)]:
        monkeypatch.delenv(given)
    if name:
        monkeypatch.setenv(name, "cuda")
    said = str(runtime_env.no_device(error))
    assert "\n" not in said and said.startswith(
        "JAX_PLATFORMS=cuda: " if name else "JAX_PLATFORMS: "
    )


def test_a_platform_that_is_not_there_leaves_no_workdir(source, tmp_path):
    args = (
        "train",
        f"--config={TINY}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={source}",
    )
    assert refused({"JAX_PLATFORMS": "nonsense"}, *args).startswith(
        "uoe: JAX_PLATFORMS=nonsense: jax finds no device to run on ("
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "env", [{"XLA_FLAGS": "--xla_nonsense=1"}, {"JAX_PLATFORMS": "cuda"}], ids=str
)
def test_no_command_begins_with_such_variables(source, tmp_path, env):
    run, table = tmp_path / "run", tmp_path / "table"
    assert (
        uoe(
            "train",
            f"--config={TINY}",
            f"--workdir={run}",
            f"--config.data.path={source}",
            "--config.train.steps=1",
        )[0]
        == 0
    )
    before = sorted(os.listdir(run))
    for args in (
        (
            "train",
            f"--config={TINY}",
            f"--workdir={tmp_path / 'new'}",
            f"--config.data.path={source}",
        ),
        (
            "compare",
            "--config=compare/lm_stdlib:tiny",
            f"--workdir={table}",
            f"--config.base.data.path={source}",
        ),
        ("eval", f"--workdir={run}"),
        ("generate", f"--workdir={run}"),
        ("export", f"--workdir={run}", "--format=safetensors", f"--out={tmp_path / 'out'}"),
        ("report", f"--workdir={run}"),
    ):
        assert all(f"{name}={value}" in refused(env, *args) for name, value in env.items())
    assert sorted(os.listdir(tmp_path)) == ["run"] and sorted(os.listdir(run)) == before


# --- several processes ----------------------------------------------------------------------------


def no_name(*_):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize("host,me,code", [("no-such-host.invalid", 0, 2), ("bad..name", 1, 77)])
def test_a_coordinator_without_an_address_is_waited_for_and_reported(
    monkeypatch, capfd, host, me, code
):
    monkeypatch.setattr(coordination, "_OWN_NAME_S", 0.02)
    monkeypatch.setattr(coordination, "_NAME_S", 0.02)
    monkeypatch.setattr(coordination.time, "sleep", lambda _: None)
    if host != "bad..name":
        monkeypatch.setattr(socket, "getaddrinfo", no_name)
    with pytest.raises(
        UserError, match=f"^UOE_COORDINATOR={host}:1234: {host} has no address here"
    ) as caught:
        coordination._await_name(f"{host}:1234", me)
    assert caught.value.exit_code == code and capfd.readouterr().err.count("waiting for one") == 1
    monkeypatch.undo()
    coordination._await_name("[::1]:1234", me)


def test_a_port_that_is_taken_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host, here in (("127.0.0.1", True), ("node1", False)):
            with pytest.raises(
                UserError,
                match=f"^UOE_COORDINATOR={host}:{port}: process 0 cannot listen at port {port} ",
            ):
                coordination._check_port(f"{host}:{port}", here)
    coordination._check_port(f"127.0.0.1:{port}", True)
    with pytest.raises(
        UserError, match="give host:port"
    ):  # gRPC waits for ever for an address of IPv6 without brackets
        coordination.cluster_from_env(
            {"UOE_COORDINATOR": "::1:80", "UOE_PROCESSES": "1", "UOE_PROCESS_ID": "0"}
        )


def test_gloo_needs_an_address_for_this_machine(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    said = str(
        runtime_env.no_device(
            RuntimeError(
                "[enforce fail at external/gloo/gloo/transport/tcp/device.cc:99] rv == 0. -2 vs 0"
            )
        )
    )
    assert (
        "the name of this machine, no-such-host.invalid, has no address" in said
        and "/etc/hosts" in said
    )


@pytest.mark.slow
def test_what_one_process_cannot_run_on_ends_all_with_2(source, tmp_path):
    args = (
        "train",
        f"--config={TINY}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={source}",
    )
    for bad in ({"JAX_PLATFORMS": "nonsense"}, {"XLA_FLAGS": "--xla_nonsense"}):
        ended = finish(uoe_together(2, 1, *args, each_env=[{}, bad]), timeout=60)
        assert [code for code, _, _ in ended] == [2, 2] and not (tmp_path / "run").exists(), ended


# --- no half-made workdir -------------------------------------------------------------------------


@pytest.mark.parametrize("more", [
    ("--config.mesh.fsdp=3", "--config.train.batch_size=9"), 
    ("--config.train.init_from=/nowhere",), ("--config.data.path=/nowhere",),
])  # fmt: skip
def test_a_start_that_is_refused_leaves_no_workdir(capsys, source, tmp_path, more):
    run = tmp_path / "run"
    data = [] if "data.path" in more[0] else [f"--config.data.path={source}"]
    assert sentence(capsys, "train", f"--config={TINY}", f"--workdir={run}", *data, *more).count(
        more[0].partition("=")[2]
    )
    assert not run.exists()

"""Bad input gets one sentence with the key, the value and the remedy, and exit code 2, before jax is imported."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import time

import pytest
from helpers import ROOT, TINY, environment, sentence, uoe, write_source

from uoe_jax import cli, config
from uoe_jax.config import Config, ModelConfig, RoutingConfig
from uoe_jax.config.hints import ALIASES
from uoe_jax.errors import UserError


def train(*args):
    return ("train", f"--config={TINY}", "--workdir=/nonexistent/never", *args)


BAD = [
    ("model.n_heads", "5", "must divide d_model=32"),
    ("model.n_layers", "0", "at least 1"),
    ("model.dtype", "float8", "choose one of"),
    ("model.smha.k", "5", "n_experts=4"),
    ("model.smha.n_experts", "3", "n_heads=4"),
    ("model.smha.n_experts", "8", "1, 2, 4"),
    ("model.uome.n_experts", "48", "d_hidden=64"),
    ("model.uome.capacity_factor", "0", "more than 0"),
    ("model.uome.capacity_factor", "nan", "finite"),
    ("model.uome.capacity_window", "0", "at least 1"),
    ("model.uome.priority", "score", "causal"),
    ("model.uome.patch_size", "24", "context_length"),
    ("model.n_kv_heads", "3", "must divide n_heads=4"),
    ("train.steps", "1e3", "whole number"),
    ("train.steps", "-4", "at least 1"),
    ("train.accumulation", "3", "batch_size=8"),
    ("train.seed", "99999999999", "at most"),
    ("optimizer.learning_rate", "fast", "a number"),
    ("optimizer.learning_rate", "inf", "finite"),
    ("optimizer.b1", "1.5", "at most"),
    ("mesh.sequence_parallel", "maybe", "true or false"),
    ("mesh.expert", "3", "must divide model.smha.n_experts=4: 1, 2, 4"),
    ("mesh.data", "5", "must divide train.batch_size / train.accumulation=8: 1, 2, 4, 8"),
    ("mesh.data", "0", "positive size"),
    ("mesh.fsdp", "-1", "mesh.data"),
    ("data.source", "pile", "choose one of"),
    ("generate.top_p", "0", "more than 0"),
]


def test_values_out_of_range(capsys):
    for key, value, remedy in BAD:
        err = sentence(capsys, *train(f"--config.{key}={value}"))
        assert f"config.{key}" in err and value.lstrip("-") in err and remedy in err, err


# (what was given, the key that it means): typos, and names from other trainers
UNKNOWN = [
    ("train.stepz", "train.steps"),
    ("train.seeds", "train.seed"),
    ("steps", "train.steps"),
    ("model.steps", "train.steps"),
    ("model.d_modle", "model.d_model"),
    ("data.seed", "data.listops.seed"),
    ("model.uome.experts", "model.uome.n_experts"),
    ("model.mlp.n_experts", "model.uome.n_experts"),
    ("model.attention.num_experts", "model.smha.n_experts"),
    ("model.moe.num_experts", "model.moe.n_experts"),
    ("n_experts", "model.uome.n_experts"),
    ("model.top_k", "model.uome.k"),
    ("model.smha.top_k", "model.smha.k"),
    ("top_k", "generate.top_k"),
    ("model.capacity", "model.uome.capacity_factor"),
    ("train.lr", "optimizer.learning_rate"),
    ("lr", "optimizer.learning_rate"),
    ("LR", "optimizer.learning_rate"),
    ("optimizer.wd", "optimizer.weight_decay"),
    ("optimizer.beta1", "optimizer.b1"),
    ("optimizer.grad_clip", "optimizer.clip_norm"),
    ("bs", "train.batch_size"),
    ("train.batch", "train.batch_size"),
    ("train.grad_accum", "train.accumulation"),
    ("optimizer.gradient_accumulation_steps", "train.accumulation"),
    ("train.max_steps", "train.steps"),
    ("data.seq_len", "model.context_length"),
    ("max_seq_len", "model.context_length"),
    ("model.block_size", "model.context_length"),
    ("model.num_layers", "model.n_layers"),
    ("model.hidden_size", "model.d_model"),
    ("model.intermediate_size", "model.d_hidden"),
    ("model.num_attention_heads", "model.n_heads"),
    ("model.precision", "model.dtype"),
    ("mesh.tp", "mesh.expert"),
    ("checkpoint.save_every", "checkpoint.every"),
    ("data.dataset", "data.source"),
]


def test_unknown_keys_name_the_one_that_is_meant(capsys):
    for given, meant in UNKNOWN:
        err = sentence(capsys, *train(f"--config.{given}=3"))
        assert f"config.{given}: unknown key; the nearest known key is config.{meant}\n" in err, err


def test_aliases_are_of_keys_that_exist_and_are_none_themselves():
    names = [alias for aliases in ALIASES.values() for alias in aliases.split()]
    assert len(names) == len(set(names))
    for key, aliases in ALIASES.items():
        assert key in config.ALL_KEYS or key.replace("*", "uome") in config.ALL_KEYS
        for alias in aliases.split():
            assert f"{key.rpartition('.')[0]}.{alias}" not in config.ALL_KEYS, alias


def test_the_optimizer_is_not_a_choice(capsys):
    for name in ("optimizer.name", "optimizer.type", "train.optimizer", "optimizer"):
        err = sentence(capsys, *train(f"--config.{name}=muon"))
        assert f"config.{name}: " in err and "optimizer.*: AdamW only" in err
        assert "learning_rate, warmup_steps" in err


def test_a_section_is_not_a_key(capsys):
    err = sentence(capsys, *train("--config.train=3"))
    assert "config.train: this is a section" in err and "config.train.steps" in err


def test_gate_normalized_needs_two_experts(capsys):
    err = sentence(capsys, *train("--config.model.uome.gate=normalized", "--config.model.uome.k=1"))
    assert "would not learn" in err


def test_bad_config_files(capsys, tmp_path):
    path = tmp_path / "c.py"
    for text, complaint in (
        (None, "no such file"),
        ("def get_config(:", "SyntaxError"),
        ("x = 1", "get_config"),
        ("def get_config(): return 3", "to_dict"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("def get_config():\n    raise KeyError('boom')", "line 2"),
    ):
        if text is not None:
            path.write_text(text)
        err = sentence(capsys, "train", f"--config={path}", "--workdir=/nonexistent/never")
        assert str(path) in err and complaint in err


def test_typo_inside_a_config_file(capsys, tmp_path):
    path = tmp_path / "c.py"
    path.write_text(
        "from uoe_jax import config\ndef get_config():\n    c = config.base()\n    c.model.d_modle = 3\n    return c"
    )
    err = sentence(capsys, "train", f"--config={path}", "--workdir=/nonexistent/never")
    assert "config.model.d_modle" in err and "config.model.d_model" in err


def test_command_line_mistakes(capsys):
    for args in (
        ("trian",),
        (),
        ("train", "--config=quickstart"),
        train("--stepz=3"),
        train("--config.train.steps"),
    ):
        sentence(capsys, *args)


def test_errors_and_config_come_fast_and_without_jax():
    """A wrong key is refused, and keys are listed, within a second of start-up, jax unimported."""
    code = "import sys; from uoe_jax.cli import main; c = main(sys.argv[1:]); sys.exit(99 if 'jax' in sys.modules else c)"
    plan = ("plan", "--config=quickstart", "--mesh=rows=2")
    for args, expected in (
        (train("--config.model.uome.k=99"), 2),
        (("config", "train"), 0),
        (plan, 2),
    ):
        start = time.monotonic()
        command = [sys.executable, "-c", code, *args]
        done = subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, timeout=60)
        assert done.returncode == expected
        assert time.monotonic() - start < 5  # a second of work; the margin is for a busy machine


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path / "source")


def test_the_configuration_of_a_run_is_a_config_file(tmp_path):
    first = cli.load_config(TINY, {"train.seed": "3"})
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(first)))
    assert cli.load_config(str(tmp_path / "config.json"), {}) == first
    assert cli.load_config(str(tmp_path / "config.json"), {"train.seed": "4"}).train.seed == 4
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be used"):
        cli.load_config(str(tmp_path / "config.json"), {})


def test_workdirs_that_cannot_be_used(capsys, tmp_path, source, monkeypatch):
    """A file, a directory of other things, another run, a place nobody can write."""
    data = f"--config.data.path={source}"
    (tmp_path / "file").write_text("")
    assert "is a file" in sentence(
        capsys, "train", f"--config={TINY}", f"--workdir={tmp_path / 'file'}", data
    )
    assert "other files" in sentence(
        capsys, "train", f"--config={TINY}", f"--workdir={source}", data
    )
    under = tmp_path / "file" / "run"
    assert "cannot be written" in sentence(
        capsys, "train", f"--config={TINY}", f"--workdir={under}", data
    )
    other = tmp_path / "other"
    other.mkdir()
    values = config.to_dict(cli.load_config(TINY, {"optimizer.learning_rate": "0.5"}))
    values["model"]["vocab_size"] = 257
    (other / "config.json").write_text(json.dumps(values))
    err = sentence(capsys, "train", f"--config={TINY}", f"--workdir={other}", data)
    assert "config.optimizer.learning_rate" in err and "0.5" in err and "0.01" in err
    (other / "config.json").write_text("{")
    assert "config.json" in sentence(
        capsys, "train", f"--config={TINY}", f"--workdir={other}", data
    )
    assert "no run there" in sentence(capsys, "eval", f"--workdir={tmp_path}")
    assert "no run there" in sentence(capsys, "generate", f"--workdir={tmp_path / 'nowhere'}")


@pytest.mark.slow
def test_a_full_disk_while_saving_is_one_sentence(tmp_path, source):
    """A file size limit stands in for a full disk: it needs no rights. The run stops with code 1 and says what to do."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    # No compilation cache: its files would meet the limit too.
    env = environment(JAX_ENABLE_COMPILATION_CACHE="false")
    assert (
        uoe(
            "train",
            f"--config={TINY}",
            f"--workdir={tmp_path / 'warm'}",
            f"--config.data.path={source}",
            "--config.train.steps=1",
        )[0]
        == 0
    )  # the data are prepared before the limit holds
    code, _, err = uoe(
        "train",
        f"--config={TINY}",
        f"--workdir={tmp_path / 'run'}",
        f"--config.data.path={source}",
        preexec_fn=limit,
        env=env,
    )
    assert code == 1, err
    last = [line for line in err.splitlines() if line.startswith("uoe: ")]
    assert len(last) == 1 and "checkpoint" in last[0] and "run the same command again" in last[0], (
        err
    )
    assert "Traceback" not in err


def test_resume_refuses_what_would_change_the_run():
    old = Config()
    new = config.from_dict({"train": {"log_every": 3, "steps": 7}, "checkpoint": {"every": 9}})
    assert [name for name, _, _ in config.changed_keys(old, new)] == ["train.steps"]
    settled = {"optimizer": {"decay_steps": 500}}
    longer = config.from_dict({**settled, "train": {"steps": 2000}})
    assert not config.changed_keys(
        config.from_dict(settled), longer
    )  # the schedule is fixed, so the end may move


def test_config_round_trip_and_defaults():
    assert config.from_dict(json.loads(json.dumps(config.to_dict(Config())))) == Config()
    assert cli.load_config("quickstart", {"train.steps": "1_0"}).train.steps == 10
    for key, _, meta in config.leaves(Config()):
        assert meta["doc"], key


def test_capacity_is_exact():
    """0.7 * 10 is 7.000000000000001 in floats nowhere near the decimal: the capacity follows the decimal."""
    r = RoutingConfig(capacity_factor=1.1, k=1, n_experts=1, capacity_window=10_000)
    assert r.window_capacity(1000) == 1000
    r = RoutingConfig(capacity_factor=0.7, k=1, n_experts=1)
    assert r.window_capacity(10) == 7
    with pytest.raises(UserError):
        config.check_model(ModelConfig(smha=RoutingConfig(n_experts=3)))


def test_the_configuration_imports_nothing_above_it_and_in_no_circle():
    room = ROOT / "uoe_jax" / "config"
    imports = {}
    for file in room.glob("[!_]*.py"):
        nodes = [n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.ImportFrom)]
        own = {n.module for n in nodes if (n.module or "").startswith("uoe_jax")}
        imports[f"uoe_jax.config.{file.stem}"] = own - {"uoe_jax.errors"}
    while imports:
        ready = [name for name, needed in imports.items() if not needed & imports.keys()]
        assert ready, f"a circle, or an import from another room: {imports}"
        for name in ready:
            outside = [m for m in imports.pop(name) if not m.startswith("uoe_jax.config.")]
            assert not outside, (name, outside)


# --- uoe config ---


def listed(capsys, *args):
    """What `uoe config ARGS` prints."""
    assert cli.main(["config", *args]) == 0
    return capsys.readouterr().out


def test_config_lists_every_key_with_value_default_range_and_meaning(capsys):
    lines = listed(capsys).splitlines()
    assert max(map(len, lines)) <= 100
    names = [
        line[2:].split(" = ")[0] for line in lines if line[:2] in ("  ", "* ") and line[2] != " "
    ]
    assert sorted(names) == sorted(config.ALL_KEYS)
    at = lines.index("  optimizer.schedule = cosine")
    assert lines[at + 1].endswith("One of cosine, linear; default cosine.")
    assert [line for line in lines if line.startswith("[optimizer] AdamW")]


def test_config_shows_what_a_config_and_overrides_change(capsys):
    text = listed(capsys, f"--config={TINY}", "--changed", "--config.train.steps", "7", "train.")
    assert "* train.steps = 7\n" in text and "default 1000" in text and "train.seed" not in text
    assert "default" in listed(capsys, "--changed")  # nothing is changed, and it says so
    assert "model.d_modle" in sentence(capsys, "config", "--config.model.d_modle=3")
    assert "must divide" in sentence(capsys, "config", "--config.model.n_heads=7")


def test_config_selects_by_part_or_glob(capsys):
    for pattern, names in (
        ("optimizer.b", ["optimizer.b1", "optimizer.b2"]),
        (
            "model.*.n_experts",
            ["model.smha.n_experts", "model.uome.n_experts", "model.moe.n_experts"],
        ),
        ("train.ste?s", ["train.steps"]),
    ):
        found = [json.loads(line) for line in listed(capsys, "--json", pattern).splitlines()]
        assert [key["key"] for key in found] == names
    assert found[0] | {"doc": ""} == {
        "key": "train.steps", "type": "int", "value": 1000, "default": 1000, "low": 1, "above": None,
        "high": 2**31 - 1, "choices": [], "free": False, "doc": "",
    }  # fmt: skip
    (source,) = [json.loads(line) for line in listed(capsys, "--json", "data.source").splitlines()]
    assert {"stdlib", "listops"} < set(source["choices"])
    assert "optimizer.learning_rate" in sentence(capsys, "config", "lr")
    assert "model.n_layers" in sentence(capsys, "config", "nlayers")


def test_the_page_of_all_keys_is_up_to_date(capsys):
    """`uoe config --markdown > docs/keys.md` writes it anew."""
    assert listed(capsys, "--markdown") == (ROOT / "docs" / "keys.md").read_text()
    assert "alone" in sentence(capsys, "config", "--markdown", "train")

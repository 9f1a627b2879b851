"""Names of directories are no patterns, and a save counts once what it wrote has been looked at."""

from __future__ import annotations

import json
import os
import re
import shutil
import types

import jax
import jax.numpy as jnp
import pytest
from exchange_runs import LLAMA, config_of, exported, run_of
from gcs_server import GcsServer
from helpers import TINY, slow, write_source
from orbax.checkpoint._src.serialization import ocdbt_utils

from uoe_jax import cli
from uoe_jax.data.sources import stdlib, text
from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.train import restore, saved
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.workdir import checkpoint_path, locate

# A pattern, and a name that it is taken for.
ODD = {
    "f[1]": "f1",
    "[!a]": "b",
    "s*": "sx",
    "q?": "qx",
    "b{a,c}": "ba",
    "at@2 é 日%20#|$x'\"\n": "at",
}
REFUSED = {  # and what the sentence names
    "back\\slash": "a backslash",
    "a\\[b": "a backslash",
    "logs:": "'gs:' at the end",
    "no\udcffutf": "bytes that are not UTF-8",
}


def some(names, quick: tuple[str, ...]) -> list:
    """All names, of which those that are not quick are left to the slow tests."""
    return [name if name in quick else slow(name) for name in names]


def state(value: float = 1.0) -> dict[str, jax.Array]:
    """Of every kind that a training state holds: an array, a typed key, a scalar, zeros, odd names."""
    w = jax.random.normal(jax.random.key(0), (100, 30)) + jnp.float32(value)
    return {
        "w": w,
        "key": jax.random.key(3),
        "step": jnp.int32(7),
        "a/b.c": {"..": jnp.zeros((4, 2))},
    }


def abstract() -> dict:
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state()
    )


def same(a, b) -> bool:
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x  # noqa: E731
    return jax.tree.all(jax.tree.map(lambda x, y: bool((plain(x) == plain(y)).all()), a, b))


def train_args(source, place, *more: str) -> list[str]:
    short = (
        "--config.train.steps=2",
        "--config.checkpoint.every=1",
        "--config.eval.every=0",
        "--config.eval.batches=1",
    )
    return [
        "train",
        f"--config={TINY}",
        f"--workdir={place}",
        f"--config.data.path={source}",
        *short,
        *more,
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files")


@pytest.fixture(scope="module")
def gcs():
    with GcsServer("bucket") as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


# --- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", some(ODD, ("f[1]", "s*", "b{a,c}")))
def test_a_checkpoint_below_any_name(name, tmp_path):
    """Written and read there; what lies below the name that the pattern would mean is not touched and not mixed in."""
    other = (
        tmp_path
        / ODD[name]
        / "run"
        / "checkpoints"
        / "2.orbax-checkpoint-tmp"
        / "state.orbax-checkpoint-tmp"
    )
    (other / "ocdbt.process_1").mkdir(parents=True)  # as a killed run leaves it
    with CheckpointStore(tmp_path / name / "run") as store:
        for step in (1, 2, 3, 4):
            store.save(step, state(step))
        store.wait()
        assert same(store.restore(4, abstract()), state(4)) and store.steps() == [3, 4]
    with CheckpointStore(tmp_path / name / "run", read_only=True) as store:
        assert same(store.restore_newest(abstract())[0], state(4))
    assert (other / "ocdbt.process_1").is_dir() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_a_run_below_odd_names(source, tmp_path, monkeypatch, capsys):
    """Relative, in a directory that is a pattern; read there, moved, and gone on with."""
    (tmp_path / "cwd[2]").mkdir()
    monkeypatch.chdir(tmp_path / "cwd[2]")
    assert cli.main(train_args(source, "x[a] {é}")) == 0, capsys.readouterr().err
    assert "uoe eval '--workdir=x[a] {é}' --split=test" in capsys.readouterr().out  # to be pasted
    assert cli.main(["eval", "--workdir=x[a] {é}"]) == 0
    found = capsys.readouterr().out
    os.rename("x[a] {é}", "moved*")
    assert (
        cli.main(["eval", "--workdir=moved*", "--step=2"]) == 0 and capsys.readouterr().out == found
    )
    assert os.listdir() == ["moved*"]
    os.rename("moved*", "m\\ved")
    assert (
        cli.main(["eval", "--workdir=m\\ved"]) == 2
        and "holds a backslash" in capsys.readouterr().err
    )


COMMANDS = {
    "train": lambda source, place: train_args(source, place),
    "compare": lambda source, place: [
        "compare",
        "--config=compare/digits:short",
        f"--workdir={place}",
    ],
    "import": lambda source, place: [
        "import",
        f"--from={source}",
        f"--workdir={place}",
        "--experts=2",
        "--k=2",
    ],
    "init_from": lambda source, place: train_args(
        source, f"{source}/new", f"--config.train.init_from={place}"
    ),
}


@pytest.mark.parametrize(
    "command, name", [(c, n) for c in COMMANDS for n in REFUSED if c != "compare" or n == "logs:"]
)
def test_a_name_that_cannot_be_is_refused_before_anything_is_done(
    name, command, source, tmp_path, monkeypatch, capsys
):
    """The name itself, a directory around it, the directory one is in; nothing is left behind."""
    (tmp_path / name).mkdir()
    for place in (tmp_path / name / "in", tmp_path / "new" / name, "in"):
        monkeypatch.chdir(tmp_path / name if place == "in" else tmp_path)
        assert cli.main(COMMANDS[command](source, place)) == 2
        err = capsys.readouterr().err
        option = "config.train.init_from" if command == "init_from" else "--workdir"
        assert err.startswith(f"uoe: {option}=") and err.count("\n") == 1, err
        assert (
            f"holds {REFUSED[name]}" in err
            and "give a directory whose whole path is without it" in err
        )
    assert (
        os.listdir(tmp_path) == [name]
        and not os.listdir(tmp_path / name)
        and not (source / "new").exists()
    )


def test_a_link_is_as_good_as_where_it_leads_to(tmp_path):
    """One of an odd name to a plain place, and one of a plain name to an odd place."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "o\\d").mkdir()
    (tmp_path / "l\\nk").symlink_to("plain")
    (tmp_path / "link").symlink_to("o\\d")
    for name, there in (("l\\nk", "plain"), ("link", "o\\d")):
        with CheckpointStore(tmp_path / name / "run") as store:
            store.save(1, state())
            assert same(store.restore(1, abstract()), state())
        assert (
            tmp_path / there / "run" / "checkpoints" / "1" / "state" / "manifest.ocdbt"
        ).exists()


@pytest.mark.parametrize(
    "name", ["x[1]", "a*", "q?", "h#", "nl\nx", "tab\tx", "logs:", "..", "no\udcffutf"]
)
def test_an_address_that_cannot_be(name, gcs, source, capsys):
    gcs.objects.clear()
    for place in (f"gs://bucket/{name}", f"gs://bucket/{name}/run"):
        assert cli.main(train_args(source, place)) == 2
        err = capsys.readouterr().err
        assert (
            err.startswith("uoe: --workdir=gs://bucket/")
            and err.count("\n") == 1
            and "whole path is without it" in err
        )
    assert not gcs.objects


def test_an_address_of_odd_characters(gcs):
    gcs.objects.clear()
    place = "gs://bucket/a] {é},%20|@b\\c/run"
    with CheckpointStore(place) as store:
        store.save(1, state(1))
        store.save(2, state(2))
        assert same(store.restore(2, abstract()), state(2))
    assert {key.split("/checkpoints")[0] for key in gcs.objects} == {place.removeprefix("gs://")}


def test_a_directory_that_is_taken_for_an_address():
    with pytest.raises(
        UserError, match="--workdir=/gs/bucket/x: is taken for the address gs://bucket/x"
    ):
        locate("/gs/bucket/x")
    with pytest.raises(UserError, match="config.train.init_from=/gs/x"):
        checkpoint_path("/gs/x", "config.train.init_from")


def test_files_below_a_name_that_is_a_pattern(tmp_path):
    """`uoe import` looks for the files beside the weights in this way."""
    for name in ("hf[1]", "hf1"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "a.json").write_text(name)
        (tmp_path / name / "sub" / "b.txt").write_text(name)
    place = locate(tmp_path / "hf[1]")
    assert [path.read_text() for path in place.glob("*.json")] == ["hf[1]"]
    assert list(place.glob("s*/b.t?t")) == [place / "sub" / "b.txt"] and not list(
        (place / "none").glob("*")
    )


@pytest.mark.slow
def test_an_import_from_and_into_patterns(tmp_path, capsys):
    run_of(config_of(**LLAMA), tmp_path / "run")
    assert exported(tmp_path / "run", tmp_path / "hf[1]") == 0
    (tmp_path / "hf[1]" / "generation_config.json").write_text("{}")
    assert (
        cli.main(
            [
                "import",
                f"--from={tmp_path}/hf[1]",
                f"--workdir={tmp_path}/imp[1]",
                "--experts=2",
                "--k=2",
            ]
        )
        == 0
    )
    assert "'--config.train.init_from=" in capsys.readouterr().out  # to be pasted
    assert {path.name for path in (tmp_path / "imp[1]" / "source").iterdir()} >= {
        "config.json",
        "generation_config.json",
    }
    with CheckpointStore(tmp_path / "imp[1]", read_only=True) as store:
        assert store.steps() == [0]


@pytest.mark.parametrize("pattern, found", [
    ("fold[1]", "fold[1]/a.txt fold[1]/sub[2]/b.txt"),
    ("fold[1]/*.txt", "fold[1]/a.txt"),
    ("fold[1]/**/*.txt", "fold[1]/a.txt fold[1]/sub[2]/b.txt"),
    ("fold[1]/sub[2]/?.txt", "fold[1]/sub[2]/b.txt"),
    ("fold[1]/a.txt", "fold[1]/a.txt"),
    ("fold[12]/*.txt", "fold1/a.txt"),  # there is no such directory: a pattern
    ("fold*/a.txt", "fold*/a.txt"),  # is a file
    ("fold*/*.txt", "fold*/a.txt fold1/a.txt fold[1]/a.txt"),
    ("fold[1]/none*", ""),
])  # fmt: skip
@pytest.mark.parametrize("above", ["", "HERE/"])
def test_a_glob_of_text_below_a_name_that_is_a_pattern(
    pattern, found, above, tmp_path, monkeypatch
):
    """An existing directory that is named like a pattern is meant; further on, and of what is not there, it is a pattern."""
    here = tmp_path / "cwd[3]"
    for name in ("fold[1]/a", "fold[1]/sub[2]/b", "fold1/a", "fold*/a"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / f"{name}.txt").write_text(name)
    monkeypatch.chdir(here)
    above = above.replace("HERE", str(here))
    if found:
        assert [str(path) for path in text.find(above + pattern)[0]] == [
            above + name for name in found.split()
        ]
    else:
        with pytest.raises(ConfigError, match="neither a directory nor a glob"):
            text.find(above + pattern)


def test_a_cache_below_a_name_that_is_a_pattern(source, tmp_path):
    """The readers of prepared datasets know reads like name[0:10] and name@2."""
    (tmp_path / "c[0:1]@2*{DATASET}").mkdir()
    for _ in range(2):  # written, and read again
        found = stdlib.open_stdlib(str(source), tmp_path / "c[0:1]@2*{DATASET}")
        assert (
            sum(len(list(found.documents(split))) for split in ("train", "validation", "test"))
            == 200
        )


@pytest.mark.parametrize("step", ["²", "[0]", "*", "0*", " 1"])
def test_a_step_that_is_no_number(step):
    store = types.SimpleNamespace(steps=lambda: [0, 1], directory="DIR")
    assert restore._step(store, "1") == 1
    with pytest.raises(
        UserError, match=re.escape(f"--step={step}: give latest, best, or one of 0, 1")
    ):
        restore._step(store, step)


# --- saves ------------------------------------------------------------------------------------------------------


def cut(name: str, nbytes: int):
    def damage(step) -> None:
        (file,) = step.glob(name)
        file.write_bytes(file.read_bytes()[:-nbytes])

    return damage


def gone(name: str):
    def damage(step) -> None:
        (path,) = step.glob(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def emptied(name: str):
    return lambda step: (step / name).write_bytes(b"")


def other_bytes(step) -> None:
    file = step / "_CHECKPOINT_METADATA"
    file.write_text(file.read_text().replace('"w"', '"v"', 1))


DAMAGES = {
    "no manifest": (
        gone("state/manifest.ocdbt"),
        "state/manifest.ocdbt is missing: what the processes wrote was not merged",
    ),
    "manifest emptied": (emptied("state/manifest.ocdbt"), ""),
    "manifest cut": (cut("state/manifest.ocdbt", 1), ""),
    "no list of leaves": (gone("state/d"), ""),
    "data file gone": (gone("state/ocdbt.process_0/d"), ""),
    "data file cut": (cut("state/ocdbt.process_0/d/*", 1), ""),
    "data file emptied": (cut("state/ocdbt.process_0/d/*", 3000), ""),
    "no types": (gone("state/_sharding"), "_sharding"),
    "no tree": (gone("state/_METADATA"), "_METADATA"),
    "tree emptied": (emptied("state/_METADATA"), ""),
    "no shapes": (gone("state/array_metadatas"), "array_metadatas"),
    "no metadata": (gone("_CHECKPOINT_METADATA"), "_CHECKPOINT_METADATA has lost its content"),
    "other metadata": (other_bytes, "_CHECKPOINT_METADATA is not as it was written"),
}


@pytest.mark.parametrize(
    "name",
    some(DAMAGES, ("no manifest", "data file gone", "data file cut", "no types", "no metadata")),
)
def test_a_save_that_is_not_whole_is_no_save(name, tmp_path, monkeypatch):
    """Found at the save and not at the restore; older checkpoints stay, and the next start goes on from them."""
    damage, reason = DAMAGES[name]
    with pytest.raises(RunError) as raised, CheckpointStore(tmp_path, keep_latest=1) as store:
        store.save(1, state(1))
        store.wait()
        store.save(2, state(2))
        real = store._orbax.wait
        monkeypatch.setattr(
            store._orbax, "wait", lambda: (real(), damage(tmp_path / "checkpoints" / "2"))
        )
        store.wait()
    said = str(raised.value)
    assert (
        said.startswith(f"{tmp_path}/checkpoints/2: this checkpoint was written and is not whole (")
        and reason in said
    )
    assert (
        f"moved to {tmp_path}/damaged/2" in said
        and "(it resumes from step 1)" in said
        and raised.value.exit_code == 1
    )
    assert (tmp_path / "damaged" / "2").is_dir()
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [1] and same(store.restore_newest(abstract())[0], state(1))
        store.save(2, state(2))
        store.wait()
        assert store.steps() == [1, 2]


async def merge_nothing(*args, **more) -> None:
    """As Orbax does where it finds nothing to merge."""


@pytest.mark.slow
def test_a_save_that_was_not_merged_is_no_save(source, tmp_path, monkeypatch, capsys):
    """By `uoe train`: exit code 1, and the same command goes on from the step before."""
    assert cli.main(train_args(source, tmp_path / "run", "--config.train.stop_after=1")) == 0
    with monkeypatch.context() as patch:
        patch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", merge_nothing)
        assert cli.main(train_args(source, tmp_path / "run")) == 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("uoe: ")]
        assert (
            len(said) == 1 and "was not merged" in said[0] and "(it resumes from step 1)" in said[0]
        ), said
    assert cli.main(train_args(source, tmp_path / "run")) == 0
    assert "resuming at step 1 " in capsys.readouterr().err


@pytest.mark.slow
def test_an_import_that_was_not_merged_leaves_nothing(tmp_path, monkeypatch, capsys):
    run_of(config_of(**LLAMA), tmp_path / "run")
    assert exported(tmp_path / "run", tmp_path / "hf") == 0
    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", merge_nothing)
    assert (
        cli.main(
            ["import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/new", "--experts=2", "--k=2"]
        )
        == 1
    )
    assert "is not whole" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "run"]


def test_a_first_save_that_is_not_whole(tmp_path, monkeypatch):
    """There is nothing to resume from: the sentence says how to start again."""
    monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", merge_nothing)
    with (
        pytest.raises(
            RunError, match=f"move {tmp_path}/damaged away and run the same command again"
        ),
        CheckpointStore(tmp_path) as store,
    ):
        store.save(1, state())
    shutil.rmtree(tmp_path / "damaged")
    with CheckpointStore(tmp_path) as store:
        assert store.restore_newest(abstract()) is None


def test_a_part_that_was_not_merged(tmp_path):
    """Of what two processes wrote, one's is missing in the manifest; and a leaf that nobody wrote."""
    with CheckpointStore(tmp_path) as store:
        store.save(1, state())
    step = locate(tmp_path / "checkpoints" / "1")
    assert saved.fault(step) == ""
    with CheckpointStore(tmp_path / "other") as store:
        store.save(1, {"v": jnp.ones(3)})
    shutil.copytree(
        tmp_path / "other/checkpoints/1/state/ocdbt.process_0", step / "state" / "ocdbt.process_1"
    )
    assert saved.fault(step) == "v/c/0 of ocdbt.process_1 is missing in state/manifest.ocdbt"
    for name in ("state/manifest.ocdbt", "state/d"):
        shutil.rmtree(step / name) if "." not in name else (step / name).unlink()
        copied = tmp_path / "other" / "checkpoints" / "1" / name
        shutil.copytree(copied, step / name) if "." not in name else shutil.copy(
            copied, step / name
        )
    shutil.rmtree(step / "state" / "ocdbt.process_0")
    shutil.move(step / "state" / "ocdbt.process_1", step / "state" / "ocdbt.process_0")
    assert re.fullmatch(
        "(a/b.c/..|key|step|w) is missing in state/manifest.ocdbt", saved.fault(step)
    )


def test_a_damaged_save_on_gs(gcs, monkeypatch):
    gcs.objects.clear()
    with pytest.raises(
        RunError, match="was not merged.*moved to gs://bucket/run/damaged/2.*resumes from step 1"
    ):
        with CheckpointStore("gs://bucket/run") as store:
            store.save(1, state(1))
            store.wait()
            monkeypatch.setattr(ocdbt_utils, "merge_ocdbt_per_process_files", merge_nothing)
            store.save(2, state(2))
    with CheckpointStore("gs://bucket/run", read_only=True) as store:
        assert store.steps() == [1] and same(store.restore_newest(abstract())[0], state(1))


def test_what_cannot_be_looked_at_now_is_not_moved(tmp_path, monkeypatch):
    """A passing error says nothing of the checkpoint."""

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    with pytest.raises(RunError, match="cannot be read now"), CheckpointStore(tmp_path) as store:
        store.save(1, state())
        monkeypatch.setattr(saved, "_fault", refuse)
        store.wait()
    assert not (tmp_path / "damaged").exists() and json.loads(
        (tmp_path / "checkpoints/1/_CHECKPOINT_METADATA").read_bytes()
    )

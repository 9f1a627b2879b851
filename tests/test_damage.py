"""Damaged checkpoints: every damage is noticed or harmless, nothing wrong is restored, and the run goes on from the one before."""

from __future__ import annotations

import collections
import hashlib
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT, environment, finish, slow
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from saved_states import abstract, assert_same_bits, bits_state

from uoe_jax.config import Config
from uoe_jax.errors import BadNumbers, ConfigError, RunError, UserError
from uoe_jax.train import metadata as metadata_lib
from uoe_jax.train import restore, saved
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.metadata import CheckpointDamaged, fingerprints
from uoe_jax.train.saved import load_params

# Orbax's reading leaves coroutines behind where it fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def rich_state(seed: int) -> dict:
    """Leaves of every kind a training state may hold: compressible and not, small and of several kilobytes."""
    key = jax.random.key(seed)
    return {
        "params": {
            "layers": {"w": jax.random.normal(key, (16, 32, 8)), "zeros": jnp.zeros((100,))},
            "half": jax.random.normal(key, (16, 24)).astype(jnp.bfloat16),
        },
        "opt": [jnp.arange(9, dtype=jnp.uint8), jnp.arange(16) % 3 == 0],
        "step": jnp.int32(seed),
        "key": key,
    }


# --- fingerprints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "int32", "int8", "uint8", "uint32", "bool", "key"]
)
def test_every_bit_changes_the_fingerprint(dtype):
    bits = (
        32
        if dtype == "key"
        else 1
        if dtype == "bool"
        else 8 * np.dtype(getattr(ml_dtypes, dtype, dtype)).itemsize
    )
    raw = np.random.default_rng(0).integers(0, 2**bits, (3, 2), dtype=np.uint32)

    def found(raw: np.ndarray) -> str:
        if dtype == "key":
            leaf = jax.random.wrap_key_data(jnp.asarray(raw))
        elif dtype == "bool":
            leaf = jnp.asarray(raw.astype(bool))
        else:
            leaf = jnp.asarray(raw.astype(f"uint{bits}").view(getattr(ml_dtypes, dtype, dtype)))
            assert leaf.dtype == dtype
        return fingerprints({"x": leaf}).words["x"]

    words = {found(raw)}
    for place in np.ndindex(raw.shape):
        for bit in range(bits):
            flipped = raw.copy()
            flipped[place] ^= np.uint32(1 << bit)
            words.add(found(flipped))
    assert len(words) == 1 + raw.size * bits


def test_a_change_of_many_elements_changes_the_fingerprint():
    """What a sum of values times weights would not notice: the top bits of two values, or two values changing places."""
    x = np.asarray(jax.random.normal(jax.random.key(0), (8, 8)))
    changed = [
        x,
        -x,
        x[::-1],
        x[:, ::-1],
        x.T,
        np.roll(x, 1),
        x.reshape(4, 16).repeat(1, 0).reshape(8, 8)[[1, 0, *range(2, 8)]],
    ]
    for i in range(1, 64):
        two = x.ravel().copy()
        two[[0, i]] *= -1
        changed.append(two.reshape(8, 8))
    assert len({fingerprints({"x": jnp.asarray(c)}).words["x"] for c in changed}) == len(changed)


def test_the_fingerprint_does_not_depend_on_the_mesh():
    state = {
        "w": jax.random.normal(jax.random.key(0), (16, 32, 8)),
        "h": jnp.ones((8, 24), jnp.bfloat16),
        "key": jax.random.key(3),
    }
    cut = {"w": PartitionSpec("a", None, "b"), "h": PartitionSpec("b", "a"), "key": PartitionSpec()}
    want = fingerprints(state)
    assert want.words == {  # on the disk of every run: they may never change
        "w": "f7baaa0a",
        "h": "f8c55ec0",
        "key": "2c4486d5",
    }
    for shape in ((1, 1), (8, 1), (2, 4)):
        mesh = Mesh(np.asarray(jax.devices()[: np.prod(shape)]).reshape(shape), ("a", "b"))
        placed = {
            name: jax.device_put(x, NamedSharding(mesh, cut[name])) for name, x in state.items()
        }
        with jax.transfer_guard("disallow"), jax.set_mesh(mesh):
            assert fingerprints(placed) == want
    compiled = (
        jax.jit(metadata_lib._all_words, out_shardings=NamedSharding(mesh, PartitionSpec()))
        .lower(jax.tree.leaves(placed))
        .compile()
    )
    moved = re.findall(
        r" = (.*) (?:all-\w+|reduce-scatter|collective-\w+)(?:-start)?\(", compiled.as_text()
    )
    sizes = [
        np.prod([int(n) for n in dims.split(",") if n])
        for shape in moved
        for dims in re.findall(r"\[([\d,]*)\]", shape)
    ]
    assert sizes and max(sizes) <= 8, moved  # a number of each device


# --- what is stored -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, bad):
    state = {
        "a": {"w": jnp.ones((4, 4)).at[2, 1].set(bad)},
        "h": jnp.full(3, bad, jnp.bfloat16),
        "n": jnp.int32(1),
    }
    with CheckpointStore(tmp_path) as store:
        store.save(
            1, {"a": {"w": jnp.ones((4, 4))}, "h": jnp.ones(3, jnp.bfloat16), "n": jnp.int32(1)}
        )
        with pytest.raises(
            BadNumbers, match="a/w and 1 more are not finite at step 2, .*it resumes from step 1"
        ) as caught:
            store.save(2, state)
        assert caught.value.exit_code == 76
        assert store.steps() == [1] and sorted(p.name for p in store.directory.iterdir()) == ["1"]


def test_secrets_are_not_stored(tmp_path):
    given = {
        "config": {
            "data": {"api_key": "k1", "hub.token": "k2", "tokenizer": "bytes", "eos_token_id": 3},
            "credentials": {"a": 1},
        },
        "list": [{"PASSWORD": "k3"}, "s3://me:k4@x@host/path", "http://host:80/a@b"],
        "token": "",
    }
    with CheckpointStore(tmp_path) as store:
        store.save(1, bits_state(1), metadata=given)
        store.wait()
        found = metadata_lib.read_metadata(store.directory / "1")
    stored = b"".join(
        p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()
    ).decode("latin-1")
    assert "checkpoint" in stored and not re.search(r'"k\d"|:k4', stored)
    assert found["config"]["data"] == {
        "api_key": "…redacted…",
        "hub.token": "…redacted…",
        "tokenizer": "bytes",
        "eos_token_id": 3,
    }
    assert found["config"]["credentials"] == "…redacted…" and found["token"] == ""
    assert found["list"] == [
        {"PASSWORD": "…redacted…"},
        "s3://…redacted…@host/path",
        "http://host:80/a@b",
    ]


def test_a_loss_given_afterwards_stays(tmp_path):
    with CheckpointStore(tmp_path, keep_latest=1) as store:
        for step, loss in ((1, 2.0), (2, None), (3, 3.0)):
            store.save(step, bits_state(step), None if loss is None else {"loss": loss})
            if step == 2:
                store.rank(2, float("nan"))
                assert store.best_step() == 1
                store.rank(2, 1.5)
        store.wait()
        assert store.steps() == [2, 3] and store.best_step() == 2
    with CheckpointStore(tmp_path, keep_latest=1) as store:
        assert store.best_step() == 2
        store.rank(3, 1.0)
        assert_same_bits(store.restore(3, abstract(bits_state(3))), bits_state(3))
        with pytest.raises(UserError, match="no checkpoint of step 9"):
            store.rank(9, 1.0)
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.best_step() == 3
        with pytest.raises(ValueError, match="read_only"):
            store.rank(3, 2.0)
    (tmp_path / "checkpoints" / "3" / "uoe_loss.json").write_text(
        '{"loss": 0.1, "digest": "00"}'
    )  # not believed
    (tmp_path / "checkpoints" / "2" / "uoe_loss.json").write_text("")
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.best_step() == 3 and store._losses == {2: None, 3: 3.0}


# --- damage -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A run with the checkpoints 1 and 2."""
    workdir = tmp_path_factory.mktemp("good")
    with CheckpointStore(workdir) as store:
        for step in (1, 2):
            store.save(
                step, rich_state(step), {"loss": 1.0 / step}, {"config": {"model": {"k": 4}}}
            )
        store.rank(2, 0.4)
    return workdir


def files_of(workdir: Path) -> list[Path]:
    """The files of its checkpoint 2, relative to the workdir."""
    return sorted(
        p.relative_to(workdir) for p in (workdir / "checkpoints" / "2").rglob("*") if p.is_file()
    )


def outcome(workdir: Path) -> str:
    """Resumes and checks what comes: "harmless" or "detected", or the test fails."""
    said: list[str] = []
    with CheckpointStore(workdir) as store:
        assert store.steps() == [1, 2]
        state, step, metadata = store.restore_newest(abstract(rich_state(0)), said.append)
        assert_same_bits(state, rich_state(step))
        assert metadata["config"] == {"model": {"k": 4}}
        assert store.steps() == [1, 2][:step]
    aside = workdir / "damaged" / "2"
    assert aside.exists() == bool(said) == (step == 1)
    if said:
        assert len(said) == 1 and f"moved to {aside}" in said[0] and "\n" not in said[0]
    return "detected" if said else "harmless"


@pytest.mark.parametrize("n", [16, slow(200)])
def test_single_bit_flips(good, tmp_path, n):
    """Half of them anywhere in the bytes, half in any file, so that small files get theirs."""
    rng, files = random.Random(n), [f for f in files_of(good) if (good / f).stat().st_size]
    sizes, seen = [(good / f).stat().st_size for f in files], collections.Counter()
    for i in range(n):
        file = rng.choices(files, sizes)[0] if i % 2 else rng.choice(files)
        shutil.copytree(good, tmp_path / str(i))
        data = bytearray((good / file).read_bytes())
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        (tmp_path / str(i) / file).write_bytes(data)
        try:
            seen[outcome(tmp_path / str(i))] += 1
        except Exception as error:
            raise AssertionError(f"bit {bit} of {file}") from error
        shutil.rmtree(tmp_path / str(i))
    assert seen["detected"] >= n // 2, seen


@pytest.mark.parametrize(
    "change", ["deleted", "emptied", "halved", "one byte short", "overwritten", "longer"]
)
def test_every_file(good, tmp_path, change):
    seen = {}
    for i, file in enumerate(files_of(good)):
        shutil.copytree(good, tmp_path / str(i))
        path = tmp_path / str(i) / file
        data = path.read_bytes()
        if change == "deleted":
            path.unlink()
        else:
            path.write_bytes(
                {
                    "emptied": b"",
                    "halved": data[: len(data) // 2],
                    "one byte short": data[:-1],
                    "overwritten": bytes(len(data)),
                    "longer": data + b"\0",
                }[change]
            )
        seen[str(file.relative_to("checkpoints/2"))] = outcome(tmp_path / str(i))
        shutil.rmtree(tmp_path / str(i))
    if change != "longer":
        assert (
            seen["_CHECKPOINT_METADATA"]
            == seen["state/_METADATA"]
            == seen["state/manifest.ocdbt"]
            == "detected"
        )


def emptied(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize(
    "change",
    [
        emptied,
        lambda step: shutil.rmtree(step / "state"),
        lambda step: (step / "_CHECKPOINT_METADATA").write_text("[1]"),
        lambda step: (step / "_CHECKPOINT_METADATA").write_text('{"commit_timestamp_nsecs": "x"}'),
        lambda step: (step / "_CHECKPOINT_METADATA").write_text(
            '{"custom_metadata": {"format_version": 1}}'
        ),
        lambda step: shutil.copytree(
            step.parent / "1" / "state", step / "state", dirs_exist_ok=True
        ),  # another good state
    ],
)
def test_whole_directories_and_garbage(good, tmp_path, change):
    shutil.copytree(good, tmp_path / "run")
    change(tmp_path / "run" / "checkpoints" / "2")
    with CheckpointStore(tmp_path / "run", read_only=True) as store:
        with pytest.raises(
            CheckpointDamaged, match="checkpoints/2: this checkpoint is damaged .*; use another"
        ) as caught:
            store.restore(2, abstract(rich_state(0)))
        assert caught.value.exit_code == 1
        said: list[str] = []
        assert store.restore_newest(abstract(rich_state(0)), said.append)[1] == 1
        assert "passed over" in said[0] and store.steps() == [1, 2]
    assert outcome(tmp_path / "run") == "detected"
    with CheckpointStore(tmp_path / "run") as store:  # the step is free for the run that goes on
        assert store.save(2, rich_state(2)) and store.best_step() == 1
        assert_same_bits(store.restore(2, abstract(rich_state(2))), rich_state(2))


def test_it_never_starts_from_the_beginning_by_itself(good, tmp_path):
    with CheckpointStore(tmp_path / "new") as store:
        assert store.restore_newest(abstract(rich_state(0))) is None
    shutil.copytree(good, tmp_path / "run")
    for step in (1, 2):
        emptied(tmp_path / "run" / "checkpoints" / str(step))
    said: list[str] = []
    with CheckpointStore(tmp_path / "run", read_only=True) as store:
        with pytest.raises(
            RunError,
            match=r"no checkpoint can be read as it was saved \(step 2: .*\); fix that, or move",
        ):
            store.restore_newest(abstract(rich_state(0)), said.append)
    for _ in range(
        2
    ):  # now, and when the same command is run again: what fails for all may lie elsewhere, and none is moved
        with CheckpointStore(tmp_path / "run") as store:
            with pytest.raises(
                RunError, match=r"move this directory away to start from the beginning"
            ) as caught:
                store.restore_newest(abstract(rich_state(0)), said.append)
            assert caught.value.exit_code == 1 and store.steps() == [1, 2]
    (tmp_path / "run" / "checkpoints" / "1").rename(tmp_path / "kept")
    (tmp_path / "run" / "damaged").mkdir()
    (tmp_path / "run" / "checkpoints" / "2").rename(tmp_path / "run" / "damaged" / "2")
    with CheckpointStore(tmp_path / "run") as store:
        with pytest.raises(
            RunError, match=r"run/damaged: holds .* \(2\) .*; move this directory away to start"
        ):
            store.restore_newest(abstract(rich_state(0)), said.append)
    (tmp_path / "run" / "damaged").rename(tmp_path / "kept2")
    with CheckpointStore(tmp_path / "run") as store:
        assert store.restore_newest(abstract(rich_state(0)), said.append) is None
    assert said == []


@pytest.mark.parametrize("is_object_store", [False, True])
def test_what_was_set_aside_is_never_overwritten(good, tmp_path, monkeypatch, is_object_store):
    shutil.copytree(good, tmp_path / "run")
    if is_object_store:
        monkeypatch.setattr(metadata_lib, "is_remote", lambda path: True)
    for _ in range(3):
        metadata = tmp_path / "run" / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
        metadata.write_bytes(metadata.read_bytes().replace(b"digest", b"Digest"))
        content = {
            p.relative_to(metadata.parent): p.read_bytes()
            for p in metadata.parent.rglob("*")
            if p.is_file()
        }
        with CheckpointStore(tmp_path / "run") as store:
            assert store.restore_newest(abstract(rich_state(0)), print)[1] == 1
            store.save(2, rich_state(2))
            store.rank(1, 0.25)
            store.wait()
            assert store.best_step() == 1
    assert sorted(p.name for p in (tmp_path / "run" / "damaged").iterdir()) == ["2", "2.2", "2.3"]
    last = tmp_path / "run" / "damaged" / "2.3"
    assert content == {p.relative_to(last): p.read_bytes() for p in last.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        MemoryError(),
        OSError(24, "Too many open files"),
        ConnectionResetError("reset"),
        ValueError("UNAVAILABLE: the bucket does not answer"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
    ],
)
def test_what_may_pass_is_no_damage(good, tmp_path, monkeypatch, error):
    def load(*_):
        raise error

    shutil.copytree(good, tmp_path / "run")
    with CheckpointStore(tmp_path / "run") as store, monkeypatch.context() as patch:
        patch.setattr(saved.ocp, "load", load)
        with pytest.raises(
            RunError, match="checkpoints/2: cannot be read now .*run the same command again"
        ) as caught:
            store.restore_newest(abstract(rich_state(0)))
        assert not isinstance(caught.value, CheckpointDamaged) and store.steps() == [1, 2]


def test_what_cannot_be_moved_stays(good, tmp_path):
    shutil.copytree(good, tmp_path / "run")
    emptied(tmp_path / "run" / "checkpoints" / "2")
    (tmp_path / "run" / "damaged").write_text("")
    with CheckpointStore(tmp_path / "run") as store:
        with pytest.raises(
            RunError, match="checkpoints/2: .*damaged and cannot be moved to .*damaged/2 .* by hand"
        ):
            store.restore_newest(abstract(rich_state(0)))
        assert store.steps() == [1, 2]


def test_evaluation_passes_over_a_damaged_checkpoint(good, tmp_path, monkeypatch, capsys):
    shutil.copytree(good, tmp_path / "run")
    emptied(tmp_path / "run" / "checkpoints" / "2")
    before = tree_hash(tmp_path / "run")

    def build(_, mesh):
        everywhere = NamedSharding(mesh, PartitionSpec())
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), rich_state(0)
        )
        return SimpleNamespace(abstract=SimpleNamespace(**shapes))

    monkeypatch.setattr(restore, "build", build)
    with restore.restored(Config(), str(tmp_path / "run")) as run:
        assert run.step == 1
        assert_same_bits(run.params, rich_state(1)["params"])
    said = capsys.readouterr().err
    assert (
        said.startswith("uoe: ")
        and "checkpoints/2: this checkpoint is damaged" in said
        and said.count("\n") == 1
    )
    with pytest.raises(CheckpointDamaged), restore.restored(Config(), str(tmp_path / "run"), "2"):
        pass
    assert tree_hash(tmp_path / "run") == before


def test_another_model_is_no_damage(good, tmp_path):
    shutil.copytree(good, tmp_path / "run")
    with CheckpointStore(tmp_path / "run") as store:
        with pytest.raises(
            UserError, match="does not fit the model: words is in the model"
        ) as caught:
            store.restore_newest(abstract({**rich_state(0), "words": jnp.zeros(3)}))
        assert caught.value.exit_code == 2 and store.steps() == [1, 2]


# --- parameters of another run ---------------------------------------------------------------------------------------


def tree_hash(folder: Path) -> str:
    parts = [
        str(p).encode() + (p.read_bytes() if p.is_file() else b"")
        for p in sorted(folder.rglob("*"))
    ]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


@pytest.mark.parametrize("place", ["", "checkpoints/2"])
def test_parameters_are_taken_where_they_fit(good, tmp_path, place):
    shutil.copytree(good, tmp_path / "run")
    before = tree_hash(tmp_path / "run")
    mesh = Mesh(np.asarray(jax.devices()), ("fsdp",))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    wanted = {
        "layers": {
            "w": jax.ShapeDtypeStruct((16, 32, 8), jnp.float32, sharding=cut),
            "zeros": jax.ShapeDtypeStruct((99,), jnp.float32, sharding=whole),
        },
        "half": jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=whole),
        "more": {"head": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=whole)},
    }
    params, taken, fresh = load_params(tmp_path / "run" / place, wanted)
    want = rich_state(2)["params"]["layers"]["w"]
    assert params["layers"]["w"].sharding == cut
    assert_same_bits(
        params, {"layers": {"w": want, "zeros": None}, "half": None, "more": {"head": None}}
    )
    assert taken == ["params/layers/w"] and fresh == {
        "params/layers/zeros": "float32[100] in the checkpoint and float32[99] in the model",
        "params/half": "bfloat16[16, 24] in the checkpoint and float32[16, 24] in the model",
        "params/more/head": "in the model and not in the checkpoint",
    }
    assert tree_hash(tmp_path / "run") == before


def test_parameters_of_a_damaged_run(good, tmp_path):
    shutil.copytree(good, tmp_path / "run")
    wanted = abstract(rich_state(0)["params"])
    emptied(tmp_path / "run" / "checkpoints" / "2")
    params, taken, fresh = load_params(os.fspath(tmp_path / "run"), wanted)
    assert_same_bits(params, rich_state(1)["params"])
    assert len(taken) == 3 and not fresh
    with pytest.raises(CheckpointDamaged, match="checkpoints/2: this checkpoint is damaged"):
        load_params(tmp_path / "run" / "checkpoints" / "2", wanted)
    emptied(tmp_path / "run" / "checkpoints" / "1")
    (tmp_path / "empty").mkdir()
    for path, model, words in [
        (tmp_path / "run", wanted, "all of its 2 checkpoints are damaged"),
        (tmp_path / "nowhere", wanted, "there is no checkpoint; give the workdir of a run"),
        (tmp_path / "empty", wanted, "there is no checkpoint"),
        (
            good,
            {"other": wanted["half"]},
            r"none of its parameters fits the model \(params/other: in the model and not in the checkpoint\)",
        ),
    ]:
        with pytest.raises(
            ConfigError, match=rf"config.train.init_from='{path}': {words}"
        ) as caught:
            load_params(path, model)
        assert caught.value.exit_code == 2


# --- several processes --------------------------------------------------------------------------------------------

TWO = """
import sys
sys.path[:0] = [{repository!r}, {tests!r}]
from uoe_jax.distributed import coordination
coordination.join(stops_itself=False)
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from uoe_jax.train import saved
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.metadata import CheckpointDamaged

me = jax.process_index()
mesh = Mesh(np.asarray(jax.devices()), ("fsdp",))
cut = NamedSharding(mesh, PartitionSpec("fsdp"))

def state(step):
    whole = np.random.default_rng(step).standard_normal((64, 100)).astype(np.float32)
    return {{"w": jax.make_array_from_callback(whole.shape, cut, lambda index: whole[index])}}

def same(a, b):
    return all(np.array_equal(x.data, y.data) for x, y in zip(a["w"].addressable_shards, b["w"].addressable_shards))

with jax.set_mesh(mesh), CheckpointStore({workdir!r}, keep_latest=9) as store:
    if sys.argv[1] == "save":
        for step in range(1, 6):
            store.save(step, state(step))
    else:
        load, exists = saved.ocp.load, type(store.directory).exists
        def flipped(path, *rest):  # a disk of this machine that lies
            tree = load(path, *rest)
            if path.name == "2":
                local = np.array(tree["w"].addressable_shards[0].data)
                local[0, 0] *= -1
                local = jax.device_put(local, jax.local_devices()[0])
                tree = {{"w": jax.make_array_from_single_device_arrays(tree["w"].shape, cut, [local])}}
            return tree
        if me == 1:
            saved.ocp.load = flipped
            type(store.directory).exists = lambda path: exists(path) and not str(path).endswith("3/state/_METADATA")
        abstract = {{"w": jax.ShapeDtypeStruct((64, 100), np.float32, sharding=cut)}}
        for step in (5, 4, 3, 2):
            try:
                store.restore(step, abstract)
                raise AssertionError(step)
            except CheckpointDamaged as error:
                print(step, error.reason, flush=True)
        got, step, _ = store.restore_newest(abstract, lambda text: print("said", text, flush=True))
        assert step == 1 and same(got, state(1)) and store.steps() == [1]
        store.save(6, state(6))  # Orbax counts its operations: both processes are at one count, or this would hang
        store.rank(6, 0.5)
        assert same(store.restore(6, abstract), state(6)) and store.best_step() == 6
print("done", flush=True)
"""


def pair(tmp_path: Path, *args: str) -> list[tuple[int, str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = dict(UOE_COORDINATOR=f"127.0.0.1:{probe.getsockname()[1]}", UOE_PROCESSES="2")
    program = TWO.format(
        repository=str(ROOT), tests=str(ROOT / "tests"), workdir=str(tmp_path / "run")
    )
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *args],
            env=environment(**place, UOE_PROCESS_ID=str(i)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    return finish(started, timeout=120)


@pytest.mark.slow
def test_damage_that_one_of_two_processes_sees(tmp_path):
    """Both find the same steps damaged, nobody waits for long, and both go on from the same one, saving as well."""
    ended = pair(tmp_path, "save")
    assert [code for code, _, _ in ended] == [0, 0], ended
    for step, change in (
        (5, lambda data: data[:100]),
        (4, lambda data: data[:-300] + bytes([data[-300] ^ 1]) + data[-299:]),
    ):
        files = list(
            (tmp_path / "run/checkpoints" / str(step) / "state/ocdbt.process_1/d").iterdir()
        )
        largest = max(files, key=lambda p: p.stat().st_size)
        assert largest.stat().st_size > 10_000  # the shard of process 1
        largest.write_bytes(change(largest.read_bytes()))
    ended = pair(tmp_path, "resume")
    assert [code for code, _, _ in ended] == [0, 0], ended
    first, second = (out.splitlines() for _, out, _ in ended)
    found = [line for line in first if not line.startswith("said")]
    assert found == second and [line[0] for line in found] == ["5", "4", "3", "2", "d"]
    for line, words in zip(
        found,
        ("OUT_OF_RANGE", "w is not as it was saved", "state/_METADATA is missing", "w is not as"),
    ):
        assert words in line
    assert len(first) - len(found) == 4
    assert sorted(p.name for p in (tmp_path / "run" / "damaged").iterdir()) == ["2", "3", "4", "5"]

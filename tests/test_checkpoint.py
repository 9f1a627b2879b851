"""Checkpoints: what is saved comes back bit for bit, whatever else goes wrong (contracts 8 and 10)."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ROOT
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from saved_states import abstract, assert_same_bits, bits_state

from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.train import checkpoint, metadata
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.metadata import CheckpointDamaged


def saved_steps(store: CheckpointStore) -> list[int]:
    store.wait()
    on_disk = sorted(int(p.name) for p in store.directory.iterdir() if p.name.isdigit())
    assert store.steps() == on_disk
    return on_disk


def test_round_trip_is_bit_exact(tmp_path):
    params = {
        "half": jnp.asarray([1.5, -0.0, 1e-40, 3e38], jnp.bfloat16),
        "single": jnp.asarray([[1e-45, -3e38], [0.1, -0.0]], jnp.float32),
        "layers": [{"w": jnp.arange(6.0).reshape(2, 3)}, {"w": -jnp.arange(6.0).reshape(2, 3)}],
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    with jax.numpy_dtype_promotion("standard"):  # optax mixes float constants with integer counts
        moments = optimizer.update(
            jax.tree.map(jnp.ones_like, params), optimizer.init(params), params
        )[1]
    state = {
        "params": params,
        "optimizer": moments,
        "step": jnp.int32(7),
        "counts": jnp.asarray([1, 255], jnp.uint8),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
    }
    with CheckpointStore(tmp_path) as store:
        assert store.latest_step() is None and store.best_step() is None
        assert store.save(7, state, metadata={"config": {"model": {"k": 4, "gate": "sigmoid"}}})
    with CheckpointStore(tmp_path) as store:
        assert store.latest_step() == 7
        assert_same_bits(store.restore(7, abstract(state)), state)
        found = metadata.read_metadata(store.directory / "7")
    assert found["config"] == {"model": {"k": 4, "gate": "sigmoid"}}
    assert found["format_version"] == metadata.FORMAT_VERSION
    assert found["versions"]["jax"] == jax.__version__
    assert set(found["versions"]) == {"jax", "flax", "optax", "orbax-checkpoint"}
    half = found["leaves"]["params/half"]
    assert (half["dtype"], half["shape"], len(half["fingerprint"])) == ("bfloat16", [4], 8)


def test_restore_into_another_sharding(tmp_path):
    devices = jax.devices()
    mesh = Mesh(np.asarray(devices), ("fsdp",))
    cut, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    w = jnp.arange(len(devices) * 6.0).reshape(len(devices) * 2, 3)
    with CheckpointStore(tmp_path) as store:
        store.save(0, {"w": jax.device_put(w, cut)})
        got = store.restore(0, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=whole)})["w"]
        assert got.sharding == whole
        assert_same_bits(got, w)


def test_buffers_may_be_donated_at_once(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)

    def fresh() -> dict[str, jax.Array]:
        return {f"w{i}": jnp.arange(i, i + 2_000_000, dtype=jnp.uint32) for i in range(4)}

    want = jax.tree.map(lambda x: np.array(x, copy=True), fresh())
    old = fresh()
    step(old)
    assert old[
        "w0"
    ].is_deleted()  # this step does donate; on CPU not while Orbax holds a view of the buffer
    with CheckpointStore(tmp_path) as store:
        state = fresh()
        store.save(0, state)
        for _ in range(5):
            state = step(state)
        assert store.steps() == []  # it was still being written
        got = store.restore(0, abstract(state))
    for name in want:
        np.testing.assert_array_equal(np.asarray(got[name]), want[name])


@pytest.mark.parametrize(
    "losses, keep_latest, keep_best, kept, best",
    [
        ([3.0, 1.0, 2.0, 2.5, 2.6], 2, 1, [1, 3, 4], 1),
        (
            [3.0, 1.0, None, None, None],
            2,
            1,
            [1, 3, 4],
            1,
        ),  # those without a loss are not kept for ever
        ([None, None, None, None], 2, 1, [2, 3], None),
        ([None, 2.0, None, 1.0, None], 1, 1, [3, 4], 3),
        ([2.0, float("nan"), float("inf"), 3.0, None], 1, 1, [0, 4], 0),  # NaN is no best
        ([1.0, 1.0, 1.0, 2.0], 1, 1, [2, 3], 2),  # of equals the newest
        ([1.0, 2.0, 3.0], 1, 0, [2], 2),
    ],
)
def test_what_is_kept(tmp_path, losses, keep_latest, keep_best, kept, best):
    with CheckpointStore(tmp_path, keep_latest, keep_best) as store:
        for step, loss in enumerate(losses):
            store.save(step, bits_state(step), None if loss is None else {"loss": loss})
        assert saved_steps(store) == kept
        assert store.best_step() == best
    with CheckpointStore(
        tmp_path, keep_latest, keep_best
    ) as store:  # the losses are on the disk, not in the process
        assert store.best_step() == best
        store.save(100, bits_state(100))
        latest = [*kept, 100][-keep_latest:]
        assert saved_steps(store) == sorted(
            {*latest, *([best] if keep_best and best is not None else [])}
        )


def test_a_step_that_was_deleted_may_be_saved_again(tmp_path):
    with CheckpointStore(tmp_path, keep_latest=1) as store:
        for step in (1, 2):
            store.save(step, bits_state(step))
        assert saved_steps(store) == [2]
        assert store.save(1, bits_state(7), {"loss": 1.0})
        assert saved_steps(store) == [1, 2]
        assert_same_bits(store.restore(1, abstract(bits_state(7))), bits_state(7))


def test_a_step_is_listed_once_it_is_committed(tmp_path):
    with CheckpointStore(tmp_path, keep_latest=1) as store:
        store.save(0, bits_state(0), {"loss": 1.0})
        store.wait()
        store.save(1, bits_state(1), {"loss": 0.5})  # in flight: Orbax itself would list [1] now
        assert (store.steps(), store.latest_step(), store.best_step()) == ([0], 0, 0)
        store.wait()
        assert (store.steps(), store.latest_step(), store.best_step()) == ([1], 1, 1)
        store.save(2, bits_state(2))
        deadline = time.monotonic() + 20
        while store.latest_step() != 2:  # check() alone notices as well, without blocking
            store.check()
            assert time.monotonic() < deadline
        assert store.save(2, bits_state(3)) is False
        assert_same_bits(store.restore(2, abstract(bits_state(2))), bits_state(2))


@pytest.mark.parametrize(
    "other, words",
    [
        (
            lambda s: {**s, "words": s["words"].astype(jnp.float32)},
            ["words is uint32[64]", "float32[64]"],
        ),
        (lambda s: {**s, "words": s["words"][:8]}, ["words is uint32[64]", "uint32[8]"]),
        (
            lambda s: {**s, "key": jax.random.key(0, impl="rbg")},
            ["key is key<fry>[]", "key<rbg>[]"],
        ),
        (lambda s: {**s, "key": jax.random.key_data(s["key"])}, ["key is key<fry>[]", "uint32[2]"]),
        (lambda s: {"words": s["words"]}, ["key is in the checkpoint and not in the model"]),
        (lambda s: {**s, "more": s["words"]}, ["more is in the model and not in the checkpoint"]),
        (lambda s: {"a": s["words"], "b": s["words"]}, ["a is in the model", "(and 3 more)"]),
    ],
)
def test_another_model_is_refused(tmp_path, other, words):
    state = bits_state(0)
    with CheckpointStore(tmp_path) as store:
        store.save(0, state)
        with pytest.raises(UserError) as caught:
            store.restore(0, abstract(other(state)))
    assert caught.value.exit_code == 2
    for word in [*words, str(tmp_path), "--workdir"]:
        assert word in str(caught.value)


def test_callers_mistakes_are_refused(tmp_path):
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(UserError, match=r"layers/w has shape \(0, 3\)"):
            store.save(0, {"layers": {"w": jnp.zeros((0, 3))}, "b": jnp.zeros(2)})
        for leaf in (np.zeros(2), 1.0, np.float64(1)):
            with pytest.raises(ValueError, match="w: must be a jax.Array|w: leaves must be arrays"):
                store.save(0, {"w": leaf})
        with pytest.raises(ValueError, match="leaves"):
            store.save(0, bits_state(0), metadata={"leaves": 1})
        for step in (-1, "3", True, 1.0):
            with pytest.raises(ValueError, match="step must be"):
                store.save(step, bits_state(0))
        assert store.steps() == []
        store.save(0, bits_state(0))
        with pytest.raises(UserError, match=r"no checkpoint of step 5 \(there are: 0\)"):
            store.restore(5, abstract(bits_state(0)))
        with pytest.raises(ValueError, match="words has no sharding"):
            store.restore(0, jax.eval_shape(lambda: {"words": jnp.zeros(64, jnp.uint32)}))
    with pytest.raises(ConfigError, match="checkpoint.keep_latest=0"):
        CheckpointStore(tmp_path, keep_latest=0)


@pytest.mark.parametrize(
    "name, change",
    [
        ("_CHECKPOINT_METADATA", lambda p: p.write_text("{}")),
        ("state/_METADATA", lambda p: p.write_bytes(p.read_bytes()[:20])),
        ("state/manifest.ocdbt", lambda p: p.unlink()),
    ],
)
def test_damage_is_named(tmp_path, name, change):
    with CheckpointStore(tmp_path) as store:
        store.save(0, bits_state(0))
        store.save(1, bits_state(1))
    change(tmp_path / "checkpoints" / "1" / name)
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(CheckpointDamaged, match="checkpoints/1: this checkpoint"):
            store.restore(1, abstract(bits_state(1)))
        assert_same_bits(store.restore(0, abstract(bits_state(0))), bits_state(0))


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(metadata, "FORMAT_VERSION", 99)
            store.save(0, bits_state(0))
            store.wait()
        with pytest.raises(UserError, match="format_version=99.*update uoe_jax"):
            store.restore(0, abstract(bits_state(0)))


def test_an_older_format_is_refused(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(0, bits_state(0))
        store.wait()
    path = tmp_path / "checkpoints" / "0" / metadata.METADATA
    content = json.loads(path.read_text())
    del content["custom_metadata"]["digest"]
    content["custom_metadata"]["format_version"] = 1
    path.write_text(json.dumps(content))
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(UserError, match="format_version=1 is of an older uoe_jax"):
            store.restore(0, abstract(bits_state(0)))


SAVE_FOR_EVER = """
import itertools, sys
sys.path[:0] = [{repository!r}, {repository!r} + "/tests"]
from saved_states import bits_state
from uoe_jax.train.checkpoint import CheckpointStore
store = CheckpointStore({workdir!r})
start = (store.latest_step() or 0) + 1
for step in itertools.count(start):
    store.save(step, bits_state(step, 200_000), {{"loss": 1 / step}})
    print(step, flush=True)
"""


def test_killed_while_saving(tmp_path):
    program = SAVE_FOR_EVER.format(repository=str(ROOT), workdir=str(tmp_path))
    for name in (
        "77.orbax-checkpoint-tmp",
        "66.orbax-checkpoint-tmp-123",
    ):  # left by processes killed long ago
        (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "state" / "data").write_text("x")
    rng = random.Random(0)
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
        )
        for _ in range(3):
            last = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        with CheckpointStore(tmp_path) as store:
            assert store.latest_step() >= last - 1  # a save waits for the one before it
            for step in store.steps():
                state = bits_state(step, 200_000)
                assert_same_bits(store.restore(step, abstract(state)), state)
    store = CheckpointStore(tmp_path)
    store.save(10**6, bits_state(0))
    store.close()
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Mounts 8 MB."""
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@contextlib.contextmanager
def small_files(directory: Path) -> Iterator[None]:
    """No file of this process grows past 1 MB: needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [pytest.param(small_disk, marks=pytest.mark.mount), small_files])
def test_disk_full_during_a_save(tmp_path, monkeypatch, limit, capfd):
    workdir = tmp_path / "run"
    with limit(workdir):
        store = CheckpointStore(workdir, keep_latest=1)
        store.save(0, bits_state(0, 100_000), {"loss": 2.0})
        store.wait()
        with monkeypatch.context() as patch:
            patch.setattr(
                checkpoint, "_free_bytes", lambda _: 1 << 60
            )  # it was free when we looked
            store.save(1, bits_state(1, 4_000_000), {"loss": 1.0})
            deadline = time.monotonic() + 30
            with pytest.raises(RunError) as caught:
                while time.monotonic() < deadline:
                    store.check()
                    time.sleep(0.01)
        message = str(caught.value)
        assert caught.value.exit_code == 1 and "\n" not in message
        for words in (
            str(store.directory),
            "step 1",
            "17,600,009 bytes",
            "free",
            "it resumes from step 0",
        ):
            assert words in message
        store.check()  # reported once
        # keep_latest=1 was about to delete step 0; it must be there, listed, and the debris gone.
        assert saved_steps(store) == [0] and store.best_step() == 0
        assert not list(store.directory.glob("*tmp*"))
        assert_same_bits(store.restore(0, abstract(bits_state(0, 100_000))), bits_state(0, 100_000))
        store.save(2, bits_state(2))  # and the store works on once there is space
        assert saved_steps(store) == [0, 2]
        store.close()
    assert "Traceback" not in capfd.readouterr().err  # Orbax alone prints a thousand lines


def test_disk_full_before_a_save(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        nbytes = 64 * 4 + 8
        monkeypatch.setattr(checkpoint, "_free_bytes", lambda _: int(nbytes * 1.1) - 1)
        with pytest.raises(
            RunError,
            match=r"no space for the checkpoint of step 3: 291 bytes needed, 289 free; "
            r".*no checkpoint is complete yet",
        ):
            store.save(3, bits_state(0))
        monkeypatch.setattr(checkpoint, "_free_bytes", lambda _: 291)
        assert store.save(3, bits_state(0))


def test_a_directory_that_is_gone_before_a_save(tmp_path):
    with CheckpointStore(tmp_path / "run") as store:
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(
            RunError,
            match="run/checkpoints: the checkpoint of step 3 cannot be written here .*put the directory back",
        ):
            store.save(3, bits_state(0))


def test_a_failed_save_is_reported_on_close(tmp_path):
    store = CheckpointStore(tmp_path)
    with small_files(tmp_path):
        store.save(0, bits_state(0, 1_000_000))
        with pytest.raises(RunError, match="step 0"):
            store.close()
    store.close()
    with pytest.raises(KeyError), small_files(tmp_path), CheckpointStore(tmp_path) as store:
        store.save(0, bits_state(0, 1_000_000))
        raise KeyError("not hidden by the save that failed too")


def test_a_file_in_place_of_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="cannot write here .*--workdir") as caught:
            CheckpointStore(workdir)
        assert caught.value.exit_code == 2 and str(workdir) in str(caught.value)


@pytest.mark.mount
def test_a_read_only_directory(tmp_path):
    """Root may write through any mode bits, so this takes a read-only mount, or a user who is not root."""
    with CheckpointStore(tmp_path) as store:
        store.save(0, bits_state(0))
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            for options in (["--bind", tmp_path, tmp_path], ["-o", "remount,ro,bind", tmp_path]):
                subprocess.run(["mount", *options], check=True)
            stack.callback(subprocess.run, ["umount", "-l", tmp_path], check=True)
        else:
            (tmp_path / "checkpoints").chmod(0o555)
            stack.callback((tmp_path / "checkpoints").chmod, 0o755)
        with pytest.raises(UserError, match="cannot write here"):
            CheckpointStore(tmp_path)
        with CheckpointStore(tmp_path, read_only=True) as store:  # evaluation still can
            assert_same_bits(store.restore(0, abstract(bits_state(0))), bits_state(0))


def test_a_reader_touches_nothing(tmp_path):
    with pytest.raises(UserError, match="no checkpoints here"):
        CheckpointStore(tmp_path / "nowhere", read_only=True)
    assert not (tmp_path / "nowhere").exists()
    with CheckpointStore(tmp_path) as store:
        store.save(0, bits_state(0))
    writing = tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp"  # of the run beside us
    shutil.copytree(tmp_path / "checkpoints" / "0", writing)
    with CheckpointStore(tmp_path, read_only=True) as store:
        assert store.steps() == [0] and writing.exists()
        with pytest.raises(ValueError, match="read_only"):
            store.save(1, bits_state(1))
    with CheckpointStore(
        tmp_path
    ) as store:  # a writer removes it: in the background, done before its first save
        store.save(2, bits_state(2))
    assert not writing.exists()


def test_a_relative_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with CheckpointStore("run") as store:
        store.save(0, bits_state(0))
    assert (tmp_path / "run" / "checkpoints" / "0").is_dir()

"""StableHLO export: what it writes runs without this package, for any batch, and what cannot be written leaves nothing."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import reference
import safetensors.numpy
from etils import epath
from helpers import environment

from uoe_jax.config import Config, MeshConfig, from_dict
from uoe_jax.distributed.mesh import make_mesh
from uoe_jax.errors import RunError, UserError
from uoe_jax.exchange import stablehlo
from uoe_jax.exchange.stablehlo import export_stablehlo
from uoe_jax.train.step import functional

SMALL = dict(d_model=16, n_layers=2, n_heads=4, d_hidden=32, context_length=32, vocab_size=11)
CLASSES = dict(SMALL, task="classify", causal=False, context_length=12)
BOUND = dict(n_experts=4, k=2, patch_size=4, capacity_window=4, capacity_factor=0.5)
SCORE = dict(n_experts=4, k=2, capacity_factor=0.5, priority="score")
MODELS = {
    "routed": dict(SMALL, smha=BOUND, uome=BOUND),
    "dense": dict(SMALL, attention="dense", mlp="dense", bias=True),
    "image": dict(
        CLASSES, stem="image", image=dict(height=6, width=8, channels=3, patch=2), smha=SCORE, mlp="dense",
        classifier=dict(pooling="cls", n_classes=5),
    ),
    "hierarchical": dict(CLASSES, attention="dense", uome=dict(SCORE, unit="hierarchical", patch_size=2)),
}  # fmt: skip
BATCHES = (1, 3, 17)

# Importing what is None fails. Every folder has its inputs beside it.
OUTSIDE = f"""
import runpy, sys
sys.modules.update(uoe_jax=None, flax=None, etils=None)
import numpy as np
for folder in sys.argv[1:]:
    try:
        ran = runpy.run_path(folder + "/load.py")
    except SystemExit as error:
        print("refused:", error.code)
        continue
    given = np.load(folder + ".npz")
    for b in {BATCHES}:
        inputs = [given[a["name"]][:b] for a in ran["header"]["inputs"]]
        np.save(f"{{folder}}.{{b}}.npy", ran["forward"](ran["weights"], *inputs))
"""


def config_of(name: str, **changes) -> Config:
    return from_dict({"model": {**MODELS[name], **changes}})


def params_of(config: Config, seed: int = 0):
    """Every weight drawn, so that routers choose and no bias is 0."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(functional(config.model)[0], jax.random.key(0))
    return jax.tree.map(lambda a: (0.3 * rng.normal(size=a.shape)).astype(a.dtype), shapes)


def inputs_of(config: Config, b: int) -> dict[str, np.ndarray]:
    rng, m = np.random.default_rng(1), config.model
    if m.stem == "image":
        images = rng.normal(size=(b, m.image.height, m.image.width, m.image.channels)).astype(
            np.float32
        )
        return {"inputs": images, "segments": np.ones((b, m.context_length), np.int32)}
    tokens = rng.integers(m.vocab_size, size=(b, m.context_length), dtype=np.int32)
    if m.task == "language":
        return {"tokens": tokens}
    lengths = rng.integers(1, m.context_length + 1, size=(b, 1))
    return {
        "inputs": tokens,
        "segments": (np.arange(m.context_length)[None] < lengths).astype(np.int32),
    }


def header_of(folder) -> tuple[dict, bytes]:
    data = (folder / "model.stablehlo").read_bytes()
    end = 16 + int.from_bytes(data[8:16], "little")
    assert data[:8] == b"UOESHLO1"
    return json.loads(data[16:end]), data[end:]


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """(the folder of all exports, what one process without this package printed of them); "damaged" has one wrong byte."""
    root = epath.Path(tmp_path_factory.mktemp("exports"))
    for name in MODELS:
        config = config_of(name)
        export_stablehlo(config, params_of(config), root / name)
        np.savez(root / f"{name}.npz", **inputs_of(config, max(BATCHES)))
    (root / "damaged").mkdir()
    for path in (root / "dense").iterdir():
        path.copy(root / "damaged" / path.name)
    program = bytearray((root / "dense" / "model.stablehlo").read_bytes())
    program[-len(header_of(root / "dense")[1]) // 2] ^= 1
    (root / "damaged" / "model.stablehlo").write_bytes(program)
    command = [sys.executable, "-c", OUTSIDE, *(str(root / name) for name in (*MODELS, "damaged"))]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return root, ran.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_program_computes_what_the_model_does_without_this_package(outside, name):
    config = config_of(name)
    model = functional(config.model)[1]
    wanted, stats = reference.jit(lambda p, *args: model(p)(*args))(
        params_of(config), *inputs_of(config, max(BATCHES)).values()
    )
    for routed in stats.values():  # capacity is felt
        assert 0 < routed.kept_N.sum() < routed.chosen_N.sum()
    wanted = np.asarray(wanted)
    assert wanted.std(axis=0).min() > 1e-2  # no two examples are alike
    for b in BATCHES:
        assert reference.error(np.load(outside[0] / f"{name}.{b}.npy"), wanted[:b]) < 1e-5
    assert outside[1][list(MODELS).index(name)] == f"logits {(2, *wanted.shape[1:])}"


@pytest.mark.slow
def test_the_example_refuses_a_damaged_program(outside):
    assert outside[1][len(MODELS) :] == [
        "refused: model.stablehlo is damaged: it does not have the checksum it was written with; copy it again"
    ]


def test_the_header_says_what_goes_in_and_comes_out(outside):
    header, blob = header_of(outside[0] / "image")
    assert header["sha256"] == hashlib.sha256(blob).hexdigest()
    assert header["versions"]["jax"] == jax.__version__ and header["platforms"] == [
        "cpu",
        "cuda",
        "tpu",
    ]
    assert header["inputs"] == [
        {"name": "inputs", "shape": ["b", 6, 8, 3], "dtype": "float32"},
        {"name": "segments", "shape": ["b", 12], "dtype": "int32"},
    ]
    assert header["outputs"] == [{"name": "logits", "shape": ["b", 5], "dtype": "float32"}]
    weights = safetensors.numpy.load_file(outside[0] / "image" / "model.safetensors")
    assert [p["name"] for p in header["parameters"]] == sorted(weights)
    for p in header["parameters"]:
        assert (p["shape"], p["dtype"]) == (list(weights[p["name"]].shape), "float32")
    assert weights["layers.attention.router.kernel"].shape == (2, 16, 4)
    tokens = [header_of(outside[0] / name)[0] for name in ("routed", "hierarchical")]
    assert tokens[0]["inputs"] == [{"name": "tokens", "shape": ["b", 32], "dtype": "int32"}]
    assert tokens[0]["outputs"] == [{"name": "logits", "shape": ["b", 32, 11], "dtype": "float32"}]
    assert [i["shape"] for i in tokens[1]["inputs"]] == [["b", 12], ["b", 12]]


def test_weights_survive_however_they_lie_and_nothing_is_cut_by_the_mesh_at_hand(tmp_path):
    """A view that lies transposed, and a weight cut over eight devices, of a model that computes in bfloat16."""
    config = config_of("routed", dtype="bfloat16")
    params, mesh = params_of(config), make_mesh(MeshConfig(fsdp=8))
    embedding, kernel = params["embedding"], params["layers"]["attention"]["router"]["kernel"]
    whole = params | {"embedding": np.asfortranarray(embedding)}
    assert not whole["embedding"].flags.c_contiguous
    whole["layers"]["attention"]["router"]["kernel"] = jax.device_put(
        kernel, jax.NamedSharding(mesh, jax.P(None, "fsdp"))
    )
    out = epath.Path(tmp_path / "out")
    with jax.set_mesh(mesh):
        export_stablehlo(config, whole, out)
    weights = safetensors.numpy.load_file(out / "model.safetensors")
    np.testing.assert_array_equal(weights["embedding"], embedding)
    np.testing.assert_array_equal(weights["layers.attention.router.kernel"], kernel)
    header, blob = header_of(out)
    assert (
        header["outputs"][0]["dtype"] == "float32"
        and jax.export.deserialize(bytearray(blob)).nr_devices == 1
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "load.py",
        "model.safetensors",
        "model.stablehlo",
    ]


def test_a_place_that_cannot_be_used_is_refused(tmp_path):
    config = config_of("dense")
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for name, why in {
        "there": "exists already; remove it, or give another directory",
        "link": "exists already; remove it, or give another directory",
        "file/where": "cannot be written (Not a directory); fix that, or give another directory",
    }.items():
        with pytest.raises(UserError) as caught:
            export_stablehlo(config, params_of(config), epath.Path(tmp_path / name))
        assert (
            str(caught.value) == f"--out={tmp_path / name}: {why}" and caught.value.exit_code == 2
        )
    with pytest.raises(
        UserError, match=r"^--out=gs://bucket/out: .*; give a local one, and copy that$"
    ):
        export_stablehlo(config, params_of(config), epath.Path("gs://bucket/out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "there"]


def test_what_is_not_as_it_was_written_is_not_left_there(tmp_path, monkeypatch):
    config = config_of("dense")
    params = params_of(config)

    def refused(why: str, module, name: str, faulty) -> None:
        with monkeypatch.context() as patch, pytest.raises(RunError) as caught:
            patch.setattr(module, name, faulty)
            export_stablehlo(config, params, epath.Path(tmp_path / "out"))
        assert why in str(caught.value) and caught.value.exit_code == 1
        assert not list(tmp_path.iterdir())

    save, write = safetensors.numpy.save, stablehlo._write
    other = {"embedding": params["embedding"] + np.float32(1e-6)}
    refused(
        "embedding in model.safetensors is not",
        safetensors.numpy,
        "save",
        lambda weights: save({**weights, **other}),
    )
    for file in ("model.stablehlo", "model.safetensors"):
        longer = lambda path, content: write(path, content + b"\n" * (path.name == file))  # noqa: E731
        refused(f"{file} is not what was written", stablehlo, "_write", longer)
    real = stablehlo.export.deserialize

    class Off:
        def __init__(self, blob):
            self.program = real(blob)

        def call(self, *args):
            return self.program.call(*args) * np.float32(1 + 1e-4)

    refused("the logits of model.stablehlo differ", stablehlo.export, "deserialize", Off)

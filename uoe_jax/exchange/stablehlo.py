"""A trained model as StableHLO with its weights, in a directory that jax alone can run.

`model.stablehlo` is MAGIC, the length of the header in 8 little-endian bytes, a header in JSON, and
what `jax.export` serialises: `forward(weights by dotted name, *inputs) -> logits`, for any batch
size, on one device of any platform. `model.safetensors` has the weights, `load.py` an example that
runs the model without this package. StableHLO is promised to be readable for half a year: it is for
running a model elsewhere, and the checkpoint is what lasts.
"""

import hashlib
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from jax import export
from jax.sharding import Mesh

import uoe_jax
from uoe_jax.config.schema import Config, MeshConfig
from uoe_jax.distributed.mesh import make_mesh
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import RunError
from uoe_jax.exchange.tensors import by_name, same_bits, whole_directory
from uoe_jax.train.step import Params, functional
from uoe_jax.train.task import task_of

MAGIC = b"UOESHLO1"
PLATFORMS = ("cpu", "cuda", "tpu")
PROGRAM, WEIGHTS, EXAMPLE = "model.stablehlo", "model.safetensors", "load.py"
Weights = dict[str, np.ndarray]  # by dotted name
_TOLERANCE = 1e-5  # of max|a-b| / max|b|

_LOAD = f'''\
"""Runs the model in this directory on one batch. Needs jax, flatbuffers, numpy and safetensors."""
import hashlib, json, pathlib, sys
import jax.export, numpy as np
from safetensors.numpy import load_file

here = pathlib.Path(__file__).parent
data = (here / "{PROGRAM}").read_bytes()
start = 16 + int.from_bytes(data[8:16], "little")  # of the program, behind the header
header = json.loads(data[16:start]) if data[:8] == {MAGIC!r} else {{"sha256": ""}}
if hashlib.sha256(data[start:]).hexdigest() != header["sha256"]:
    remedy = "it does not have the checksum it was written with; copy it again"
    sys.exit(f"{PROGRAM} is damaged: {{remedy}}")
forward = jax.jit(jax.export.deserialize(data[start:]).call)
weights = load_file(here / "{WEIGHTS}")
# header: inputs, outputs and parameters, with names, shapes and dtypes.
inputs = [np.ones([2 if n == "b" else n for n in a["shape"]], a["dtype"]) for a in header["inputs"]]
print("logits", forward(weights, *inputs).shape)
'''


def export_stablehlo(config: Config, params: Params, out: epath.Path) -> None:
    """Writes the directory `out`, whole or not at all; reads it back and compares.

    Takes host memory for some four times the weights, which may lie on any mesh. UserError if `out`
    exists or cannot be written, RunError if what is there does not compute what the model does.

    The program takes tokens int32 [b,L] of a language model and gives logits float32 [b,L,V]. Of a
    classifier it takes inputs, token ids int32 [b,L] or images float32 [b,height,width,channels]
    (bytes through `augment.as_floats`), and segments int32 [b,L], 1 at tokens and 0 at padding, and
    gives [b,n_classes]; of two inputs, [b,2,…] each.
    """
    with whole_directory(str(out), "--out") as place, jax.set_mesh(_one_device()):
        leaves, tree = by_name(params), jax.tree.structure(params)
        # Sorted, as jax takes dicts, and in C order: safetensors writes the bytes as they lie.
        on_host = {name: jax.device_get(leaves[name]) for name in sorted(leaves)}
        weights = {name: np.asarray(a, order="C") for name, a in on_host.items()}
        names, rebuild = list(leaves), functional(config.model)[1]

        def forward(weights: dict[str, jax.Array], *inputs: jax.Array) -> jax.Array:
            ours = jax.tree.unflatten(tree, [weights[name] for name in names])
            return rebuild(ours)(*inputs)[0]

        program, data = _program(config, forward, weights), safetensors.numpy.save(weights)
        files = {PROGRAM: program, WEIGHTS: data, EXAMPLE: _LOAD.encode()}
        for name, content in ticking(files.items()):
            _write(place / name, content)
        other = [name for name in files if (place / name).read_bytes() != files[name]]
        damage = f"{other[0]} is not what was written" if other else ""
        if damage := damage or _damage(config, files, weights, forward):
            remedy = "nothing is left there: try again, and report it if it stays so"
            raise RunError(f"--out={out}: {damage}; {remedy}")


def _one_device() -> Mesh:
    """Nothing is sharded. The CPU, as elsewhere equal programs may round apart, if jax has it."""
    try:
        devices = jax.local_devices(backend="cpu")
    except RuntimeError:
        devices = jax.local_devices()
    return make_mesh(MeshConfig(), devices=devices[:1])


def _inputs(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """What the model takes beside its weights, by name."""
    batch = task_of(config).shapes(config)
    (b,) = export.symbolic_shape("b")
    found = {}
    for name in ("tokens",) if config.model.task == "language" else ("inputs", "segments"):
        shape, dtype = batch[name]
        # Pixels are bytes in a batch, and the model takes floats.
        dtype = jnp.float32 if dtype == jnp.uint8 else dtype
        found[name] = jax.ShapeDtypeStruct((b, *shape[1:]), dtype)
    return found


def _program(config: Config, forward: Any, weights: Weights) -> bytes:
    """The content of `model.stablehlo`."""
    inputs = _inputs(config)
    jitted = jax.jit(forward, keep_unused=True)
    exported = export.export(jitted, platforms=PLATFORMS)(weights, *inputs.values())
    blob = bytes(exported.serialize())

    def described(name: str, a: Any) -> dict[str, Any]:
        shape = [n if isinstance(n, int) else str(n) for n in a.shape]
        return {"name": name, "shape": shape, "dtype": str(a.dtype)}

    header = {
        "sha256": hashlib.sha256(blob).hexdigest(),
        "versions": {"jax": jax.__version__, "uoe_jax": uoe_jax.__version__},
        "platforms": list(exported.platforms),
        "inputs": [described(name, a) for name, a in inputs.items()],
        "outputs": [described("logits", a) for a in exported.out_avals],
        "parameters": [described(name, a) for name, a in weights.items()],
    }
    text = json.dumps(header).encode()
    return MAGIC + len(text).to_bytes(8, "little") + text + blob


def _write(path: epath.Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # or a power cut may leave an empty file under the final name


def _damage(config: Config, files: dict[str, bytes], weights: Weights, forward: Any) -> str:
    """How the files differ from the model; empty where they do not."""
    there, none = safetensors.numpy.load(files[WEIGHTS]), np.array(None)
    for name in ticking({**weights, **there}):
        if not same_bits(weights.get(name, none), there.get(name, none)):
            return f"{name} in {WEIGHTS} is not the model's"
    inputs, program = _example(config), files[PROGRAM]
    wanted = np.asarray(jax.jit(forward)(weights, *inputs))
    blob = bytearray(program[16 + int.from_bytes(program[8:16], "little") :])
    got = np.asarray(export.deserialize(blob).call(there, *inputs))
    miss, most = np.abs(got - wanted).max(), np.abs(wanted).max()
    if miss <= _TOLERANCE * most:
        return ""
    return f"the logits of {PROGRAM} differ by {miss:.1e} from the model's, up to {most:.1e}"


def _example(config: Config) -> list[np.ndarray]:
    """Two random examples without padding."""
    rng, inputs = np.random.default_rng(0), []
    for name, a in _inputs(config).items():
        shape = (2, *a.shape[1:])
        if name == "segments":
            values = np.ones(shape)
        elif a.dtype == jnp.float32:
            values = rng.normal(size=shape)
        else:
            values = rng.integers(config.model.vocab_size, size=shape)
        inputs.append(values.astype(a.dtype))
    return inputs

"""A directory of weights in Hugging Face's layout: one safetensors file, or shards and an index.

Tensors are read one at a time and written one shard at a time, so a model is never held twice.
"""

import contextlib
import os
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
import numpy as np
import safetensors.numpy
from etils import epath
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open

from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import RunError, UserError, os_error_as
from uoe_jax.workdir import LiteralPath, is_remote, locate, read_json, write_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
# Files of the same weights in other formats; `consolidated` is Mistral's own layout.
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ot")
_COPIES = "consolidated"
_DOWNLOAD = "download the whole model again, or save it with save_pretrained"


class Tensors:
    """The tensors of a directory, by name; UserError where files are missing, damaged or differ."""

    def __init__(self, directory: epath.Path) -> None:
        self._place, suffixes = directory, (".safetensors", *_OTHER_FORMATS)
        there = (path.name for path in directory.iterdir() if path.suffix.lower() in suffixes)
        self._files = sorted(there)  # of weights
        index = read_json(directory / INDEX, _DOWNLOAD)
        self.file_of: dict[str, str]  # {tensor: file}
        if index is None:
            self.file_of = dict.fromkeys(self._open(FILE).keys(), FILE)
        else:
            self.file_of = self._read_index(index.get("weight_map"))
        self.passed_over = [name for name in self._files if name not in self.file_of.values()]
        for name in self.passed_over:  # either may be the right ones
            if name.endswith(".safetensors") and not name.startswith(_COPIES):
                why = f"holds {name} beside {min(self.file_of.values())}"
                remedy = "they may be of two models; take one of them away"
                raise UserError(f"--from={directory}: {why}, and {remedy}")

    def _read_index(self, weight_map: Any) -> dict[str, str]:
        """The index, checked against its files."""
        if not isinstance(weight_map, dict) or not weight_map:
            raise self._error(INDEX, "has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or os.path.basename(file) != file:
                why = f"says that {name} is in {file!r}, which is no file of this directory"
                raise self._error(INDEX, why)
        held = {file: set(self._open(file).keys()) for file in sorted({*weight_map.values()})}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise self._error(file, f"lacks {name}, which {INDEX} says it holds")
        for file, name in ((file, name) for file, names in held.items() for name in names):
            named = weight_map.get(name)
            if named is None:
                raise self._error(file, f"holds {name}, which {INDEX} does not name")
            if named != file and not same_bits(self.read(name, file), self.read(name, named)):
                why = f"holds another {name} than {named}, which {INDEX} names for it"
                raise self._error(file, why)
        return weight_map

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._open(self.file_of[name]).get_slice(name).get_shape())

    def read(self, name: str, file: str | None = None) -> np.ndarray:
        """A tensor in the dtype of its file."""
        return self._open(file or self.file_of[name]).get_tensor(name)

    def read_float32(self, name: str) -> np.ndarray:
        """A tensor of floats as float32; UserError where it is none, not finite or too large."""
        file = self.file_of[name]
        stored = self._open(file).get_slice(name).get_dtype()
        if stored not in ("F64", "F32", "F16", "BF16"):
            why = f"holds {name} as {stored}, and F64, F32, F16 and BF16 are read"
            raise self._error(file, why)
        array = self.read(name)
        if not np.isfinite(array).all():
            raise self._error(file, f"holds numbers in {name} that are not finite")
        held, lost = cast(array, np.dtype(np.float32))
        if len(lost):
            raise self._error(file, f"holds {lost[0]:.6g} in {name}, which float32 cannot hold")
        return held

    def _open(self, file: str) -> Any:
        # Opened for every read: closing gives back the memory of the mapped file.
        if not (self._place / file).is_file():
            others = [name for name in self._files if not name.endswith(".safetensors")]
            why = f" ({others[0]} is there, which is not read)" if others else ""
            raise self._error(file, f"is missing{why}")
        try:
            return safe_open(str(self._place / file), "numpy")
        except (SafetensorError, OSError) as error:
            raise self._error(file, f"cannot be read, cut off perhaps ({error})") from error

    def _error(self, file: str, why: str) -> UserError:
        return UserError(f"--from={self._place}: {file} {why}; {_DOWNLOAD}")


class Tensor(NamedTuple):
    """A tensor to write; `make` gives its values, of that shape, when they are needed."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write(
    directory: epath.Path,
    tensors: Iterable[Tensor],
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    lossy: bool = False,
) -> int:
    """Writes tensors into files of at most `shard_bytes` (or of one tensor); reads every file back.

    Returns how many numbers overflow or underflow in `dtype`. They become infinity or 0 if `lossy`,
    else a UserError. RunError where what was read is not what was written.
    """
    kind, named, n_lost = np.dtype(dtype), {t.name: t for t in tensors}, 0
    split = split_state_dict_into_shards_factory(
        named,
        get_storage_size=lambda t: int(np.prod(t.shape)) * kind.itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        path, held = directory / file, {}
        for name in ticking(names):
            held[name], lost = cast(named[name].make(), kind)
            if len(lost) and not lossy:
                becomes = f"{lost[0]:.6g}, which becomes {cast(lost[:1], kind)[0][0]} in it"
                why = f"{name} holds {becomes} ({len(lost)} such numbers there)"
                remedy = "give --dtype=float32, or --lossy to go on"
                raise UserError(f"--dtype={kind}: {why}; {remedy}")
            n_lost += len(lost)
        path.touch()
        mode = os.stat(path).st_mode
        safetensors.numpy.save_file(held, str(path), metadata={"format": "pt"})
        os.chmod(path, mode)  # safetensors lets the owner alone read it
        remedy = "write it again, on another disk perhaps"
        with safe_open(str(path), "numpy") as there:
            if set(there.keys()) != set(held):
                raise RunError(f"{path}: does not hold the tensors that were written; {remedy}")
            for name, array in ticking(held.items()):
                if not same_bits(there.get_tensor(name), array):
                    raise RunError(f"{path}: {name} is not what was written; {remedy}")
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / INDEX, index)
    return n_lost


def cast(array: np.ndarray, kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(the array in another dtype, its numbers that overflow or underflow there)."""
    array = np.asarray(array)
    with np.errstate(over="ignore", under="ignore"):
        # In C order: safetensors writes the bytes of a transposed view as they lie in memory.
        held = np.asarray(array, kind, order="C")
    if kind == array.dtype:
        return held, array.ravel()[:0]
    return held, array[(np.isfinite(array) & ~np.isfinite(held)) | ((held == 0) & (array != 0))]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype) and a.tobytes() == b.tobytes()


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of parameters by their dotted names, such as `layers.mlp.w_up`."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@contextlib.contextmanager
def whole_directory(path: str, option: str) -> Iterator[epath.Path]:
    """An empty directory to write in, renamed to `path` at the end; removed where anything fails.
    Missing directories around it stay. UserError where `path` exists or cannot be written."""
    out = LiteralPath(os.path.abspath(locate(path, option)))
    if is_remote(path):
        why = "a directory must be renamed, which gs:// cannot"
        raise UserError(f"{option}={path}: {why}; give a local one, and copy that")
    if os.path.lexists(out):
        raise UserError(f"{option}={path}: exists already; remove it, or give another directory")
    temporary = out.parent / f".{out.name}.{os.getpid()}"
    problem, remedy = f"{option}={path}: cannot be written", "fix that, or give another directory"
    try:
        with os_error_as(UserError, problem, remedy):
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(out)
    finally:
        if temporary.exists():
            temporary.rmtree()

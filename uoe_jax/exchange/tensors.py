"""A directory of weights as Hugging Face has it: `model.safetensors`, or shards beside `model.safetensors.index.json`.

Tensors are read one at a time, and written a shard at a time, so that a model is never held twice.
"""

from __future__ import annotations

import os
from typing import Any, Callable, Iterable, NamedTuple

import ml_dtypes  # noqa: F401  teaches numpy bfloat16
import numpy as np
import safetensors.numpy
from etils import epath
from safetensors import SafetensorError, safe_open

from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import RunError, UserError
from uoe_jax.train.fingerprint import leaf_name
from uoe_jax.workdir import read_json, write_json

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
# Of the same weights in other formats, as they are published beside each other; consolidated is Mistral's own layout.
_OTHER_FORMATS, _COPIES = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ot"), "consolidated"
_DOWNLOAD = "download the whole model again, or save it with save_pretrained"


class Tensors:
    """The tensors of a directory, by name.

    Raises:
      UserError: there are none, a shard is missing, or a file is cut off or no safetensors.
    """

    def __init__(self, directory: epath.Path, option: str = "--from") -> None:
        self._place, self._option = directory, option
        index = read_json(directory / INDEX, _DOWNLOAD)
        self._file_of: dict[str, str]
        if index is None:
            self._file_of = dict.fromkeys(self._open(FILE).keys(), FILE)
            self._check_other_files()
            return
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise self._error(INDEX, "has no weight_map")
        for name, file in weight_map.items():
            if not isinstance(file, str) or os.path.basename(file) != file:
                raise self._error(
                    INDEX, f"says that {name} is in {file!r}, which is no file of this directory"
                )
        self._file_of = weight_map
        held = {file: set(self._open(file).keys()) for file in sorted(set(self._file_of.values()))}
        for name, file in self._file_of.items():
            if name not in held[file]:
                raise self._error(file, f"lacks {name}, which {INDEX} says it holds")
        for file, names in held.items():
            for name in names:
                self._check_unnamed(name, file)
        self._check_other_files()

    def _check_unnamed(self, name: str, file: str) -> None:
        """UserError where a shard holds a tensor that the index does not name there, unless it is a copy."""
        named = self._file_of.get(name)
        if named is None:
            raise self._error(file, f"holds {name}, which {INDEX} does not name")
        if (
            named != file
            and self._open(file).get_tensor(name).tobytes() != self.read(name).tobytes()
        ):
            raise self._error(
                file, f"holds another {name} than {named}, which {INDEX} names for it"
            )

    def _check_other_files(self) -> None:
        """UserError where other files of weights lie in the directory, of which nobody can say which are right."""
        named = set(self._file_of.values())
        for name in self._others():
            if name not in named and name.endswith(".safetensors") and not name.startswith(_COPIES):
                raise UserError(
                    f"{self._option}={self._place}: holds {name} beside {min(named)}, and nothing says that both are of one "
                    "model; take one of them away"
                )

    def passed_over(self) -> list[str]:
        """Names of files of weights in other formats, which are not read."""
        return [name for name in self._others() if name not in self._file_of.values()]

    def _others(self) -> list[str]:
        return sorted(
            p.name
            for p in self._place.iterdir()
            if p.suffix.lower() in (".safetensors", *_OTHER_FORMATS)
        )

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, without reading it."""
        return tuple(self._open(self._file_of[name]).get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """A tensor in the dtype it has there."""
        return self._open(self._file_of[name]).get_tensor(name)

    def read_float32(self, name: str) -> np.ndarray:
        """A tensor of floating point numbers as float32; UserError where they are none, not finite, or do not fit."""
        stored = self._open(self._file_of[name]).get_slice(name).get_dtype()
        if stored not in ("F64", "F32", "F16", "BF16"):
            raise self._error(
                self._file_of[name],
                f"holds {name} as {stored}, and F64, F32, F16 and BF16 are read",
            )
        array = self.read(name)
        if not np.isfinite(array).all():
            raise self._error(self._file_of[name], f"holds numbers in {name} that are not finite")
        held, lost = cast(array, np.dtype(np.float32))
        if len(lost):
            raise self._error(
                self._file_of[name], f"holds {lost[0]:.6g} in {name}, which float32 cannot hold"
            )
        return held

    def _open(self, file: str) -> Any:
        # Opened for every read: what a mapped file had in memory is given back with it.
        if not (self._place / file).is_file():
            others = [name for name in self._others() if not name.endswith(".safetensors")]
            why = (
                f"is missing ({others[0]} is there, which is not read)" if others else "is missing"
            )
            raise self._error(file, why)
        try:
            return safe_open(str(self._place / file), "numpy")
        except (SafetensorError, OSError) as error:
            raise self._error(file, f"cannot be read, cut off perhaps ({error})") from error

    def _error(self, file: str, why: str) -> UserError:
        return UserError(f"{self._option}={self._place}: {file} {why}; {_DOWNLOAD}")


class Tensor(NamedTuple):
    """A tensor to write. make: gives it, of that shape, when its turn has come."""

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
    """Writes tensors into files of at most `shard_bytes` (or of one tensor), and reads every file back.

    lossy: write numbers that overflow or underflow in `dtype` as infinity or 0.

    Returns:
      How many numbers did so.

    Raises:
      UserError: there is such a number, and not `lossy`.
      RunError: what was read is not what was written.
    """
    n_lost = 0
    kind = np.dtype(dtype)
    shards: list[list[Tensor]] = [[]]
    size = total = 0
    for tensor in tensors:
        nbytes = int(np.prod(tensor.shape)) * kind.itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + nbytes, total + nbytes
    files = (
        [FILE]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, shard in zip(files, shards):
        held = {}
        for t in ticking(shard):
            held[t.name], lost = cast(t.make(), kind)
            if len(lost) and not lossy:
                raise UserError(
                    f"--dtype={kind}: {t.name} holds {lost[0]:.6g}, which becomes {cast(lost[:1], kind)[0][0]} in it "
                    f"({len(lost)} such numbers there); give --dtype=float32, or --lossy to go on"
                )
            n_lost += len(lost)
        safetensors.numpy.save_file(held, str(directory / file), metadata={"format": "pt"})
        os.chmod(
            directory / file, 0o666 & ~_umask()
        )  # it makes files that their owner alone can read
        _compare(directory / file, held)
    if len(shards) > 1:
        where = {t.name: file for file, shard in zip(files, shards) for t in shard}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return n_lost


def cast(array: np.ndarray, kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(the array in another dtype, its numbers that overflow or underflow there)."""
    array = np.asarray(array)
    with np.errstate(over="ignore", under="ignore"):
        # In C's order: of a transposed view safetensors writes the bytes as they lie in memory, with no error.
        held = np.asarray(array, kind, order="C")
    if kind == array.dtype:
        return held, array.ravel()[:0]
    return held, array[(np.isfinite(array) & ~np.isfinite(held)) | ((held == 0) & (array != 0))]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _compare(file: epath.Path, held: dict[str, np.ndarray]) -> None:
    """RunError unless a file holds exactly these."""
    with safe_open(str(file), "numpy") as there:
        if set(there.keys()) != set(held):
            raise RunError(
                f"{file}: does not hold the tensors that were written; write it again, on another disk perhaps"
            )
        for name, array in ticking(held.items()):
            found = there.get_tensor(name)
            same = found.shape == array.shape and found.dtype == array.dtype
            if not same or found.tobytes() != array.tobytes():
                raise RunError(
                    f"{file}: {name} is not what was written; write it again, on another disk perhaps"
                )


def dotted(path: tuple[Any, ...]) -> str:
    """The name of a leaf of a tree of parameters, such as `layers.mlp.w_up`."""
    return leaf_name(path).replace("/", ".")

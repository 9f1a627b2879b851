"""The collectives of a compiled program, read from its HLO text: arrays, mesh axes, number of runs.

The text is that of `compiled.as_text()`. Devices are numbered as in the mesh, the last axis
fastest. Replica groups are read in every form that jax 0.10 to 0.12 prints: `{{0,2},{1,3}}`,
`[2,4]<=[4,2]T(1,0)` and `mesh['x'=2,'y'=4] {'x'}`.
"""

import functools
import math
import re
from typing import Mapping, NamedTuple

import numpy as np

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Array(NamedTuple):
    """One device's part of an array, as HLO writes it: dtype `f32`, `bf16`, `pred`, …"""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)  # pred has none, and is a byte
        return self.size * max(int(bits[0]) // 8, 1) if bits else self.size

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Collective(NamedTuple):
    """One array moved by a collective; a tuple gives one entry for each of its arrays."""

    kind: str  # one of KINDS
    operand: Array  # per device, as the result
    result: Array
    axes: tuple[str, ...]  # the mesh axes along which the devices of a group differ
    group: int  # devices that exchange (of a collective-permute: 2)
    times: int  # runs in a step: the product of the trip counts of the loops around it
    counted: bool  # False where a loop around it has no known trip count, which is taken as 1
    op_name: str  # its place, such as 'jit(f)/transpose(jvp())/while/body/psum' (the backward pass)
    name: str  # of the instruction; the arrays of one tuple share it

    @property
    def bytes(self) -> int:
        """Of the whole array, as one device has it before a reduce-scatter or after the others."""
        return max(self.operand.bytes, self.result.bytes)

    @property
    def sent(self) -> float:
        """Bytes one device sends in one run, in a ring; an all-reduce scatters and gathers."""
        if self.kind == "collective-permute":
            return self.bytes
        return (2 if self.kind == "all-reduce" else 1) * self.bytes * (self.group - 1) / self.group


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_EXCHANGE = re.compile(r"(?:source_target_pairs|replica_groups)=(.*?)(?:, [a-z_]+=(?!\()|$)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled module, in the order of the text, `compiled.as_text()`.
    mesh_shape: axis name -> size, in the order the mesh was made with."""
    computations, entry = _computations(text)
    types = {i.name: i.type for body in computations.values() for i in body}
    found, runs = [], _runs(computations, entry)
    for computation, body in computations.items():
        for i in body:
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS or computation not in runs:
                continue
            operands = [_arrays(types.get(n, ""))[0] for n in _operand_names(i.rest)]
            results, n = _arrays(i.type), len(operands)
            # A started all-gather or permute gives (operands, results, …), an all-reduce results.
            if i.opcode.endswith("-start") and kind != "all-reduce" and len(results) > n:
                results = results[n : 2 * n]
            if kind == "all-to-all" and n > 1:  # as a tuple: one part for each device
                firsts = operands[0], results[0]
                operands, results = ([a._replace(shape=(n, *a.shape))] for a in firsts)
            groups = _EXCHANGE.search(i.rest)
            axes, group = _axes(groups[1] if groups else "{}", tuple(mesh_shape.items()))
            op_name = re.search(r'op_name="([^"]*)"', i.rest)
            rest = *runs[computation], op_name[1] if op_name else "", i.name
            for operand, result in zip(operands, results, strict=True):
                found.append(Collective(kind, operand, result, axes, group, *rest))
    return found


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """(instructions by computation, name of the entry)."""
    out: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if not line.startswith((" ", "}", "HloModule")) and (head := _COMPUTATION.match(line)):
            current = out.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            current.append(_Instruction(*match.groups()))
    if not entry:
        raise ValueError("this is no text of an HLO module: it has no ENTRY computation")
    return out, entry


def _runs(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, tuple[int, bool]]:
    """Runs of each computation in a run of the module, and whether they are known."""
    runs = {entry: (1, True)}
    for caller in reversed(computations):  # the text has every computation before its callers
        for i in computations[caller] if caller in runs else ():
            trips = _TRIPS.search(i.rest) if i.opcode == "while" else None
            known = runs[caller][1] and (i.opcode != "while" or trips is not None)
            for role, called in _CALLED.findall(i.rest):
                n = int(trips[1]) if trips and role == "body" else 1
                for name in re.findall(r"[\w.-]+", called):
                    times, counted = runs.get(name, (0, True))
                    runs[name] = times + runs[caller][0] * n, counted and known
    return runs


def _operand_names(rest: str) -> list[str]:
    """Names in `%a, f32[2]{0:T(8)} %b), attributes…`."""
    operands = re.split(r"\)(?:,|$)", rest)[0]
    return re.findall(r"%([\w.-]+)", operands) or re.findall(r"([\w.-]+)(?:,|$)", operands)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _arrays(type_text: str) -> list[Array]:
    """Arrays of `f32[2,3]{1,0}`, or of a tuple of such, flattened."""
    return [Array(dtype, tuple(_numbers(dims))) for dtype, dims in _ARRAY.findall(type_text)]


@functools.lru_cache(maxsize=1024)
def _axes(written: str, mesh: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    """(axes that vary within a group, devices in a group)."""
    groups, sizes = _groups(written), [size for _, size in mesh]
    if not groups.size:  # all devices
        groups = np.arange(math.prod(sizes))[None]
    places = zip(mesh, np.unravel_index(groups, sizes))
    return tuple(name for (name, _), at in places if np.ptp(at, axis=1).any()), groups.shape[1]


def _groups(written: str) -> np.ndarray:
    """Devices that exchange with each other, a row for each group; none means all of them."""
    if written.startswith("mesh["):
        return _mesh_groups(written)
    if written.startswith("["):
        shape, order = written.split("<=")
        return _iota(order).reshape(_numbers(shape))
    return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", written)])


def _mesh_groups(written: str) -> np.ndarray:
    """Of `mesh['x'=2,'y'=4] {'x'}`, whose devices may be in another order: `, device_ids=(…)`."""
    match = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? ?\{(.*)\}", written)
    if match is None:  # no axis at all: every device by itself
        return np.array([[0]])
    sizes = {name: int(n) for name, n in re.findall(r"['\"]([^'\"]*)['\"]=(\d+)", match[1])}
    ids = _iota(match[2]) if match[2] else np.arange(math.prod(sizes.values()))
    # An axis may be used in part: 'x':(2)4 is 4 of it, inside the outermost 2.
    axes = re.findall(r"['\"]([^'\"]*)['\"](?::\((\d+)\)(\d+))?", match[3])
    used = {name: (int(outer or 1), int(part or sizes[name])) for name, outer, part in axes}
    shape: list[int] = []
    for name, size in sizes.items():
        outer, part = used.get(name, (1, 1))
        shape += [outer, part, size // (outer * part)]
    parts = range(1, len(shape), 3)
    in_groups = np.moveaxis(ids.reshape(shape), parts, range(-len(parts), 0))
    return in_groups.reshape(-1, math.prod(shape[1::3]))


def _iota(order: str) -> np.ndarray:
    """Devices of `[4,2]T(1,0)`, counted in that shape and transposed; or of a list, `[0,2,1,3]`."""
    dims, _, axes = order.partition("T")
    sizes = _numbers(dims)
    if not axes and 0 in sizes:
        return np.array(sizes)
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(_numbers(axes)) if axes else ids).ravel()

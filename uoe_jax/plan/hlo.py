"""The collectives of a compiled program, read from its HLO text: arrays, mesh axes, number of runs.

The text is that of `compiled.as_text()`. Devices are numbered as in the mesh, the last axis
fastest. Replica groups are read in every form that jax 0.10 to 0.12 prints: `{{0,2},{1,3}}`,
`[2,4]<=[4,2]T(1,0)` and `mesh['x'=2,'y'=4] {'x'}`.
"""

import functools
import itertools
import math
import re
from typing import Mapping, NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
Groups = tuple[tuple[int, ...], ...]


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
    """One array moved by a collective; a tuple gives one entry for each of its arrays.

    Attributes:
      kind: one of KINDS.
      operand, result: per device.
      axes: the mesh axes along which the devices of a group differ, in the mesh's order.
      group: devices that exchange (of a collective-permute: 2).
      times: runs in a step: the product of the trip counts of the loops around it.
      counted: False where a loop around it has no known trip count, which is then taken as 1.
      op_name: its place in the program, such as 'jit(f)/transpose(jvp())/while/body/psum'.
      name: of the instruction; the arrays of one tuple share it.
    """

    kind: str
    operand: Array
    result: Array
    axes: tuple[str, ...]
    group: int
    times: int
    counted: bool
    op_name: str
    name: str

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

    @property
    def backward(self) -> bool:
        """Whether it is of the backward pass, recomputation included."""
        return "transpose(" in self.op_name

    @property
    def recomputed(self) -> bool:
        return "rematted_computation" in self.op_name


class _Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    rest: str  # operands and attributes


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_CALLED_LIST = re.compile(r"\b(?:called_computations|branch_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives of a compiled module, in the order of the text.

    Args:
      text: `compiled.as_text()`.
      mesh_shape: axis name -> size, in the order the mesh was made with.
    """
    computations, entry = _computations(text)
    runs = _runs(computations, entry)
    types = {i.name: i.type for body in computations.values() for i in body}
    found = []
    for computation, body in computations.items():
        for i in body:
            kind = i.opcode.removesuffix("-start")
            if kind not in KINDS or computation not in runs:
                continue
            operands = [_arrays(types.get(n, ""))[0] for n in _operand_names(i.rest)]
            arrays = _arrays(i.type)
            # A started all-gather or permute gives (operands, results, …), an all-reduce results.
            n, started = len(operands), i.opcode.endswith("-start") and kind != "all-reduce"
            results = arrays[n : 2 * n] if started and len(arrays) > n else arrays
            if kind == "all-to-all" and n > 1:  # as a tuple: one part for each device
                operands, results = ([_stacked(a)] for a in (operands, results))
            axes, group = _axes(i.rest, tuple(mesh_shape.items()))
            op_name = re.search(r'op_name="([^"]*)"', i.rest)
            rest = *runs[computation], op_name[1] if op_name else "", i.name
            for operand, result in zip(operands, results, strict=True):
                found.append(Collective(kind, operand, result, axes, group, *rest))
    return found


def _stacked(arrays: list[Array]) -> Array:
    return arrays[0]._replace(shape=(len(arrays), *arrays[0].shape))


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
    callers: dict[str, list[tuple[str, int, bool]]] = {}
    for caller, body in computations.items():
        for i in body:
            if "=" not in i.rest:
                continue
            trips = _TRIPS.search(i.rest) if i.opcode == "while" else None
            known = i.opcode != "while" or trips is not None
            called = _CALLED.findall(i.rest)
            for names in _CALLED_LIST.findall(i.rest):
                called += [("", name.strip(" %")) for name in names.split(",")]
            for role, name in called:
                n = int(trips[1]) if trips and role == "body" else 1
                callers.setdefault(name, []).append((caller, n, known))

    @functools.cache
    def count(name: str) -> tuple[int, bool]:
        if name == entry:
            return 1, True
        times, counted = 0, True
        for caller, trips, known in callers.get(name, ()):
            outer, outer_known = count(caller)
            times, counted = times + outer * trips, counted and known and outer_known
        return times, counted

    return {name: found for name in computations if (found := count(name))[0]}


def _operand_names(rest: str) -> list[str]:
    """Names in `%a, f32[2]{0} %b), attributes…`; a type before a name may have parentheses."""
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    operands = rest[: end - 1]
    return re.findall(r"%([\w.-]+)", operands) or re.findall(r"([\w.-]+)(?:,|$)", operands)


def _arrays(type_text: str) -> list[Array]:
    """Arrays of `f32[2,3]{1,0}`, or of a tuple of such, flattened."""

    def sizes(dims: str) -> tuple[int, ...]:
        return tuple(int(n.lstrip("<=")) for n in dims.split(",") if n)

    return [Array(dtype, sizes(dims)) for dtype, dims in _ARRAY.findall(type_text)]


def _axes(rest: str, mesh: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    """(axes that vary within a group, devices in a group)."""
    pairs = re.search(r"source_target_pairs=(\{\{.*?\}\}|\{\})", rest)
    written = re.search(r"replica_groups=(.*?)(?:, [a-z_]+=(?!\()|$)", rest)
    return _varying(pairs[1] if pairs else written[1] if written else "{}", mesh)


@functools.lru_cache(maxsize=1024)
def _varying(written: str, mesh: tuple[tuple[str, int], ...]) -> tuple[tuple[str, ...], int]:
    sizes = [size for _, size in mesh]
    groups = _groups(written) or (tuple(range(math.prod(sizes))),)
    place = list(itertools.product(*map(range, sizes)))

    def varies(a: int) -> bool:
        return any(len({place[device][a] for device in group}) > 1 for group in groups)

    axes = tuple(name for a, (name, _) in enumerate(mesh) if varies(a))
    return axes, max(map(len, groups))


def _groups(written: str) -> Groups:
    """Devices that exchange with each other; () means all of them."""
    if written.startswith("mesh["):
        return _mesh_groups(written)
    if written.startswith("["):
        shape, order = written.split("<=")
        rows, columns = map(int, shape.strip("[]").split(","))
        ids = _iota(order)
        return tuple(tuple(ids[r * columns : (r + 1) * columns]) for r in range(rows))
    found = re.findall(r"\{([\d,]+)\}", written)
    return tuple(tuple(map(int, group.split(","))) for group in found)


def _mesh_groups(written: str) -> Groups:
    """Of `mesh['x'=2,'y'=4] {'x'}`, whose devices may be in another order: `, device_ids=(…)`."""
    match = re.match(r"mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? ?\{(.*)\}", written)
    if match is None:  # no axis at all: every device by itself
        return ((0,),)
    named = [(name, int(n)) for name, n in re.findall(r"['\"]([^'\"]*)['\"]=(\d+)", match[1])]
    ids = _iota(match[2]) if match[2] else list(range(math.prod(size for _, size in named)))
    # An axis may be used in part: 'x':(2)4 is 4 of it, inside the outermost 2.
    axes = re.findall(r"['\"]([^'\"]*)['\"](?::\((\d+)\)(\d+))?", match[3])
    used = {name: (int(outer or 1), int(size or 0)) for name, outer, size in axes}
    by_rest: dict[tuple[int, ...], list[int]] = {}
    for device, place in zip(ids, itertools.product(*(range(size) for _, size in named))):
        rest = []
        for (name, size), at in zip(named, place):
            outer, part = used.get(name, (1, 1))
            inner = size // (outer * (part or size))
            rest += [at // inner // (part or size), at % inner]
        by_rest.setdefault(tuple(rest), []).append(device)
    return tuple(map(tuple, by_rest.values()))


def _iota(order: str) -> list[int]:
    """Devices of `[4,2]T(1,0)`, counted in that shape and transposed; or of a list, `[0,2,1,3]`."""
    dims, _, permutation = order.partition("T")
    sizes = [int(n) for n in dims.strip("[] ").split(",")]
    if not permutation:
        return sizes if 0 in sizes else list(range(math.prod(sizes)))
    axes = [int(n) for n in permutation.strip("() ").split(",")]
    strides = [math.prod(sizes[a + 1 :]) for a in range(len(sizes))]
    places = itertools.product(*(range(sizes[a]) for a in axes))
    return [sum(i * strides[a] for i, a in zip(place, axes)) for place in places]

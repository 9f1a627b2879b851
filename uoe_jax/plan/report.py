"""A plan as text for the user, and as JSON values."""

import math
from typing import Any, Iterator

from uoe_jax.models.count import parameters
from uoe_jax.plan.hardware import CPU, HARDWARE, Hardware, Range
from uoe_jax.plan.make import Plan
from uoe_jax.plan.predict import rows

PARTS = dict(products="matrix products", attention="attention", memory="memory traffic")
PARTS |= dict(experts="reductions over expert", weights="weights and gradients")


def as_json(plan: Plan) -> dict[str, Any]:
    """All of `Plan`, without the configuration and single collectives; bytes, seconds, FLOPs."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: plain(v) for name, v in value._asdict().items() if name not in left_out}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    left_out, c = ("config", "collectives"), plan.config
    found = plain(plan)
    found["compiled"]["peak"] = plan.compiled.peak
    found |= {"mesh": c.mesh.shape, "parameters": parameters(c.model)}
    return found | {"warnings": list(warnings(plan))}


def warnings(plan: Plan) -> Iterator[str]:
    """What to know before paying for the run; a sentence each."""
    m, shape, accelerator = plan.config.model, plan.config.mesh.shape, plan.hardware != CPU
    for block, reduction, compute in plan.prediction.reductions if plan.prediction else ():
        if reduction > compute:
            why = f"takes {_time(reduction)}, longer than {_time(compute)} of work before it"
            remedy = "make mesh.expert smaller and data or fsdp larger"
            yield f"the reduction over expert={shape['expert']} after {block} {why}: {remedy}"
    if plan.least is not None:
        mesh, needed = plan.least
        more = f"more train.accumulation (now {plan.config.train.accumulation})"
        remedy = f"take more devices, {more} or model.remat='block' (now {m.remat!r})"
        least = f"{_mesh(mesh)} needs least, {_gb(needed)}"
        yield f"no mesh of these devices fits; {least}: {remedy}"
    if accelerator and m.dtype == "float32":
        remedy = "set bfloat16, or expect several times as long"
        yield f"model.dtype='float32', and the times are those of 16-bit products: {remedy}"
    if accelerator and m.remat in ("none", "dots"):
        what = f"model.remat={m.remat!r} leaves to the compiler what is kept"
        yield f"{what}: memory is less certain than with 'slots' or 'block'"
    if not all(c.counted for c in plan.compiled.collectives):
        yield "some collectives are in loops of unknown length and are counted once"


def text(plan: Plan, name: str) -> str:
    """The plan for the user; `name` is the configuration's."""
    c, m, shape = plan.config, plan.config.model, plan.config.mesh.shape
    n, hardware = math.prod(shape.values()), HARDWARE.get(plan.hardware)
    batch, held = f"{c.train.accumulation} x {rows(c, shape)} rows a device", parameters(m)
    tokens = c.train.batch_size * m.rows_per_example * m.context_length
    size = f"{held / 1e9:.3g} B" if held >= 1e9 else f"{held / 1e6:.3g} M"
    lines = [
        f"{name}: {size} parameters, {m.dtype}, remat={m.remat}, {tokens:,} tokens a step",
        f"{n} x {plan.hardware}, mesh {_mesh(shape)}: {batch}",
        *("", "Memory of one device", *_memory(plan, n, hardware)),
        *("", "Sent by one device in a step", *_sent(plan)),
    ]
    if hardware is not None:
        lines += ["", "A step, best to worst", *_step(plan, hardware, tokens)]
    lines.append("")
    if plan.suggestion is not None:
        s = plan.suggestion
        mesh = ",".join(f"{axis}={size}" for axis, size in s.mesh.items() if size > 1)
        beside = f"where this mesh is counted at {_range(s.given_step)}"
        lines.append(f"suggested: --mesh={mesh}: {_range(s.step)} and {_gb(s.peak)}, {beside}")
    elif hardware is not None and plan.least is None:
        lines.append("No other mesh of these devices is counted to be faster and to fit.")
    return "\n".join([*lines, *(f"warning: {sentence}" for sentence in warnings(plan))]).rstrip()


def _memory(plan: Plan, n: int, hardware: Hardware | None) -> Iterator[str]:
    m, compiled, e = plan.config.model, plan.compiled, plan.expected
    ends = "the vocabulary scores" if m.task == "language" else "the inputs"
    working = f"{_gb(max(e.layer, e.ends))} of {'a layer' if e.layer > e.ends else ends}"
    room = dtype = ""
    if hardware is not None:
        room = f" of {_gb(hardware.memory)}: {'fits' if plan.fits else 'does not fit'}"
        dtype = "float32 "
    yield from _table(
        ("parameters", _gb(compiled.parameters)),
        ("optimizer", _gb(compiled.optimizer)),
        ("gradients", _gb(e.gradients)),
        ("activations kept", _gb(e.kept)),
        ("working set", working),
        ("peak", _gb(plan.peak) + room),
    )
    how = f"Compiled for {n} host devices in {compiled.seconds:.0f} s (jax {compiled.jax})"
    yield f"  {how}: {_gb(compiled.peak)}, of it {_gb(compiled.temporary)} temporary."
    counted = _gb(plan.counted.temporary)
    yield f"  Counted for the same {dtype}step: {counted} temporary; factor {plan.factor:.2f}."
    if hardware is not None:
        kernel = "a kernel of attention that holds no scores"
        yield f"  Assumed: {m.dtype}, and {kernel}; tiles of them take {_gb(plan.scores)} more."


def _sent(plan: Plan) -> list[str]:
    found = []
    for t in plan.traffic:
        time = f", {_range(t.seconds)}{', slow network' * t.slow}" if t.seconds else ""
        sent = f"{_gb(t.sent)} in {t.runs} runs{time}"
        found.append((f"{t.kind} over {', '.join(t.axes)}", sent))
    return _table(*found) or ["  nothing"]


def _step(plan: Plan, hardware: Hardware, tokens: int) -> list[str]:
    p = plan.prediction
    assert p is not None  # as for every accelerator
    executed = "recomputation included, attention as a flash kernel does it"
    speed = f"{tokens / p.step[1]:.3g} to {tokens / p.step[0]:.3g} tokens/s"
    return [
        *_table(
            ("model FLOPs", f"{p.flops:.3g}"),
            ("executed FLOPs", f"{p.executed:.3g}, {executed}"),
            *((PARTS[part], _range(seconds)) for part, seconds in p.parts.items() if seconds[1]),
            ("time", f"{_range(p.step)}; {speed}"),
            ("MFU", f"{p.mfu[0]:.0%} to {p.mfu[1]:.0%} of {hardware.flops / 1e12:.0f} TFLOP/s"),
        ),
        f"  {plan.hardware}: {hardware.source}.",
        "  A roofline from what such devices are known to reach; how near it came on an H200: "
        "docs/plan.md.",
    ]


def _table(*pairs: tuple[str, str]) -> list[str]:
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in pairs]


def _mesh(shape: dict[str, int]) -> str:
    sizes = ", ".join(f"{axis}={size}" for axis, size in shape.items() if size > 1)
    return sizes or "of one device"


def _gb(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e8 else f"{n / 1e6:.3g} MB"


def _time(seconds: float) -> str:
    unit, size = ("s", 1) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    return f"{seconds / size:.3g} {unit}" if seconds >= 1e-6 else "under 1 µs"


def _range(seconds: Range) -> str:
    return " to ".join(map(_time, seconds))

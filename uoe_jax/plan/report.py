"""A plan in words, for a person, and as plain values, for a machine."""

from __future__ import annotations

import math
from typing import Any, Iterator

from uoe_jax.models.count import parameters
from uoe_jax.plan.hardware import CPU, HARDWARE, Range
from uoe_jax.plan.make import Plan
from uoe_jax.plan.predict import rows

PARTS = {
    "products": "matrix products",
    "attention": "attention",
    "memory": "memory traffic",
    "experts": "reductions over expert",
    "weights": "weights and gradients",
}


def as_json(plan: Plan) -> dict[str, Any]:
    """All of `Plan`, without the configuration and the single collectives; bytes, seconds, FLOPs."""

    def plain(value: Any) -> Any:
        if hasattr(value, "_asdict"):
            return {name: plain(v) for name, v in value._asdict().items()}
        return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value

    shown = plan._replace(compiled=plan.compiled._replace(collectives=()))._asdict()
    found = {name: plain(value) for name, value in shown.items() if name != "config"}
    del found["compiled"]["collectives"]
    found["compiled"]["peak"] = plan.compiled.peak
    c = plan.config
    return {
        "mesh": c.mesh.shape,
        "parameters": parameters(c.model),
        "warnings": list(warnings(plan)),
        **found,
    }


def warnings(plan: Plan) -> Iterator[str]:
    """What a person should know before paying for the run; a sentence each."""
    m, shape, accelerator = plan.config.model, plan.config.mesh.shape, plan.hardware != CPU
    for block, reduction, compute in plan.prediction.reductions if plan.prediction else ():
        if reduction > compute:
            yield (
                f"the reduction over expert={shape['expert']} after {block} takes {_time(reduction)}, longer than the "
                f"{_time(compute)} of the work it follows: make mesh.expert smaller and data or fsdp larger"
            )
    if plan.least is not None:
        mesh, needed = plan.least
        yield (
            f"no mesh of these devices fits; {_mesh(mesh)} needs least, {_gb(needed)}: take more devices, more "
            f"train.accumulation (now {plan.config.train.accumulation}) or model.remat='block' (now {m.remat!r})"
        )
    if accelerator and m.dtype == "float32":
        yield "model.dtype='float32', and the times are those of 16-bit products: set bfloat16, or expect several times as long"
    if accelerator and m.remat in ("none", "dots"):
        yield f"model.remat={m.remat!r} leaves to the compiler what is kept: memory is less certain than with 'slots' or 'block'"
    if not all(c.counted for c in plan.compiled.collectives):
        yield "some collectives are in loops of unknown length and are counted once"


def text(plan: Plan, name: str) -> str:
    """The plan for a person; `name` is the configuration's."""
    c, m, compiled, e, p = (
        plan.config,
        plan.config.model,
        plan.compiled,
        plan.expected,
        plan.prediction,
    )
    hardware, shape, tokens = (
        HARDWARE.get(plan.hardware),
        c.mesh.shape,
        c.train.batch_size * m.rows_per_example * m.context_length,
    )
    n, ends = (
        math.prod(shape.values()),
        "the vocabulary scores" if m.task == "language" else "the inputs",
    )
    room = (
        f" of {_gb(hardware.memory)}: {'fits' if plan.fits else 'does not fit'}" if hardware else ""
    )
    lines = [
        f"{name}: {_count(parameters(m))} parameters, {m.dtype}, remat={m.remat}, {tokens:,} tokens a step",
        f"{n} x {plan.hardware}, mesh {_mesh(shape)}: {c.train.accumulation} x {rows(c, shape)} rows a device",
        "",
        "Memory of one device",
        *_table(
            ("parameters", _gb(compiled.parameters)),
            ("optimizer", _gb(compiled.optimizer)),
            ("gradients", _gb(e.gradients)),
            ("activations kept", _gb(e.kept)),
            (
                "working set",
                f"{_gb(max(e.layer, e.ends))} of {'a layer' if e.layer > e.ends else ends}",
            ),
            ("peak", _gb(plan.peak) + room),
        ),
        f"  Compiled for {n} host devices in {compiled.seconds:.0f} s (jax {compiled.jax}): {_gb(compiled.peak)}, of it "
        f"{_gb(compiled.temporary)} temporary.",
        f"  Counted for the same {'' if hardware is None else 'float32 '}step: {_gb(plan.counted.temporary)} temporary; "
        f"factor {plan.factor:.2f}.",
    ]
    if hardware is not None:
        lines.append(
            f"  Assumed: {m.dtype}, and a kernel of attention that holds no scores; tiles of them take {_gb(plan.scores)} more."
        )
    sent = (
        (
            f"{t.kind} over {', '.join(t.axes)}",
            f"{_gb(t.sent)} in {t.runs} runs"
            + (f", {_range(t.seconds)}{', slow network' if t.slow else ''}" if t.seconds else ""),
        )
        for t in plan.traffic
    )
    lines += ["", "Sent by one device in a step", *(_table(*sent) or ["  nothing"])]
    if p is not None and hardware is not None:
        lines += [
            "",
            "A step, best to worst",
            *_table(
                ("model FLOPs", f"{p.flops:.3g}"),
                (
                    "executed FLOPs",
                    f"{p.executed:.3g}, recomputation included, attention as a flash kernel does it",
                ),
                *((PARTS[part], _range(seconds)) for part, seconds in p.parts.items()),
                (
                    "time",
                    f"{_range(p.step)}; {tokens / p.step[1]:.3g} to {tokens / p.step[0]:.3g} tokens/s",
                ),
                ("MFU", f"{p.mfu[0]:.0%} to {p.mfu[1]:.0%} of {hardware.flops / 1e12:.0f} TFLOP/s"),
            ),
            f"  {plan.hardware}: {hardware.source}.",
            "  A roofline from what such devices are known to reach; how near it came on an H200: docs/plan.md.",
        ]
    lines.append("")
    if plan.suggestion is not None:
        s = plan.suggestion
        mesh = ",".join(f"{axis}={size}" for axis, size in s.mesh.items() if size > 1)
        lines.append(
            f"suggested: --mesh={mesh}: {_range(s.step)} and {_gb(s.peak)}, where this mesh is counted at {_range(s.given_step)}"
        )
    elif hardware is not None and plan.least is None:
        lines.append("No other mesh of these devices is counted to be faster and to fit.")
    return "\n".join([*lines, *(f"warning: {sentence}" for sentence in warnings(plan))]).rstrip()


def _table(*pairs: tuple[str, str]) -> list[str]:
    width = max((len(name) for name, _ in pairs), default=0)
    return [f"  {name:<{width}}  {value}" for name, value in pairs]


def _mesh(shape: dict[str, int]) -> str:
    return (
        ", ".join(f"{axis}={size}" for axis, size in shape.items() if size > 1) or "of one device"
    )


def _count(n: float) -> str:
    return f"{n / 1e9:.3g} B" if n >= 1e9 else f"{n / 1e6:.3g} M"


def _gb(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n >= 1e8 else f"{n / 1e6:.3g} MB"


def _time(seconds: float) -> str:
    unit, size = ("s", 1) if seconds >= 1 else ("ms", 1e-3) if seconds >= 1e-3 else ("µs", 1e-6)
    return f"{seconds / size:.3g} {unit}" if seconds >= 1e-6 else "under 1 µs"


def _range(seconds: Range) -> str:
    return " to ".join(map(_time, seconds))

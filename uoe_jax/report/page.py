"""The report as one HTML file that needs nothing else: Bokeh's script, the charts, the data, and the page's own script."""

from __future__ import annotations

import base64
import datetime
import html
import importlib.resources
import io
import json
import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.model import Model
from bokeh.resources import Resources
from PIL import Image

from uoe_jax.costs.flops import forward_flops_per_token
from uoe_jax.models.count import parameters
from uoe_jax.report import charts
from uoe_jax.report.sample import Looked
from uoe_jax.report.series import PER_LAYER, Logged


def page(runs: Sequence[Logged], looked: Sequence[Looked]) -> str:
    """The file's text, for one run or several beside each other."""
    curves, routing = (
        charts.curves(runs),
        charts.routing() if any(run.routing for run in runs) else [],
    )
    figures: list[Model] = [*curves, *routing]
    script, divs = components(figures) if figures else ("", ())
    title = " · ".join(run.name for run in runs)
    data = [_run(run, look) for run, look in zip(runs, looked)]
    own = importlib.resources.files("uoe_jax.report")
    part = lambda name: (own / name).read_text(encoding="utf-8")  # noqa: E731
    text = string.Template(part("page.html")).substitute(
        title=html.escape(title),
        made=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        style=part("page.css"),
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(),
        figures=script,
        summary=_summary(runs),
        curves="".join(divs[: len(curves)]),
        routing="".join(divs[len(curves) :]),
        data=_in_script(data),
        script=part("page.js"),
    )
    # A directory's name may have bytes that are no text.
    return text.encode("utf-8", "replace").decode()


def _in_script(data: Any) -> str:
    """JSON in a <script> element: nothing in it begins a tag or a comment, or ends a line."""
    text = json.dumps(data, ensure_ascii=False)
    return text.translate({ord(c): f"\\u{ord(c):04x}" for c in "<\u2028\u2029"})


def _summary(runs: Sequence[Logged]) -> str:
    """A table with a column for each run."""
    rows: dict[str, list[str]] = {}
    for i, (run, colour) in enumerate(zip(runs, charts.colours(runs))):
        m, c = run.config.model, run.config
        facts = {
            "run": f'<span style="color:{colour}">■</span> {html.escape(run.name)}',
            "blocks": f"{m.attention} + {m.mlp}, {m.n_layers} layers, D = {m.d_model}",
            **{
                name: f"{r.k} of {r.n_experts} experts, patches of {r.patch_size}, {r.unit} by {r.priority}, gate {r.gate}"
                for name, r in m.unions().items()
            },
            "parameters": f"{parameters(m) / 1e6:,.2f} M",
            "forward operations": f"{forward_flops_per_token(m) / 1e6:.3g} MFLOPs a token",
            "data": html.escape(" ".join(filter(None, (c.data.source, c.data.name, c.data.path)))),
            "batch": f"{c.train.batch_size} rows of {m.context_length} tokens",
            "steps": f"{run.step:,} of {c.train.steps:,}"
            + ("" if run.step >= c.train.steps else " (in progress, or stopped)"),
            **{
                _called(
                    split, key
                ): f"{line[key]:.4f} (step {line.get('test/step', line['step']):,})"
                for split, line in run.last.items()
                for key in line
                if _told(key)
            },
        }
        for name, value in facts.items():
            rows.setdefault(name, [""] * len(runs))[i] = value
    body = "".join(
        f"<tr><th>{html.escape(name)}</th>" + "".join(f"<td>{v}</td>" for v in values) + "</tr>"
        for name, values in rows.items()
    )
    return f'<table class="summary">{body}</table>'


def _told(key: str) -> bool:
    return key.partition("/")[2] in ("loss", "bits_per_byte", "word_perplexity", "accuracy")


def _called(split: str, key: str) -> str:
    return (
        f"{'validation' if split == 'eval' else split}: {key.partition('/')[2].replace('_', ' ')}"
    )


def _run(run: Logged, looked: Looked) -> dict[str, Any]:
    """What page.js needs of a run."""
    m = run.config.model
    blocks = {}
    for name, r in m.routed().items():
        own = run.routing.get(name)
        found: dict[str, Any] = {
            "n": r.n_experts,
            "patch": r.patch_size,
            "heads": m.n_heads // r.n_experts if name == "smha" else 0,
        }
        if own is not None:
            found |= {
                "edges": own.edges.tolist(),
                "load": _packed(own.load),
                "quarters": _packed(own.quarters),
                "lines": {said: _packed(own.lines[key]) for key, said in PER_LAYER.items()},
                "even": math.log(r.n_experts),
            }
        if looked.sample is not None and name in looked.routes:
            found["routes"] = _packed(looked.routes[name])
        blocks[name] = found
    return {
        "name": run.name,
        "layers": m.n_layers,
        "blocks": blocks,
        "sample": _sample(looked),
        "why": looked.why,
        "step": looked.step,
    }


def _packed(array: np.ndarray) -> dict[str, Any]:
    """Numbers to about four digits: int16 of a common scale, as text."""
    top = float(np.abs(array).max(initial=0)) or 1.0
    return {
        "shape": array.shape,
        "scale": top / 32767,
        "data": base64.b64encode(np.round(array / top * 32767).astype("<i2").tobytes()).decode(),
    }


def _sample(looked: Looked) -> dict[str, Any] | None:
    s = looked.sample
    if s is None:
        return None
    pictures = None if s.pictures is None else [_png(picture) for picture in s.pictures]
    return {
        "texts": s.texts,
        "pictures": pictures,
        "grid": s.grid,
        "before": s.before,
        "titles": s.titles,
    }


def _png(picture: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()

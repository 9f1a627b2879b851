"""The report as one self-contained HTML file: Bokeh's script, the charts, the data, page.js."""

import base64
import datetime
import html
import importlib.resources
import io
import itertools
import json
import math
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.embed import components
from bokeh.resources import Resources
from PIL import Image

from uoe_jax.costs.flops import forward_flops_per_token
from uoe_jax.models.count import parameters
from uoe_jax.report import charts
from uoe_jax.report.sample import RoutingSample
from uoe_jax.report.series import PER_LAYER, RunLog

MEASURES = ("loss", "bits_per_byte", "word_perplexity", "accuracy")  # of the summary


def page(runs: Sequence[RunLog], samples: Sequence[RoutingSample]) -> str:
    """The file's text, for one run or several beside each other."""
    curves = charts.curves(runs)
    figures: list[Any] = [*curves, *(charts.routing() if any(r.routing for r in runs) else [])]
    script, divs = components(figures) if figures else ("", ())
    own = importlib.resources.files("uoe_jax.report")
    kinds = ("html", "css", "js")
    part = {kind: (own / f"page.{kind}").read_text(encoding="utf-8") for kind in kinds}
    data = json.dumps([*map(_run, runs, samples)], ensure_ascii=False)
    # In a <script> element, nothing in the data may begin a tag or a comment, or end a line.
    text = string.Template(part["html"]).substitute(
        title=html.escape(" · ".join(run.name for run in runs)),
        made=f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        style=part["css"],
        bokeh=Resources(mode="inline", components=["bokeh"]).render_js(),
        figures=script,
        summary=_summary(runs),
        curves="".join(divs[: len(curves)]),
        routing="".join(divs[len(curves) :]),
        data=data.translate({ord(c): f"\\u{ord(c):04x}" for c in "<\u2028\u2029"}),
        script=part["js"],
    )
    # A directory's name may have bytes that are no text.
    return text.encode("utf-8", "replace").decode()


def _summary(runs: Sequence[RunLog]) -> str:
    """A table with a column for each run."""
    columns, body = [], ""
    for run, colour in zip(runs, charts.colours(runs)):
        first = f'<span style="color:{colour}">■</span> {html.escape(run.name)}'
        columns.append({"run": first, **_facts(run)})
    for name in dict.fromkeys(itertools.chain(*columns)):
        cells = "".join(f"<td>{facts.get(name, '')}</td>" for facts in columns)
        body += f"<tr><th>{html.escape(name)}</th>{cells}</tr>"
    return f'<table class="summary">{body}</table>'


def _facts(run: RunLog) -> dict[str, str]:
    m, c = run.config.model, run.config
    facts = {"blocks": f"{m.attention} + {m.mlp}, {m.n_layers} layers, D = {m.d_model}"}
    for name, r in m.unions().items():
        routed = f"{r.k} of {r.n_experts} experts, patches of {r.patch_size}"
        facts[name] = f"{routed}, {r.unit} by {r.priority}, gate {r.gate}"
    in_progress = "" if run.step >= c.train.steps else " (in progress, or stopped)"
    facts |= {
        "parameters": f"{parameters(m) / 1e6:,.2f} M",
        "forward FLOPs": f"{forward_flops_per_token(m) / 1e6:.3g} MFLOPs a token",
        "data": html.escape(" ".join(filter(None, (c.data.source, c.data.name, c.data.path)))),
        "batch": f"{c.train.batch_size} rows of {m.context_length} tokens",
        "steps": f"{run.step:,} of {c.train.steps:,}{in_progress}",
    }
    for split, line in run.last.items():
        name, step = "validation" if split == "eval" else split, line.get("test/step", line["step"])
        for key, value in line.items():
            measure = key.partition("/")[2]
            if measure in MEASURES:
                facts[f"{name}: {measure.replace('_', ' ')}"] = f"{value:.4f} (step {step:,})"
    return facts


def _run(run: RunLog, shown: RoutingSample) -> dict[str, Any]:
    """What page.js needs of a run."""
    m, s, sample = run.config.model, shown.sample, None
    blocks: dict[str, dict[str, Any]] = {}
    for name, r in m.routed().items():
        heads = m.n_heads // r.n_experts if name == "smha" else 0
        blocks[name] = {"n": r.n_experts, "patch": r.patch_size, "heads": heads}
        if own := run.routing.get(name):
            lines = {line: _packed(own.lines[key]) for key, line in PER_LAYER.items()}
            even = math.log(r.n_experts)
            blocks[name] |= {"edges": own.edges.tolist(), "lines": lines, "even": even}
            blocks[name] |= {"load": _packed(own.load), "quarters": _packed(own.quarters)}
        if name in shown.routes:
            blocks[name]["routes"] = _packed(shown.routes[name])
    if s is not None:
        pictures = None if s.pictures is None else [_png(picture) for picture in s.pictures]
        sample = {"texts": s.texts, "pictures": pictures, "grid": s.grid, "before": s.before}
        sample["titles"] = s.titles
    facts = {"name": run.name, "layers": m.n_layers, "blocks": blocks}
    return {**facts, "sample": sample, "why": shown.why, "step": shown.step}


def _packed(array: np.ndarray) -> dict[str, Any]:
    """Numbers to about four digits: int16 of a common scale, as text."""
    top = float(np.abs(array).max(initial=0)) or 1.0
    data = np.round(array / top * 32767).astype("<i2").tobytes()
    return {"shape": array.shape, "scale": top / 32767, "data": base64.b64encode(data).decode()}


def _png(picture: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()

"""The report as one self-contained HTML file: Bokeh's script, the charts, the data, page.js.

There are curves of all runs, and the charts of a routed block, which page.js fills.
"""

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
from bokeh import models
from bokeh.core.properties import field
from bokeh.embed import components
from bokeh.models.annotations import ColorBar
from bokeh.palettes import Category10_10, Category20_20, cividis
from bokeh.plotting import figure
from bokeh.resources import Resources
from PIL import Image

from uoe_jax.costs.flops import forward_flops_per_token
from uoe_jax.models.count import parameters
from uoe_jax.report.sample import RoutingSample
from uoe_jax.report.series import PER_LAYER, RunLog

MEASURES = ("loss", "bits_per_byte", "word_perplexity", "accuracy")  # of the summary
TOOLS = "pan,wheel_zoom,box_zoom,reset,save"
TRAIN = (  # (title, keys of metrics.jsonl, factor, format of a value)
    ("loss", ("train/loss", "eval/loss"), 1.0, "0.0000"),
    ("bits per byte", ("train/bits_per_byte", "eval/bits_per_byte"), 1.0, "0.0000"),
    ("perplexity per word", ("train/word_perplexity", "eval/word_perplexity"), 1.0, "0.00"),
    ("accuracy", ("train/accuracy", "eval/accuracy"), 1.0, "0.0000"),
    ("learning rate", ("train/learning_rate",), 1.0, "0.00e+0"),
    ("gradient norm", ("train/grad_norm",), 1.0, "0.000"),
    ("tokens a second", ("perf/tokens_per_second",), 1.0, "0,0"),
    ("peak memory, GB", ("perf/device_peak_bytes", "perf/host_peak_bytes"), 1e-9, "0.000"),
    ("skipped steps", ("train/skipped",), 1.0, "0"),
)
QUARTERS = ("first quarter", "second quarter", "third quarter", "last quarter")
ROUTING = (  # (title, names of its lines in page.js, format of a value)
    ("dropped patches, share", ("choices without a slot", "patches no expert took"), "0.0000"),
    ("router entropy, nats", ("router entropy, nats", "even: ln N"), "0.000"),
    ("experts out of balance", ("highest load / mean", "dead experts"), "0.00"),
    ("kept share by quarter of the row, of the mean", QUARTERS, "0.000"),
)
CELL = ("left", "right", "top", "bottom", "value", "expert", "step")  # of the heat map
STEP = ("step", "@step{0,0}")  # of a tooltip


def page(runs: Sequence[RunLog], samples: Sequence[RoutingSample]) -> str:
    """The file's text, for one run or several beside each other."""
    of_runs = curves(runs)
    figures: list[Any] = [*of_runs, *(routing() if any(r.routing for r in runs) else [])]
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
        curves="".join(divs[: len(of_runs)]),
        routing="".join(divs[len(of_runs) :]),
        data=data.translate({ord(c): f"\\u{ord(c):04x}" for c in "<\u2028\u2029"}),
        script=part["js"],
    )
    # A directory's name may have bytes that are no text.
    return text.encode("utf-8", "replace").decode()


def _summary(runs: Sequence[RunLog]) -> str:
    """A table with a column for each run."""
    columns, body = [], ""
    for run, colour in zip(runs, colours(runs)):
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


def colours(runs: Sequence[RunLog]) -> list[str]:
    """A colour for every run."""
    palette = Category10_10 if len(runs) <= 10 else Category20_20
    return [palette[i % len(palette)] for i in range(len(runs))]


def curves(runs: Sequence[RunLog]) -> list[figure]:
    """A figure for every measure of a run: lines with a range of training, dots of evaluations."""
    charts = []
    for title, keys, factor, shown in TRAIN:
        chart = _figure(title)
        lines: list[Any] = []
        for run, colour in zip(runs, colours(runs)):
            name = f"{run.name}, " if len(runs) > 1 else ""
            lines += [_curve(chart, run, k, colour, factor, name) for k in keys if _has(run, k)]
        if not lines:
            continue
        tips = [("", "@what"), STEP, ("tokens", "@tokens{0.00a}"), (title, f"@value{{{shown}}}")]
        hover = models.HoverTool(renderers=lines, tooltips=tips)
        hover.mode = "vline" if len(lines) < 3 else "mouse"
        chart.add_tools(hover)
        chart.xaxis.tags = ["over"]  # page.js renames it
        chart.xaxis.formatter = models.NumeralTickFormatter(format="0[.]0a")
        chart.yaxis.formatter = models.NumeralTickFormatter(format="0[.]00a")
        if title == "learning rate":
            chart.yaxis.formatter = models.PrintfTickFormatter(format="%.1e")
        charts.append(chart)
    return charts


def _has(run: RunLog, key: str) -> bool:
    """Whether there is anything to draw: of skipped steps, whether there are any."""
    return key in run.curves and (key != "train/skipped" or bool(run.curves[key].high.any()))


def _curve(chart: figure, run: RunLog, key: str, colour: str, factor: float, name: str) -> Any:
    c, (kind, measure) = run.curves[key], key.split("/")
    what = {"train": "training", "eval": "validation"}.get(kind, measure.split("_")[0])
    data = dict(x=c.step, step=c.step, tokens=c.tokens, value=factor * c.mean)
    data |= dict(low=factor * c.low, high=factor * c.high, what=np.full(len(c.step), name + what))
    look: dict[str, Any] = dict(source=models.ColumnDataSource(data), color=colour)
    if (c.high > c.low).any():
        chart.varea("x", "low", "high", alpha=0.15, **look)
    width = 2 if kind == "eval" or key.startswith("perf/device") else 1.3
    dash = "dashed" if kind == "eval" else "solid"
    line = chart.line("x", "value", line_width=width, line_dash=dash, **look)
    if kind == "eval" or len(c.step) == 1:
        chart.scatter("x", "value", size=5, **look)
    return line


def routing() -> list[figure]:
    """The figures of one block in one layer; page.js fills their sources, by name."""
    return [_heat_map(), *(_lines(*chart) for chart in ROUTING)]


def _heat_map() -> figure:
    load = _figure("load of every expert, of the mean", name="load", y_axis_label="expert")
    mapper = models.LinearColorMapper(palette=list(cividis(256)), low=0, high=2)
    # One point each, as a figure without any warns that it has no range.
    one = {name: [float(name in ("right", "top"))] for name in CELL}
    cells, colour = models.ColumnDataSource(one, name="cells"), field("value", mapper)
    load.quad(*CELL[:4], source=cells, fill_color=colour, line_color=None)
    tips = [("expert", "@expert"), ("from step", "@step{0,0}"), ("load / mean", "@value{0.00}")]
    load.add_tools(models.HoverTool(tooltips=tips))
    load.add_layout(ColorBar(color_mapper=mapper, ticker=models.BasicTicker(), width=10), "right")
    load.yaxis.ticker = models.BasicTicker(min_interval=1, mantissas=[1, 2, 5])
    load.grid.visible = False
    return load


def _lines(title: str, names: Sequence[str], shown: str) -> figure:
    chart = _figure(title)
    for name, colour in zip(names, Category10_10):
        source = models.ColumnDataSource({"step": [0], "value": [0]}, name=name)
        look: dict[str, Any] = dict(source=source, color=colour, line_width=1.5, legend_label=name)
        line = chart.line("step", "value", **look)
        tips = [("", name), STEP, ("", f"@value{{{shown}}}")]
        chart.add_tools(models.HoverTool(renderers=[line], tooltips=tips, mode="vline"))
    size: dict[str, Any] = dict(label_text_font_size="8pt", padding=0, spacing=8)
    chart.legend.update(orientation="horizontal", border_line_alpha=0, **size)
    chart.add_layout(chart.legend[0], "below")
    return chart


def _figure(title: str, **more: Any) -> figure:
    chart = figure(title=title, tools=TOOLS, x_axis_label="step", width=410, height=250, **more)
    chart.toolbar.update(logo=None, autohide=True)
    return chart

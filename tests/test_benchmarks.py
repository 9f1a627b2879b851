"""The benchmarks' own arithmetic, and that each measures what it says: small sizes, no bar."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import numpy as np
import pytest
import reference
from helpers import ROOT, environment

from benchmarks import decode, layer, length, scaling, timing


def test_ratios_are_those_within_a_round():
    found = timing.against([1.0, 20.0, 3.0], [2.0, 10.0, 3.0])
    assert (
        found["ratio"] == 1.0
        and found["seconds"] == 3.0
        and found["ratio_low"] <= 1 <= found["ratio_high"]
    )
    calls = []
    times = timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4
    )
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4, "c": 4}
    assert ["".join(calls[i : i + 3]) for i in range(0, 15, 3)] == [
        "abc",
        "bca",
        "cab",
        "abc",
        "bca",
    ]


def test_table():
    assert timing.table([{"a": 1, "b": 0.12345}, {"a": "x", "met": False}]) == [
        "a  b       met",
        "1  0.1235",
        "x          NO",
    ]


def test_rows_are_drawn(tmp_path):
    """Whatever columns a benchmark has: ratios with quartiles, or shares of the work."""
    measured = [
        {
            "case": "a",
            "ratio": 0.5,
            "ratio_low": 0.4,
            "ratio_high": 0.6,
            "flop_ratio": 0.5,
            "met": True,
        },
        {"case": "b"},
    ]
    for rows in (measured, [{"axis": "data", "devices": 2, "work_share": 0.5, "ideal": 0.5}]):
        timing.draw(rows, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_freed_memory_is_kept():
    """The second array of a process lies where the first one was: the system has no page to give for it."""
    faults = "resource.getrusage(resource.RUSAGE_SELF).ru_minflt"
    text = f"import resource\nfrom benchmarks import timing\ntiming.keep_memory()\nbytearray(1 << 27)\nn = {faults}\nbytearray(1 << 27)\nprint({faults} - n)"
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
        check=True,
    )
    assert int(done.stdout) < 1000, done.stdout  # of 32768


SMALL = layer.Sizes("float32", (2, 128, 32, 64), (2, 128, 32, 8), 8)


@pytest.mark.slow
def test_variants_of_a_layer_compute_the_same():
    """The rivals give the gradients of ours with the same weights; the dense block with whole squares those in tiles."""
    made = layer.mlp_variants(SMALL._replace(), 0.5, 4)
    assert set(made) == {"dense", "causal token choice", "expert choice", "ragged_dot"}
    assert reference.error(made["ragged_dot"].run(), made["expert choice"].run()) < 1e-5
    assert made["expert choice"].flops == pytest.approx(0.5 * made["dense"].flops, rel=0.2)
    for causal in (True, False):
        made = layer.attention_variants(SMALL, 0.5, 4, causal)
        assert reference.error(made["dense, whole squares"].run(), made["dense"].run()) < 1e-5
        (name,) = (n for n in made if n.endswith(", project first"))
        assert (
            reference.error(made[name].run(), made[name.removesuffix(", project first")].run())
            < 1e-5
        )


def test_a_kernel_sum_is_no_more_than_its_parts():
    """Where nothing moves, the products alone: share of 4·D·F operations a token, three times."""
    sizes = SMALL._replace(mlp=(2, 128, 32, 64))
    assert layer.kernel_sum(sizes, 0.5, 1e9, 1e30) == pytest.approx(
        3 * 0.5 * 4 * 32 * 64 * 256 / 1e9
    )
    assert layer.kernel_sum(sizes, 0.5, 1e30, 1e9) > 2 * 2 * 4 * 32 * 256 * 4 / 1e9


@pytest.mark.slow
def test_one_command_measures_everything_that_is_named(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "scaling", "loader", f"--out={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    by_axis = {(row["axis"], row["devices"]): row for row in rows}
    for (axis, devices), row in by_axis.items():  # with `expert`, routing and norms are done by all
        assert row["ideal"] <= row["work_share"] * 1.02 < row["ideal"] + 0.15, (axis, devices)
    assert (
        (tmp_path / "scaling.png").read_bytes()[:4]
        == (tmp_path / "loader.png").read_bytes()[:4]
        == b"\x89PNG"
    )
    assert by_axis["expert", 8]["sent_MB"] > by_axis["expert", 2]["sent_MB"] > 0
    assert {row["what"] for row in json.loads((tmp_path / "loader.json").read_text())["rows"]} == {
        "model",
        "loader",
    }


def test_configurations_are_sound():
    assert [scaling.config(axis, 8).mesh.shape[axis] for axis in ("expert", "data", "fsdp")] == [
        8,
        8,
        8,
    ]
    assert length.TOKENS % max(length.LENGTHS) == 0 and set(decode.BARS) == {512, 4096}
    assert np.isfinite(jax.device_get(timing.matmul("float32")[1]))

"""The types: the package has no error in them, they are there for whoever uses it, and they tell right from wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers import ROOT, environment

pytestmark = pytest.mark.slow  # mypy reads jax, flax and numpy anew

PROGRAM = """
import jax
import jax.numpy as jnp
from flax import nnx

from uoe_jax import SMHA, RoutingConfig, UoME

routing = RoutingConfig(n_experts=8, k=2, patch_size=4)
attention = SMHA(64, 8, routing, causal=True, qkv_bias=True, rngs=nnx.Rngs(0))
mlp = UoME(64, 256, routing, activation="swiglu", rngs=nnx.Rngs(1))


def block(x: jax.Array) -> tuple[jax.Array, float]:
    y, stats = attention(x)
    z, more = mlp(x + y)
    lost = 1 - (stats.kept_N.sum() + more.kept_N.sum()) / (stats.chosen_N.sum() + more.chosen_N.sum())
    return x + y + z, float(lost)


print(block(jnp.ones((2, 16, 64)))[0].shape)
"""
# A change of the program, and of what kind mypy says it is.
WRONG = [
    ("RoutingConfig, UoME", "RoutingConfig, UoME, Router", "attr-defined"),
    ("n_experts=8", 'n_experts="8"', "arg-type"),
    ("patch_size=4", "patch=4", "call-arg"),
    ("64, 8, routing", "64, routing, 8", "arg-type"),
    ("qkv_bias=True", 'qkv_bias="yes"', "arg-type"),
    (", rngs=nnx.Rngs(1)", "", "call-arg"),
    ("y, stats = attention(x)", "y = stats = attention(x)", "attr-defined"),
    ("more.kept_N", "more.dropped", "attr-defined"),
]


def run(*command: str, cwd=ROOT) -> tuple[int, str]:
    """The exit code and the output of a module of Python."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env=environment(), capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_the_package_has_no_error_in_its_types(tmp_path):
    code, out = run("mypy", f"--cache-dir={tmp_path}")
    assert code == 0 and "no issues found" in out, out


def test_the_checks_of_style_find_nothing():
    for command in ("check", "format --check"):
        code, out = run("ruff", *command.split(), "--no-cache", ".")
        assert code == 0, out


def test_a_program_that_uses_the_blocks_is_checked(tmp_path):
    """As in a project of its own, without our settings: an installed package is only read where it has py.typed."""
    files = {"right": PROGRAM}
    for i, (old, new, _) in enumerate(WRONG):
        assert old in PROGRAM
        files[f"wrong_{i}"] = PROGRAM.replace(old, new, 1)
    for name, program in files.items():
        (tmp_path / f"{name}.py").write_text(program)
    code, out = run("mypy", *(f"{name}.py" for name in files), cwd=tmp_path)
    said = {
        name: [
            line for line in out.splitlines() if line.startswith(f"{name}.py") and "error:" in line
        ]
        for name in files
    }
    assert code == 1 and not said.pop("right"), out
    for lines, (old, new, kind) in zip(said.values(), WRONG, strict=True):
        assert any(f"[{kind}]" in line for line in lines), (old, new, out)
    assert run("right", cwd=tmp_path) == (0, "(2, 16, 64)\n")

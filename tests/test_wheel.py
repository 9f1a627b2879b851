"""The wheel alone, in an environment of its own: what a newcomer gets from `pip install`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest
from helpers import QUICK_CODE, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            f"--wheel-dir={place}",
            str(ROOT),
        ],
        check=True,
        timeout=300,
    )
    (found,) = place.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The scripts of a new environment with the wheel and what it asks for."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    pip = [
        str(place / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "-c",
        str(ROOT / "constraints.txt"),
        str(wheel),
    ]
    subprocess.run(pip, check=True, timeout=900)
    return place / "bin"


def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    configs = {
        file.relative_to(ROOT / "configs").as_posix() for file in (ROOT / "configs").rglob("*.py")
    }
    assert {f"uoe_jax/configs/{name}" for name in configs} <= set(names)
    assert {
        "uoe_jax/py.typed",
        "uoe_jax/report/page.html",
        "uoe_jax/report/page.js",
        "uoe_jax/report/page.css",
    } <= set(names)
    assert not [
        name
        for name in names
        if name.startswith(("tests/", "docs/", "examples/")) or name.endswith(".pyc")
    ]


def test_quickstart_from_any_directory(installed, tmp_path):
    """Trained, measured and reported by the installed command, with no repository in sight and nothing but its own packages."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK_CODE, "PATH": f"{installed}:{env['PATH']}"}
    small = ["d_model=32", "n_layers=1", "d_hidden=64", "n_heads=4", "uome.n_experts=4", "uome.k=2"]
    options = [*(f"--config.model.{key}" for key in small), "--config.train.steps=3"]

    def run(*command):
        ran = subprocess.run(
            command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600
        )
        assert ran.returncode == 0, ran.stderr
        return ran.stdout

    where = run(
        "python",
        "-c",
        "import uoe_jax; from uoe_jax import SMHA, UoME, RoutingConfig; print(uoe_jax.__file__)",
    )
    assert str(installed.parent) in where
    run("uoe", "train", "--config=quickstart", "--workdir=run", *options)
    assert (tmp_path / "run" / "report.html").stat().st_size > 1_000_000
    assert '"test/bits_per_byte"' in run("uoe", "eval", "--workdir=run", "--split=test")
    run("uoe", "report", "--workdir=run", "--out=again.html")

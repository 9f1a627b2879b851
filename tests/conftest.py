"""Tests run on 8 forced CPU devices, with strict dtype and rank promotion, and share one compilation cache."""

import os
import pathlib
import sys
import tempfile
from unittest import mock

from helpers import QUICK_CODE, ROOT

sys.path.append(str(ROOT))  # for benchmarks/, behind the installed package

CACHE = pathlib.Path(
    os.environ.get(
        "UOE_TEST_CACHE", pathlib.Path(tempfile.gettempdir()) / f"uoe-tests-{os.getuid()}"
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("UOE_CACHE", str(CACHE / "data"))
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_CODE}"

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
(CACHE / "jax").mkdir(mode=0o700, parents=True, exist_ok=True)
jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture
def forgotten():
    """The built-in sources again, after a test that adds one."""
    from uoe_jax.config.data import SOURCES

    with mock.patch.dict(SOURCES):
        yield

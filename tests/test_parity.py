"""The golden vectors of the baselines, made anew by torch and transformers (the extra `parity`)."""

from __future__ import annotations

import importlib
import pathlib
import sys

import numpy as np
import pytest

GOLDEN = pathlib.Path(__file__).parent / "golden" / "baselines"


@pytest.mark.parity
@pytest.mark.parametrize("name", ["make", "make_encoders"])
def test_the_vectors_are_what_their_makers_give(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(GOLDEN))
    made, maker = importlib.import_module("make"), importlib.import_module(name)
    monkeypatch.setattr(made, "OUT", tmp_path)
    maker.main()
    files = sorted(tmp_path.rglob("*.npz"))
    assert len(files) >= 8
    for file in files:
        new, stored = np.load(file), np.load(GOLDEN / file.relative_to(tmp_path))
        assert set(new.files) == set(stored.files)
        assert str(new["config"]) == str(stored["config"])
        for key in set(new.files) - {"config", "made"}:
            np.testing.assert_allclose(
                new[key], stored[key], rtol=1e-5, atol=1e-6, err_msg=f"{file.stem}: {key}"
            )
    for module in ("make", "make_encoders"):
        sys.modules.pop(module, None)

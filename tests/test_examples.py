"""What is in examples/ runs as it stands there."""

from __future__ import annotations

import json
import runpy
import shutil

import pytest
from helpers import ROOT, environment, uoe

from uoe_jax import cli
from uoe_jax.data.registry import add_source

EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_the_blocks_learn_in_a_model_of_ones_own(capsys):
    """Chance is ln 16 = 2.77."""
    import jax

    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):  # as a user has it
        assert runpy.run_path(str(EXAMPLES / "blocks.py"))["main"]() < 0.6
    assert "tokens by expert" in capsys.readouterr().out
    assert len((EXAMPLES / "blocks.py").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_a_dataset_of_ones_own(tmp_path, capsys, forgotten):
    file, workdir = EXAMPLES / "own_dataset.py", tmp_path / "run"
    tiny = [
        f"--config.model.{key}"
        for key in ("d_model=32", "n_layers=1", "d_hidden=64", "context_length=64")
    ]
    assert (
        cli.main(
            [
                "train",
                f"--config={file}",
                f"--workdir={workdir}",
                *tiny,
                "--config.train.steps=2",
                "--config.train.report=false",
            ]
        )
        == 0
    )
    assert cli.main(["eval", f"--workdir={workdir}"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["eval/rows"] > 10
    code, _, err = uoe("eval", f"--workdir={workdir}")  # a process that knows nothing of it
    assert code == 2 and "config.data.source='sums'" in err


def test_own_examples_of_token_ids(forgotten):
    """With facts a name is for classifiers; the model then knows as many ids as are said."""
    from uoe_jax.config.data import Facts

    add_source("parity", lambda data: None, Facts(2, n_ids=3))
    from uoe_jax.config import from_dict
    from uoe_jax.data.registry import known_vocabulary

    config = from_dict(
        {
            "data": {"source": "parity"},
            "model": {"task": "classify", "causal": False, "context_length": 8},
        }
    )
    assert known_vocabulary(config) == (3, None)
    with pytest.raises(ValueError, match="another name"):
        add_source("digits", lambda data: None)


@pytest.mark.slow
def test_the_notebook(tmp_path):
    """Every cell. IPython gives commands a terminal, so there they show a bar; in the kernel itself there are plain lines."""
    import nbformat
    from nbclient import NotebookClient

    shutil.copy(EXAMPLES / "dense_to_experts.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "dense_to_experts.ipynb", as_version=4)
    own = "from uoe_jax import cli; cli.main(['train', '--config=digits:tiny', '--workdir=runs/own', '--config.train.log_every=1'])"
    notebook.cells.append(nbformat.v4.new_code_cell(own))
    NotebookClient(
        notebook,
        timeout=900,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute(env=environment(XLA_FLAGS=""))
    said = [
        "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream")
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert "step 200/200 |" in said[1]
    assert "\nstep 5/5  loss " in said[-1] and "\r" not in said[-1] and "\x1b" not in said[-1]
    losses = [float(line.split()[1]) for line in said[2].splitlines() if line.startswith("loss ")]
    assert len(losses) == 2 and abs(losses[0] - losses[1]) < 1e-3
    by_k = [float(line.split()[3]) for line in said[3].splitlines()]
    assert len(by_k) == 8 and by_k[7] < by_k[3] < by_k[0]
    pictures = [
        o.data
        for cell in notebook.cells
        if cell.cell_type == "code"
        for o in cell.outputs
        if "data" in o
    ]
    assert any("image/png" in data for data in pictures) and any(
        "text/html" in data for data in pictures
    )
    assert (tmp_path / "runs" / "notebook" / "tuned" / "report.html").stat().st_size > 1_000_000

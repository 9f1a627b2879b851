"""The command `uoe report`, and the report that `uoe train` writes at its end."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence

from etils import epath

from uoe_jax.config.schema import Config
from uoe_jax.data.pipeline import DataBundle
from uoe_jax.data.tokenizers.workdir import tokenizer_of_run
from uoe_jax.distributed import coordination
from uoe_jax.errors import UserError
from uoe_jax.report.sample import Looked, Sample, of_rows, of_text, routes
from uoe_jax.report.series import POINTS, logged, names
from uoe_jax.train.main import load_data
from uoe_jax.train.restore import restored
from uoe_jax.train.step import Params, Program
from uoe_jax.workdir import locate, write_out

log = logging.getLogger(__name__)

REPORT = "report.html"


def run_report(options: argparse.Namespace, configs: Sequence[Config]) -> str:
    """Writes the file; returns where it is. configs: of the runs, as their workdirs have them.

    Raises:
      UserError: there is no such run, its files cannot be read, or the report cannot be written.
    """
    from uoe_jax.report.page import page

    if coordination.are_several():
        raise UserError(
            "uoe report: is written by one process; start this once, and not by srun or its like"
        )
    workdirs = options.workdirs
    out = options.out or os.fspath(locate(workdirs[0]) / REPORT)
    points = max(200, POINTS // len(workdirs))
    runs = [
        logged(w, config, name, points)
        for w, config, name in zip(workdirs, configs, names(workdirs))
    ]
    looked = [_look(w, config, options.step, options.text) for w, config in zip(workdirs, configs)]
    write_out(
        out, page(runs, looked).encode("utf-8", "backslashreplace").decode()
    )  # of names that are no UTF-8
    return out


def at_end(
    config: Config,
    program: Program,
    params: Params,
    data: DataBundle,
    workdir: epath.Path,
    step: int,
) -> str:
    """Writes the report of a run that has just ended; returns its place. What goes wrong is told, and nothing else ("" then)."""
    try:
        from uoe_jax.report.page import page

        sample = of_rows(config, data.validation, data.tokenizer)
        found, out = routes(program, params, sample, config), os.fspath(workdir / REPORT)
        if coordination.is_process_zero():
            run = logged(os.fspath(workdir), config, workdir.name)
            write_out(out, page([run], [Looked(sample, found, step)]))
        return out
    except Exception as error:
        log.warning(
            "no %s (%s: %s); uoe report --workdir=%s writes one",
            REPORT,
            type(error).__name__,
            error,
            workdir,
        )
        return ""


def _look(workdir: str, config: Config, step: str, text: str | None) -> Looked:
    """The routing at a checkpoint of a run, if there is one and something to look at."""
    if not config.model.routed():
        return Looked(None, {}, 0, "This model does not route.")
    try:
        sample, config = _sample(workdir, config, text)
        with restored(config, workdir, step) as run:
            return Looked(sample, routes(run.program, run.params, sample, config), run.step)
    except UserError as error:
        if text is not None or step != "latest":
            raise
        return Looked(None, {}, 0, f"There is no sample to show: {error}.")


def _sample(workdir: str, config: Config, text: str | None) -> tuple[Sample, Config]:
    if text is not None:
        return of_text(config, text, tokenizer_of_run(config, workdir)), config
    config, data = load_data(config, workdir)
    return of_rows(config, data.validation, data.tokenizer), config

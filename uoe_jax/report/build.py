"""The command `uoe report`, and the report that `uoe train` writes at its end."""

import argparse
import logging
import os
from collections.abc import Sequence

from etils.epath import Path

from uoe_jax.config.schema import Config
from uoe_jax.data.pipeline import DataBundle
from uoe_jax.data.tokenizers.load import tokenizer_of_run
from uoe_jax.distributed import coordination
from uoe_jax.errors import UserError
from uoe_jax.report.sample import RoutingSample, of_rows, of_text, routes
from uoe_jax.report.series import POINTS, names, read_log
from uoe_jax.train.main import load_data
from uoe_jax.train.restore import restored
from uoe_jax.train.step import Params, Program
from uoe_jax.workdir import locate, write_out

log = logging.getLogger(__name__)
REPORT = "report.html"


def run_report(options: argparse.Namespace, configs: Sequence[Config]) -> str:
    """Writes the file; returns its path. configs: of the runs, as their workdirs have them."""
    from uoe_jax.report.page import page

    if coordination.are_several():
        why = "is written by one process; start this once, and not by srun or its like"
        raise UserError(f"uoe report: {why}")
    dirs = options.workdirs
    out = options.out or os.fspath(locate(dirs[0]) / REPORT)
    points = max(200, POINTS // len(dirs))
    runs = [read_log(d, c, name, points) for d, c, name in zip(dirs, configs, names(dirs))]
    samples = [_routing_sample(d, c, options.step, options.text) for d, c in zip(dirs, configs)]
    write_out(out, page(runs, samples))
    return out


def at_end(
    config: Config, program: Program, params: Params, data: DataBundle, workdir: Path, step: int
) -> str:
    """Writes the report of a run that just ended; returns its path. A failure is only logged."""
    try:
        from uoe_jax.report.page import page

        sample = of_rows(config, data.validation, data.tokenizer)
        found, out = routes(program, params, sample, config), os.fspath(workdir / REPORT)
        if coordination.is_process_zero():
            run = read_log(os.fspath(workdir), config, workdir.name)
            write_out(out, page([run], [RoutingSample(sample, found, step)]))
        return out
    except Exception as error:
        why, remedy = type(error).__name__, f"uoe report --workdir={workdir} writes one"
        log.warning("no %s (%s: %s); %s", REPORT, why, error, remedy)
        return ""


def _routing_sample(workdir: str, config: Config, step: str, text: str | None) -> RoutingSample:
    """The routing at a checkpoint of a run, if there is one and there are rows to show."""
    if not config.model.routed():
        return RoutingSample(None, {}, 0, "This model does not route.")
    try:
        if text is None:
            config, data = load_data(config, workdir)
            sample = of_rows(config, data.validation, data.tokenizer)
        else:
            sample = of_text(config, text, tokenizer_of_run(config, workdir))
        with restored(config, workdir, step) as run:
            return RoutingSample(sample, routes(run.program, run.params, sample, config), run.step)
    except UserError as error:
        if text is not None or step != "latest":
            raise
        return RoutingSample(None, {}, 0, f"There is no sample to show: {error}.")

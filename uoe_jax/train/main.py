"""`uoe train`: the run from its first line to its last."""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any, Callable

import jax
from etils import epath

from uoe_jax.config.schema import Config, with_vocabulary
from uoe_jax.data.pipeline import DataBundle, default_cache_dir, load
from uoe_jax.data.tokenizers.load import Tokenizer
from uoe_jax.data.tokenizers.workdir import keep_tokenizer, read_tokenizer
from uoe_jax.distributed import coordination, watchdog
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.coordination import is_process_zero, on_process_zero
from uoe_jax.errors import EXIT_DONE, RunError
from uoe_jax.runtime_env import print_result
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.loop import Run
from uoe_jax.train.metrics import MetricsWriter, Progress, Silent
from uoe_jax.train.saved import listed
from uoe_jax.train.signals import StopSignal
from uoe_jax.train.start import check_init_from, first_state
from uoe_jax.train.step import Params, Program, build
from uoe_jax.workdir import check_record, enter_workdir, locate, release


def load_data(config: Config, workdir: str | None = None) -> tuple[Config, DataBundle]:
    """The data, and the configuration with what they settle filled in; workdir: of a run that may hold its tokenizer."""
    tokenizer = read_tokenizer(workdir) if workdir else None
    bundle = load(config, default_cache_dir(), tokenizer)
    return with_vocabulary(config, bundle.vocab_size), bundle


def train(
    config: Config,
    workdir_name: str,
    sample: Callable[[Config, Program, Params, Tokenizer], str],
    report: Callable[[Config, Program, Params, DataBundle, epath.Path, int], str] | None = None,
) -> int:
    """Trains the configured model in a workdir, or goes on with the run that is there; returns the exit code.

    sample: makes the text shown at the end. report: writes the report of the run (train.report) and gives its
    place, "" where that failed; it raises nothing.

    Order of a run:

      1. resume from the newest good checkpoint of the workdir; else start from `init_from`; else initialise;
      2. per step: evaluate if due (the state about to be trained) -> save if due -> stop if asked -> fetch batch(step)
         -> dispatch the step -> read the previous step's guard -> log;
      3. at the end: evaluate, save, measure the test split if that is due, and show what came of it.

    A metrics line of step s, a checkpoint s and `state.step` = s all speak of the state after s steps.
    """
    with StopSignal() as signal, contextlib.ExitStack() as held:
        watchdog.at("preparing the data", slow=True)
        config, data = agreed_data(config, workdir_name)
        mesh = mesh_lib.make_mesh(config.mesh)
        if config.train.init_from and not on_process_zero(
            lambda: bool(listed(locate(workdir_name) / "checkpoints"))
        ):
            check_init_from(config, data.record.get("tokenizer"), say_early)
        with jax.set_mesh(mesh):
            program = build(config, mesh)
        workdir = enter_workdir(workdir_name, config)  # from here on something is left behind
        held.callback(release, workdir)
        on_process_zero(lambda: check_record(workdir, data.record))
        on_process_zero(lambda: keep_tokenizer(workdir, data.tokenizer))
        keep = config.checkpoint
        with (
            jax.set_mesh(mesh),
            CheckpointStore(workdir, keep.keep_latest, keep.keep_best) as store,
        ):
            watchdog.at("restoring", slow=True)
            state, start, owed = first_state(program, store, config, say_early)
            progress = Progress(config.train.steps, start) if is_process_zero() else Silent()
            run = Run(
                config,
                data,
                program,
                store,
                functools.partial(open_writer, workdir),
                progress,
                state,
                start,
                owed,
            )
            try:
                progress.say(run.welcome(workdir_name))
                exit_code = run.go(signal)
                run.writer.close()
            finally:
                progress.close()
                with contextlib.suppress(RunError):  # where an error is on its way it matters more
                    run.writer.close()
            watchdog.at("generating", slow=True)
            speaks = run.step == config.train.steps and config.model.task == "language"
            text = (
                sample(config, program, run.state.params, data.tokenizer)
                if speaks and data.tokenizer
                else ""
            )
            place = ""
            if report is not None and config.train.report and exit_code == EXIT_DONE:
                watchdog.at("reporting", slow=True)
                place = report(config, program, run.state.params, data, workdir, run.step)
            if is_process_zero():
                print_result(run.farewell(workdir_name, exit_code, text, place))
    return exit_code


def agreed_data(config: Config, workdir: str | None, **options: Any) -> tuple[Config, DataBundle]:
    """`load_data`, in every process the same, as are the options; what goes wrong in one is the error of all."""
    coordination.same_command(config, **options)
    mesh_lib.make_mesh(config.mesh)  # refused, where it is to be, before the data take long
    config, data = coordination.on_all(lambda: load_data(config, workdir))
    found = {f"data.{name}": data.record.get(name) for name in ("sha256", "tokenizer")}
    coordination.assert_same(found, "give every machine the same data and the same interpreter")
    if "bits_per_byte" in data.record:
        say_early(
            f"uoe: bits_per_byte is {data.record['bits_per_byte']}, so they cannot be told with this tokenizer"
        )
    return config, data


def say_early(text: str) -> None:
    """Shows a line before there is a progress bar."""
    if is_process_zero():
        print(text, file=sys.stderr, flush=True)


def open_writer(workdir: epath.Path, start: int, owed: bool = False) -> MetricsWriter | Silent:
    """The writer of metrics in process 0; its errors are those of all. owed: the evaluation of `start` is done again."""
    made: list[MetricsWriter] = []
    on_process_zero(
        lambda: made.append(MetricsWriter(workdir, resume_step=start or None, owed=owed))
    )
    return made[0] if made else Silent()

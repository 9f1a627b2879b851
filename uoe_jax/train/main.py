"""`uoe train`: the order of a run, and what it says at its start and end. `loop` has the steps."""

import contextlib
import dataclasses
import functools
import shlex
import sys
from typing import Any, Callable

import jax
import numpy as np
from etils import epath

from uoe_jax.config.load import with_vocabulary
from uoe_jax.config.schema import Config, GenerateConfig
from uoe_jax.data.pipeline import DataBundle, default_cache_dir, load
from uoe_jax.data.tokenizers.base import Tokenizer
from uoe_jax.data.tokenizers.load import keep_tokenizer, read_tokenizer
from uoe_jax.distributed import coordination, watchdog
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.coordination import is_process_zero, on_all, on_process_zero
from uoe_jax.distributed.setup import cost_of_determinism, describe_devices
from uoe_jax.errors import EXIT_DONE, RunError
from uoe_jax.runtime_env import print_result
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.loop import Run
from uoe_jax.train.metadata import list_checkpoints
from uoe_jax.train.metrics import MetricsWriter, NullWriter, read_metrics
from uoe_jax.train.progress import Progress
from uoe_jax.train.restore import check_init_from, first_state
from uoe_jax.train.signals import StopSignal
from uoe_jax.train.step import Params, Program, build
from uoe_jax.train.task import measures_text
from uoe_jax.workdir import check_record, enter_workdir, locate, release

_GO_ON = "the same command goes on from there"
Sample = Callable[[Config, Program, Params, Tokenizer], str]
Report = Callable[[Config, Program, Params, DataBundle, epath.Path, int], str]


def train(config: Config, workdir_name: str, sample: Sample, report: Report | None = None) -> int:
    """Trains the configured model in a workdir, or continues the run there; returns the exit code.

    A metrics line of step s, a checkpoint s and `state.step` = s all mean the state after s steps.
    sample: generates the text shown at the end. report: writes the report of the run (train.report)
    and returns its path, "" where that failed; it raises nothing.
    """
    with StopSignal() as signal, contextlib.ExitStack() as stack:
        # 1. Data, mesh and program. Nothing is written before all of them are accepted.
        watchdog.at("preparing the data", slow=True)
        config, data = agreed_data(config, workdir_name)
        mesh = mesh_lib.make_mesh(config.mesh)
        checkpoints = locate(workdir_name) / "checkpoints"
        if config.train.init_from and not on_process_zero(lambda: [*list_checkpoints(checkpoints)]):
            check_init_from(config, data.record.get("tokenizer"), print_status)
        stack.enter_context(jax.set_mesh(mesh))
        program = build(config, mesh)

        # 2. The workdir: locked, with configuration, record of the data and tokenizer.
        workdir = enter_workdir(workdir_name, config)
        stack.callback(release, workdir)
        on_process_zero(lambda: check_record(workdir, data.record))
        on_process_zero(lambda: keep_tokenizer(workdir, data.tokenizer))
        keep = config.checkpoint
        store = stack.enter_context(CheckpointStore(workdir, keep.keep_latest, keep.keep_best))

        # 3. Resume from the newest good checkpoint; else start from init_from; else initialise.
        watchdog.at("restoring", slow=True)
        state, start, owed = first_state(program, store, config, print_status)

        # 4. Per step: evaluate if due (the state about to be trained) -> save if due -> stop if
        #    asked -> fetch batch(step) -> dispatch the step -> read the previous step -> log.
        #    At the end: evaluate, save, and measure the test split if that is due.
        progress = Progress(config.train.steps, start, silent=not is_process_zero())
        writer = functools.partial(open_writer, workdir)
        run = Run(config, data, program, store, writer, progress, state, start, owed)
        try:
            progress.print(start_text(config, program, data, workdir_name, start))
            exit_code = run.go(signal)
            run.writer.close()
        finally:
            progress.close()
            with contextlib.suppress(RunError):  # an error under way matters more
                run.writer.close()

        # 5. What came of it: a sample, the report, the last measures.
        finish(run, exit_code, workdir_name, sample, report)
    return exit_code


def finish(run: Run, exit_code: int, workdir: str, sample: Sample, report: Report | None) -> None:
    """Makes the sample and the report of a run that ended; process 0 says what came of it."""
    config, data, params = run.config, run.data, run.state.params
    stopped, done = exit_code != EXIT_DONE, run.step == config.train.steps
    watchdog.at("generating", slow=True)
    prompt = text = place = ""
    if done and not stopped and config.model.task == "language" and data.tokenizer:
        print_status("generating a sample …")
        prompt = sample_prompt(config, data)
        generate = dataclasses.replace(config.generate, prompt=prompt)
        asked = dataclasses.replace(config, generate=generate)
        text = sample(asked, run.program, params, data.tokenizer)
    if report is not None and config.train.report and not stopped:
        watchdog.at("reporting", slow=True)
        print_status("writing the report …")
        root = run.store.directory.parent
        place = report(config, run.program, params, data, root, run.step)
    if not is_process_zero():
        return  # metrics.jsonl is read in process 0 alone
    if done and not stopped:
        print_result(end_text(config, workdir, run.step, prompt, text, place))
    elif stopped:
        print_result(f"stopped at step {run.step} with everything saved; {_GO_ON}")
    else:
        print_result(f"step {run.step} of {config.train.steps} reached and saved; {_GO_ON}")


def load_data(config: Config, workdir: str | None = None) -> tuple[Config, DataBundle]:
    """The data, and the configuration with their sizes; `workdir` may hold its tokenizer."""
    tokenizer = read_tokenizer(workdir) if workdir else None
    bundle = load(config, default_cache_dir(), tokenizer)
    return with_vocabulary(config, bundle.vocab_size), bundle


def agreed_data(config: Config, workdir: str | None, **options: Any) -> tuple[Config, DataBundle]:
    """`load_data`, checked to be the same in every process, as are the options."""
    coordination.same_command(config, **options)
    mesh_lib.make_mesh(config.mesh)  # a bad mesh is refused before the data take long
    config, data = on_all(lambda: load_data(config, workdir))
    found = {f"data.{name}": data.record.get(name) for name in ("sha256", "tokenizer")}
    coordination.assert_same(found, "give every machine the same data and the same interpreter")
    if why := data.record.get("bits_per_byte"):
        print_status(f"uoe: bits_per_byte is {why}")
    return config, data


def print_status(text: str) -> None:
    """Prints a line on stderr in process 0, before there is a progress bar."""
    if is_process_zero():
        print(text, file=sys.stderr, flush=True)


def open_writer(workdir: epath.Path, start: int, owed: bool = False) -> MetricsWriter | NullWriter:
    """The writer of metrics in process 0; its errors are those of all processes."""
    if is_process_zero():
        return on_all(lambda: MetricsWriter(workdir, start or None, owed=owed))
    return on_all(NullWriter)


def start_text(config: Config, program: Program, data: DataBundle, workdir: str, start: int) -> str:
    """The run, its model, devices and data; start: steps done before."""
    m, t = config.model, config.train
    n_params = sum(x.size for x in jax.tree.leaves(program.abstract.params))
    where = f"resuming at step {start}" if start else "starting"
    if start >= t.steps:
        where = f"nothing left to train, {start} of {t.steps} steps are done,"
    deterministic = f"; deterministic: {cost_of_determinism()}" if t.deterministic else ""
    return (
        f"{where} in {workdir}: {m.attention} + {m.mlp}, {m.n_layers} layers, D={m.d_model}, "
        f"{n_params / 1e6:.2f}M parameters, {t.steps} steps of {t.batch_size} x {m.context_length} "
        f"tokens on {describe_devices()}{deterministic}\n"
        f"data: {config.data.source}, {data.described()}"
    )


def end_text(config: Config, workdir: str, step: int, prompt: str, sample: str, report: str) -> str:
    """The last measures of a finished run, a sample, and commands to go on with."""
    lines = []
    records = read_metrics(workdir)
    for prefix, split in (("eval", "validation"), ("test", "test")):
        if found := [record for record in records if f"{prefix}/loss" in record]:
            last, at = found[-1], f"{split} at step {found[-1].get('test/step', found[-1]['step'])}"
            if prefix == "test" and last["step"] != step:
                at += f" of a run of {last['step']}, and not measured again"
            lines.append(f"{at}: {measures_text(last, prefix, config)}")
    if sample:
        lines += ["a sample:", *("  | " + line for line in sample.splitlines())]
    if report:
        lines.append(f"report: {report}")
    option = shlex.quote(f"--workdir={workdir}")
    if sample or not config.eval.test:
        lines.append("next:")
    if not config.eval.test:
        lines.append(f"  uoe eval {option} --split=test")
    if sample:
        lines.append(f"  uoe generate {option} --prompt={shlex.quote(prompt)}")
    return "\n".join(lines)


def sample_prompt(config: Config, data: DataBundle) -> str:
    """generate.prompt; of data other than Python code, first words instead of its default."""
    default = config.generate.prompt
    if default != GenerateConfig().prompt or config.data.source == "stdlib":
        return default
    assert data.tokenizer is not None
    row = data.validation[0]
    tokens, segments = np.asarray(row["tokens"]), np.asarray(row["segments"])
    n_tokens = max(1, min(32, config.model.context_length // 4))
    text = data.tokenizer.decode(tokens[segments == segments[0]][:n_tokens])
    words = text.replace("\N{REPLACEMENT CHARACTER}", "").split()
    return " ".join(words[:3]) or default

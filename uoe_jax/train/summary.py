"""What `uoe train` prints when it starts and when it ends."""

import shlex
from typing import Any

import jax
import numpy as np

from uoe_jax.config.schema import Config, GenerateConfig
from uoe_jax.data.pipeline import DataBundle
from uoe_jax.distributed.setup import cost_of_determinism, describe_devices
from uoe_jax.train.metrics import read_metrics
from uoe_jax.train.step import Program
from uoe_jax.train.task import task_of


def measures_text(measures: dict[str, Any], prefix: str, config: Config) -> str:
    """The measures of an evaluation in a line; their keys begin with `prefix/`."""
    own = without_prefix(measures, prefix)
    return f"loss {own['loss']:.4f}, {task_of(config).summary(own)} ({own['rows']} rows)"


def without_prefix(measures: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Measures by the names that their task gives them."""
    return {name.removeprefix(f"{prefix}/"): value for name, value in measures.items()}


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

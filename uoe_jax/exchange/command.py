"""The commands `uoe import` and `uoe export`, from their options on."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Mapping

from uoe_jax.config.schema import Config
from uoe_jax.data.tokenizers.base import Tokenizer
from uoe_jax.distributed import coordination
from uoe_jax.errors import UserError

FORMATS = ("safetensors", "hf", "stablehlo")
DTYPES = ("float32", "bfloat16", "float16")


def _tokenizer(config: Config, workdir: str) -> Tokenizer | None:
    """The run's tokenizer; None of an imported model that came without one."""
    from uoe_jax.data.tokenizers.workdir import read_tokenizer, tokenizer_of_run
    from uoe_jax.exchange.importing import SOURCE
    from uoe_jax.workdir import locate

    if (locate(workdir) / SOURCE).is_dir() and read_tokenizer(workdir) is None:
        return None
    return tokenizer_of_run(config, workdir)


def run_import(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Raises UserError for what cannot be imported."""
    from uoe_jax.distributed import setup
    from uoe_jax.exchange.plan_import import plan

    found = plan(
        options.source,
        options.config,
        options.experts,
        options.k,
        options.capacity,
        overrides,
        options.workdir,
    )
    setup.start(found.config)
    from uoe_jax.exchange.importing import import_model

    import_model(found, options.workdir)
    start = (
        f"--config={options.workdir}/config.json",
        f"--config.train.init_from={options.workdir}",
    )
    print(f"{options.workdir}: imported; next: uoe train {shlex.join(start)} --workdir=DIR")


def run_export(options: argparse.Namespace, config: Config) -> None:
    """Raises UserError for what cannot be exported; RunError where what was written is not what it should be."""
    if options.routed and options.format != "hf":
        raise UserError(
            f"--routed: is for --format=hf; --format={options.format} has the routed model as it is"
        )
    if options.dtype != "float32" and options.format == "stablehlo":
        raise UserError(
            f"--dtype={options.dtype}: is for safetensors and hf; StableHLO has the weights as they are"
        )
    from uoe_jax.distributed import setup

    setup.start(config)
    from uoe_jax.exchange import exporting
    from uoe_jax.exchange.importing import SOURCE
    from uoe_jax.exchange.stablehlo import export_stablehlo
    from uoe_jax.exchange.whole import whole_directory
    from uoe_jax.train.restore import restored
    from uoe_jax.workdir import locate

    if coordination.are_several():
        raise UserError(
            f"--out={options.out}: a model is exported by one process; start this once, and not by srun or its like"
        )
    m, source = config.model, locate(options.workdir) / SOURCE
    with restored(config, options.workdir, options.step) as run:
        if options.format == "stablehlo":
            export_stablehlo(config, run.params, locate(options.out, "--out"))
        else:
            tokenizer = _tokenizer(config, options.workdir) if m.task == "language" else None
            with whole_directory(options.out, "--out") as out:
                target = exporting.Target(out, options.dtype, options.lossy, source)
                if options.format == "safetensors":
                    exporting.export_safetensors(config, run.params, tokenizer, target)
                elif options.routed:
                    exporting.export_routed(config, run.params, tokenizer, target)
                else:
                    exporting.export_dense(config, run.params, tokenizer, target)
    fewer = [
        f"{r.k} of {r.n_experts} experts in {name}"
        for name, r in m.unions().items()
        if r.k < r.n_experts
    ]
    if options.format == "hf" and not options.routed and fewer:
        merged = "merged into a dense model of all experts, where the run chooses"
        print(f"uoe: {merged} {', '.join(fewer)}; --routed keeps that", file=sys.stderr)
    print(f"{options.out}: step {run.step}, written and compared")

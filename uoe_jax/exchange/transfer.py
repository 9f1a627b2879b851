"""The commands `uoe import` and `uoe export`, from their options on."""

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


def _check_alone(what: str) -> None:
    if coordination.are_several():
        raise UserError(f"{what} by one process; start this once, and not by srun or its like")


def run_import(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """Raises UserError for what cannot be imported."""
    from uoe_jax.distributed import setup
    from uoe_jax.exchange.plan_import import plan

    o, workdir = options, options.workdir
    found = plan(o.source, o.config, o.experts, o.k, o.capacity, overrides, workdir)
    setup.start(found.config)
    _check_alone(f"--workdir={workdir}: a model is imported")
    from uoe_jax.exchange.importing import import_model

    import_model(found, workdir)
    start = f"--config={workdir}/config.json", f"--config.train.init_from={workdir}"
    print(f"{workdir}: imported; next: uoe train {shlex.join(start)} --workdir=DIR")


def run_export(options: argparse.Namespace, config: Config) -> None:
    """Writes the directory `options.out`.

    Raises:
      UserError: what cannot be exported. RunError: what was written is not what it should be.
    """
    form, dtype = options.format, options.dtype
    if options.routed and form != "hf":
        why = f"is for --format=hf; --format={form} has the routed model as it is"
        raise UserError(f"--routed: {why}")
    if dtype != "float32" and form == "stablehlo":
        why = "is for safetensors and hf; StableHLO has the weights as they are"
        raise UserError(f"--dtype={dtype}: {why}")
    from uoe_jax.distributed import setup

    setup.start(config)
    _check_alone(f"--out={options.out}: a model is exported")
    from uoe_jax.exchange import exporting
    from uoe_jax.exchange.importing import SOURCE
    from uoe_jax.exchange.stablehlo import export_stablehlo
    from uoe_jax.exchange.whole import whole_directory
    from uoe_jax.train.restore import restored
    from uoe_jax.workdir import locate

    m, source = config.model, locate(options.workdir) / SOURCE
    export = exporting.export_routed if options.routed else exporting.export_dense
    if form == "safetensors":
        export = exporting.export_safetensors
    with restored(config, options.workdir, options.step) as run:
        if form == "stablehlo":
            export_stablehlo(config, run.params, locate(options.out, "--out"))
        else:
            tokenizer = _tokenizer(config, options.workdir) if m.task == "language" else None
            with whole_directory(options.out, "--out") as out:
                target = exporting.Target(out, dtype, options.lossy, source)
                export(config, run.params, tokenizer, target)
    routed = {name: r for name, r in m.unions().items() if r.k < r.n_experts}
    chosen = ", ".join(f"{r.k} of {r.n_experts} experts in {name}" for name, r in routed.items())
    if form == "hf" and not options.routed and chosen:
        merged = "merged into a dense model of all experts, where the run chooses"
        print(f"uoe: {merged} {chosen}; --routed keeps that", file=sys.stderr)
    print(f"{options.out}: step {run.step}, written and compared")

"""The commands `uoe import` and `uoe export`, from their options on."""

import argparse
import shlex
from typing import Mapping

from uoe_jax.config.schema import Config
from uoe_jax.distributed import coordination
from uoe_jax.errors import UserError
from uoe_jax.runtime_env import notice

FORMATS = ("safetensors", "hf", "stablehlo")
DTYPES = ("float32", "bfloat16", "float16")


def _check_alone(what: str) -> None:
    if coordination.are_several():
        raise UserError(f"{what} by one process; start this once, and not by srun or its like")


def run_import(options: argparse.Namespace, overrides: Mapping[str, str]) -> None:
    """UserError for what cannot be imported."""
    from uoe_jax.distributed import setup
    from uoe_jax.exchange.plan_import import plan

    o, workdir = options, options.workdir
    routing = {"n_experts": o.experts, "k": o.k, "capacity_factor": o.capacity}
    found = plan(o.source, o.config, routing, overrides, workdir)
    setup.start(found.config)
    _check_alone(f"--workdir={workdir}: a model is imported")
    from uoe_jax.exchange.importing import import_model

    import_model(found, workdir)
    start = f"--config={workdir}/config.json", f"--config.train.init_from={workdir}"
    print(f"{workdir}: imported; next: uoe train {shlex.join(start)} --workdir=DIR")


def run_export(options: argparse.Namespace, config: Config) -> None:
    """Writes `options.out`. UserError: it cannot be exported. RunError: it was not written well."""
    form, dtype = options.format, options.dtype
    if options.routed and form != "hf":
        raise UserError(
            f"--routed: is for --format=hf; --format={form} has the routed model anyway"
        )
    if dtype != "float32" and form == "stablehlo":
        raise UserError(f"--dtype={dtype}: is for safetensors and hf; stablehlo keeps the weights")
    from uoe_jax.distributed import setup

    setup.start(config)
    _check_alone(f"--out={options.out}: a model is exported")
    from uoe_jax.data.tokenizers.load import read_tokenizer, tokenizer_of_run
    from uoe_jax.exchange import exporting
    from uoe_jax.exchange.importing import SOURCE
    from uoe_jax.exchange.stablehlo import export_stablehlo
    from uoe_jax.exchange.tensors import whole_directory
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
            has_tokenizer = m.task == "language"
            if has_tokenizer and source.is_dir():  # it may have been imported without one
                has_tokenizer = read_tokenizer(options.workdir) is not None
            tokenizer = tokenizer_of_run(config, options.workdir) if has_tokenizer else None
            with whole_directory(options.out, "--out") as out:
                how = out, dtype, options.lossy, source
                export(exporting.Export(config, run.params, tokenizer, *how))
    routed = {name: r for name, r in m.unions().items() if r.k < r.n_experts}
    chosen = ", ".join(f"{r.k} of {r.n_experts} experts in {name}" for name, r in routed.items())
    if form == "hf" and not options.routed and chosen:
        merged = "merged into a dense model of all experts, where the run chooses"
        notice(f"{merged} {chosen}; --routed keeps that")
    print(f"{options.out}: step {run.step}, written and compared")

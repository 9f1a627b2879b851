"""`uoe eval`: one JSON line of measures, or one for every number of experts asked for."""

import argparse
import json
import math
from typing import Any

from uoe_jax.config.data import SOURCES
from uoe_jax.config.schema import Config
from uoe_jax.costs.flops import forward_flops_per_token
from uoe_jax.data.pipeline import DataBundle, default_cache_dir
from uoe_jax.data.registry import text_source
from uoe_jax.distributed import coordination
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.infer.experts import choices
from uoe_jax.train.evaluate import evaluate
from uoe_jax.train.main import agreed_data
from uoe_jax.train.progress import Progress
from uoe_jax.train.restore import restored
from uoe_jax.train.step import build
from uoe_jax.workdir import check_record


def run_eval(options: argparse.Namespace, config: Config) -> None:
    """Prints the measures of a split; UserError for data or experts that are not the run's."""
    split, experts = options.split, options.experts
    given = {"step": options.step, "split": split, "experts": experts}
    config, data = agreed_data(config, options.workdir, **given)
    coordination.on_process_zero(lambda: check_record(options.workdir, data.record, store=False))
    per_word = coordination.on_process_zero(lambda: targets_per_word(config, data, split))
    name = "test" if split == "test" else "eval"
    progress = Progress(0, silent=not coordination.is_process_zero())
    with restored(config, options.workdir, options.step) as run:
        for c in [config] if experts is None else choices(config, experts):
            program = run.program if c == config else build(c, run.program.mesh)
            rows = getattr(data, split)
            found, _ = evaluate(program, run.params, rows, c, name=name, progress=progress)
            line: dict[str, Any] = {"step": run.step, "split": split}
            if experts is not None:
                line["experts"] = {block: routing.k for block, routing in c.model.unions().items()}
                line["forward_flops_per_token"] = forward_flops_per_token(c.model)
            if per_word is not None:
                loss, most = found[f"{name}/loss"], 700.0  # JSON has no infinity
                found[f"{name}/perplexity"] = math.exp(min(loss, most))
                found[f"{name}/perplexity_per_word"] = math.exp(min(loss * per_word, most))
            if coordination.is_process_zero():
                print(json.dumps({**line, **found}), flush=True)


def targets_per_word(config: Config, data: DataBundle, split: str) -> float | None:
    """Targets of a split per word of its documents, separated by spaces; None without text."""
    if SOURCES[config.data.source].facts is not None:
        return None
    documents = text_source(config.data, default_cache_dir(), quiet=True).documents(split)
    words = sum(len(document.split()) for document in ticking(documents))
    return data.record["n_targets"][split] / max(words, 1)

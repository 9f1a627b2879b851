"""The command `uoe eval`: one JSON line of measures, or one for every number of experts asked for."""

from __future__ import annotations

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
from uoe_jax.train.restore import restored
from uoe_jax.train.step import build
from uoe_jax.workdir import check_record


def run_eval(options: argparse.Namespace, config: Config) -> None:
    """Raises UserError for data or experts that are not the run's."""
    config, data = agreed_data(
        config, options.workdir, step=options.step, split=options.split, experts=options.experts
    )
    coordination.on_process_zero(lambda: check_record(options.workdir, data.record, store=False))
    per_word = coordination.on_process_zero(lambda: targets_per_word(config, data, options.split))
    with restored(config, options.workdir, options.step) as run:
        for c in [config] if options.experts is None else choices(config, options.experts):
            program = run.program if c == config else build(c, run.program.mesh)
            found, _ = evaluate(program, run.params, getattr(data, options.split), c)
            line: dict[str, Any] = {"step": run.step, "split": options.split}
            if options.experts is not None:
                line["experts"] = {name: routing.k for name, routing in c.model.unions().items()}
                line["forward_flops_per_token"] = forward_flops_per_token(c.model)
            if per_word is not None:
                found |= perplexities(found["eval/loss"], per_word)
            if coordination.is_process_zero():
                print(json.dumps({**line, **found}), flush=True)


def targets_per_word(config: Config, data: DataBundle, split: str) -> float | None:
    """Targets of a split for every word of its documents, words being what spaces part; None where nothing is text."""
    if SOURCES[config.data.source].facts is not None:
        return None
    documents = text_source(config.data, default_cache_dir(), quiet=True).documents(split)
    words = sum(len(document.split()) for document in ticking(documents))
    return data.record["n_targets"][split] / max(words, 1)


def perplexities(loss: float, per_word: float) -> dict[str, float]:
    """Of a mean loss in nats per target: exp of it, and exp of the nats that a word takes, whatever the tokens are."""
    return {"eval/perplexity": _exp(loss), "eval/perplexity_per_word": _exp(loss * per_word)}


def _exp(x: float) -> float:
    """JSON knows no infinity."""
    return math.exp(min(x, 700.0))

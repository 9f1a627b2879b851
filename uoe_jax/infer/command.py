"""The command `uoe generate`: prompts from the command line, a file or a person, and what follows them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any, TextIO

from uoe_jax import config as config_lib
from uoe_jax import processes
from uoe_jax.config import Config
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.infer.experts import choices
from uoe_jax.workdir import locate, os_errors, write_asked


def configured(options: argparse.Namespace, config: Config) -> Config:
    """The run's configuration with what the options say of drawing and of experts.

    Raises:
      UserError: values that cannot be used, or options that do not go together.
    """
    values = config_lib.to_dict(config)
    for name, _, _ in config_lib.leaves(config_lib.GenerateConfig()):
        text = getattr(options, name)
        if text is not None:
            values["generate"][name] = config_lib.parse_value(f"generate.{name}", text)
    config = dataclasses.replace(config, generate=config_lib.from_dict(values).generate)
    if config.model.task != "language":
        raise ConfigError("config.model.task", config.model.task, "gives classes and no text; use uoe eval")
    given = [f"--{name}" for name in ("prompt", "prompts", "chat") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]}: prompts come from one place; give one of these")
    if options.out and not options.prompts:
        raise UserError(f"--out={options.out}: is for --prompts=FILE; a single text goes to the screen")
    if "" in options.stop:
        raise UserError("--stop: an empty string ends every text before it begins; give one with characters, or leave it out")
    if not (options.batch.isdecimal() and 0 < int(options.batch) < 1_000_000):
        raise UserError(f"--batch={config_lib.printable(options.batch)}: give a whole number from 1 on")
    if options.experts is None:
        return config
    found = choices(config, options.experts)
    if len(found) > 1:
        raise UserError(f"--experts={options.experts}: a text is written with one K; give one number")
    return found[0]


def run_generate(options: argparse.Namespace, config: Config) -> None:
    """Raises UserError for prompts that cannot be read or do not fit."""
    config = configured(options, config)
    prompts = read_prompts(options.prompts) if options.prompts else []
    from uoe_jax import runtime

    runtime.start(config)
    from uoe_jax.data.kept import tokenizer_of_run
    from uoe_jax.infer.sample import Sampler
    from uoe_jax.train.restore import restored

    processes.same_command(config, step=options.step, stop=options.stop, prompts=prompts)
    tokenizer = tokenizer_of_run(config, options.workdir)
    with restored(config, options.workdir, options.step) as run:
        sampler = Sampler(config, run.program.model, run.params, tokenizer)
        if options.chat:
            chat(sampler, options.stop, sys.stdin)
        elif options.prompts:
            _write(options.out, sampler.complete(prompts, options.stop, batch=int(options.batch)))
        else:
            _one(sampler, options)
        _report(sampler, run.step)


def read_prompts(name: str) -> list[str]:
    """The prompts of a file: one a line, or of .jsonl the key "prompt" of every line; empty lines of text are left out.

    Raises:
      UserError: it cannot be read, or holds none.
    """
    try:
        with os_errors(name):
            lines = locate(name, "--prompts").read_text().split("\n")
        lines = [line.removesuffix("\r") for line in lines if line.strip()]
        found = [json.loads(line)["prompt"] for line in lines] if name.endswith(".jsonl") else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f'--prompts={name}: cannot be read ({reason}); give text, one prompt a line, or .jsonl of {{"prompt": "…"}}') from error
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise UserError(f"--prompts={name}: holds no prompts; give text, one prompt a line, or .jsonl of objects with the text \"prompt\"")
    return found


def _write(out: str | None, completions: list[Any]) -> None:
    if not processes.is_first():
        return
    lines = "".join(
        json.dumps({"prompt": c.prompt, "text": c.followed, "tokens": c.n_tokens, "ended": c.ended}, ensure_ascii=False) + "\n"
        for c in completions
    )
    if not out:
        print(lines, end="", flush=True)
        return
    write_asked(out, lines)


def _show(text: str) -> None:
    if processes.is_first():
        print(text, end="", flush=True)


def _one(sampler: Any, options: argparse.Namespace) -> None:
    """The one prompt and what follows it, as it is drawn."""
    prompt = sampler.config.generate.prompt
    if options.no_stream:
        completion = sampler.complete([prompt], options.stop)[0]
        _show(completion.text)
    else:
        sampler.encoded(prompt)  # what cannot be continued is not shown
        _show(prompt)
        completion = sampler.complete([prompt], options.stop, show=lambda _, text: _show(text))[0]
    _show("\n")
    if processes.is_first():
        why = {"document": "end of document", "stop": "stop string", "limit": f"limit of {completion.n_tokens} tokens"}
        print(f"[{why[completion.ended]}]", file=sys.stderr)


def chat(sampler: Any, stops: list[str], lines: TextIO) -> None:
    """Continues the text so far with every line of a person, raw; an empty line or the end of input ends it.

    What no longer fits the context is forgotten from the beginning, and said so.
    """
    if processes.are_several():
        raise UserError("--chat: one person speaks with one process; start this once, and not by srun or its like")
    text, turn = "", 0
    while True:
        if lines.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = lines.readline()
        if not line.strip():
            return
        text += line
        kept = fitting(sampler, text)
        if kept != text:
            print(f"[the context is full: the first {len(text) - len(kept)} characters are forgotten]", file=sys.stderr)
        completion = sampler.complete([kept], stops, first=turn, show=lambda _, more: _show(more))[0]
        text, turn = completion.text if completion.followed.endswith("\n") else completion.text + "\n", turn + 1
        _show("" if completion.followed.endswith("\n") else "\n")


def fitting(sampler: Any, text: str) -> str:
    """The end of a text that leaves room for an answer in the context: what is asked for, or a quarter of the context."""
    context = sampler.config.model.context_length
    room = max(1, context - 1 - min(sampler.config.generate.max_tokens, max(1, context // 4)))
    if len(sampler.tokenizer.encode(text)) <= room:
        return text
    low, high = 0, len(text)  # characters to drop; fewer tokens follow from fewer characters
    while low < high:
        middle = (low + high) // 2
        if len(sampler.tokenizer.encode(text[middle:])) <= room:
            high = middle
        else:
            low = middle + 1
    return text[low:]


def _report(sampler: Any, step: int) -> None:
    from uoe_jax.memory import cache_bytes

    if not processes.is_first():
        return
    m = sampler.config.model
    dense = cache_bytes(m, rows=1, dense=True)
    rate = f"{sampler.timed / sampler.seconds:.1f} tokens/s once compiled" if sampler.timed else "too few tokens to time"
    experts = "".join(f"{r.k} of {r.n_experts} experts in {name}; " for name, r in m.unions().items())
    print(f"[step {step}: {experts}{rate}]", file=sys.stderr)
    if sampler.cache_bytes:
        print(
            f"[cache of {m.context_length} tokens: {sampler.cache_bytes / 1e3:.1f} kB, "
            f"{sampler.cache_bytes / dense:.2f} of the {dense / 1e3:.1f} kB of dense attention]",
            file=sys.stderr,
        )

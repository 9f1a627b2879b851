"""The command `uoe generate`: prompts from the command line, a file or a person, and what follows them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from typing import Any, TextIO

from uoe_jax import config as config_lib
from uoe_jax.config.schema import Config
from uoe_jax.data.sources.formats import JSON_LINES, json_of, keys_of, other_format
from uoe_jax.distributed import coordination
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.infer.experts import choices
from uoe_jax.runtime_env import takes_utf8
from uoe_jax.workdir import locate, os_errors, write_out

_LINES = "start it in a terminal, or send it lines"


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
        raise ConfigError(
            "config.model.task", config.model.task, "gives classes and no text; use uoe eval"
        )
    given = [f"--{name}" for name in ("prompt", "prompts", "chat") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(
            f"{given[0]} and {given[1]}: prompts come from one place; give one of these"
        )
    if options.out and not options.prompts:
        raise UserError(
            f"--out={options.out}: is for --prompts=FILE; a single text goes to the screen"
        )
    if "" in options.stop:
        raise UserError(
            "--stop: an empty string ends every text before it begins; give one with characters, or leave it out"
        )
    if not (options.batch.isdecimal() and 0 < int(options.batch) < 1_000_000):
        raise UserError(
            f"--batch={config_lib.printable(options.batch)}: give a whole number from 1 on"
        )
    if options.experts is None:
        return config
    found = choices(config, options.experts)
    if len(found) > 1:
        raise UserError(
            f"--experts={options.experts}: a text is written with one K; give one number"
        )
    return found[0]


def run_generate(options: argparse.Namespace, config: Config) -> None:
    """Raises UserError for prompts that cannot be read or do not fit."""
    config = configured(options, config)
    if options.chat and sys.stdin is None:
        raise UserError(f"--chat: standard input is closed; {_LINES}")
    prompts = read_prompts(options.prompts) if options.prompts else {}
    from uoe_jax.distributed import setup

    setup.start(config)
    from uoe_jax.data.tokenizers.workdir import tokenizer_of_run
    from uoe_jax.infer.sample import Sampler
    from uoe_jax.train.restore import restored

    texts = list(prompts.values())
    coordination.same_command(config, step=options.step, stop=options.stop, prompts=texts)
    tokenizer = tokenizer_of_run(config, options.workdir)
    with restored(config, options.workdir, options.step) as run:
        sampler = Sampler(config, run.program.model, run.params, tokenizer)
        if options.chat:
            chat(sampler, options.stop, sys.stdin)
        elif options.prompts:
            for number, prompt in prompts.items():
                sampler.encoded(prompt, f"--prompts={options.prompts}: line {number}")
            _write(options.out, sampler.complete(texts, options.stop, batch=int(options.batch)))
        else:
            _one(sampler, options)
        _report(sampler, run.step)


def read_prompts(name: str) -> dict[int, str]:
    """The prompts of a file by the number of their line, from 1.

    They are the lines, or of JSON lines the key "prompt" of every line. A file is JSON lines by its
    name or by its first line. Lines without text are left out.

    Raises:
      UserError: it cannot be read or holds none; or, with its line, one is no prompt.
    """
    wanted = 'give text, one prompt a line, or JSON lines of {"prompt": "…"}'
    try:
        with os_errors(name):
            data = locate(name, "--prompts").read_bytes()
        if other := other_format(data):
            raise UserError(f"--prompts={name}: {other}; {wanted}")
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--prompts={name}: cannot be read ({reason}); {wanted}") from error
    numbered = enumerate(re.split("\r\n|\r|\n", text), 1)
    found = {number: line for number, line in numbered if line.strip()}
    first = json_of(next(iter(found.values()), ""))
    if name.lower().endswith(JSON_LINES) or isinstance(first, dict):
        where = f"--prompts={name}: line"
        found = {number: _prompt_of(line, f"{where} {number}") for number, line in found.items()}
    else:
        whole = json_of(text) if text.lstrip().startswith(("{", "[")) else None
        parts = [whole, *whole] if isinstance(whole, list) else [whole]
        if any(isinstance(part, dict) for part in parts):
            raise UserError(f"--prompts={name}: is one JSON value and not JSON lines; {wanted}")
    if not found:
        raise UserError(f"--prompts={name}: holds no prompts; {wanted}")
    return found


def _prompt_of(line: str, where: str) -> str:
    found = json_of(line)
    prompt = found.get("prompt") if isinstance(found, dict) else None
    if not isinstance(prompt, str):
        has = f" with {keys_of(found)}" if isinstance(found, dict) else ""
        what = "no JSON" if found is None else f"JSON{has}"
        wanted = 'JSON lines have an object with the text "prompt"'
        raise UserError(f"{where}: is {what} where {wanted}; mend the line")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"{where}: its prompt holds half a character (a surrogate); mend the line")
    return prompt


def _write(out: str | None, completions: list[Any]) -> None:
    if not coordination.is_process_zero():
        return
    # JSON is UTF-8; where the screen is not, other characters are escaped.
    escaped = not out and not takes_utf8(sys.stdout)
    found = [
        {"prompt": c.prompt, "text": c.followed, "tokens": c.n_tokens, "ended": c.ended}
        for c in completions
    ]
    lines = "".join(json.dumps(one, ensure_ascii=escaped) + "\n" for one in found)
    if not out:
        print(lines, end="", flush=True)
        return
    write_out(out, lines)


def _show(text: str) -> None:
    if coordination.is_process_zero():
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
    if coordination.is_process_zero():
        why = {
            "document": "end of document",
            "stop": "stop string",
            "limit": f"limit of {completion.n_tokens} tokens",
        }
        print(f"[{why[completion.ended]}]", file=sys.stderr)


def chat(sampler: Any, stops: list[str], lines: TextIO) -> None:
    """Continues the text so far with every line of a person, raw; an empty line or the end of input ends it.

    What no longer fits the context is forgotten from the beginning, and said so.
    """
    if coordination.are_several():
        raise UserError(
            "--chat: one person speaks with one process; start this once, and not by srun or its like"
        )
    text, turn = "", 0
    while True:
        if lines.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = lines.readline()
        except (OSError, UnicodeError) as error:
            raise UserError(f"--chat: standard input cannot be read ({error}); {_LINES}") from error
        if not line.strip():
            return
        text += line.removeprefix("\ufeff")  # of a file in the place of a person
        kept = fitting(sampler, text)
        if kept != text:
            print(
                f"[the context is full: the first {len(text) - len(kept)} characters are forgotten]",
                file=sys.stderr,
            )
        completion = sampler.complete([kept], stops, first=turn, show=lambda _, more: _show(more))[
            0
        ]
        text, turn = (
            completion.text if completion.followed.endswith("\n") else completion.text + "\n",
            turn + 1,
        )
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
    from uoe_jax.costs.memory import cache_bytes

    if not coordination.is_process_zero():
        return
    m = sampler.config.model
    dense = cache_bytes(m, rows=1, dense=True)
    rate = (
        f"{sampler.timed / sampler.seconds:.1f} tokens/s once compiled"
        if sampler.timed
        else "too few tokens to time"
    )
    experts = "".join(
        f"{r.k} of {r.n_experts} experts in {name}; " for name, r in m.unions().items()
    )
    print(f"[step {step}: {experts}{rate}]", file=sys.stderr)
    if sampler.cache_bytes:
        print(
            f"[cache of {m.context_length} tokens: {sampler.cache_bytes / 1e3:.1f} kB, "
            f"{sampler.cache_bytes / dense:.2f} of the {dense / 1e3:.1f} kB of dense attention]",
            file=sys.stderr,
        )

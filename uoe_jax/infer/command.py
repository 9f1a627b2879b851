"""`uoe generate`: prompts from the command line, a file or a terminal, and their continuations."""

import argparse
import bisect
import dataclasses
import json
import re
import sys
from typing import Any, TextIO

from uoe_jax import config as config_lib
from uoe_jax.config.schema import Config
from uoe_jax.data.sources.text import JSON_LINES, json_of, keys_of, other_format
from uoe_jax.distributed import coordination
from uoe_jax.errors import ConfigError, UserError, reason
from uoe_jax.infer.experts import choices
from uoe_jax.runtime_env import takes_utf8
from uoe_jax.workdir import locate, os_errors, write_out

_LINES = "start it in a terminal, or send it lines"


def configured(options: argparse.Namespace, config: Config) -> Config:
    """The run's configuration with the options for sampling and experts; UserError for bad ones."""
    values = config_lib.to_dict(config)
    for name in values["generate"]:
        if (text := getattr(options, name)) is not None:
            values["generate"][name] = config_lib.parse_value(f"generate.{name}", text)
    config = dataclasses.replace(config, generate=config_lib.from_dict(values).generate)
    if config.model.task != "language":
        remedy = "gives classes and no text; use uoe eval"
        raise ConfigError("config.model.task", config.model.task, remedy)
    problem, batch = "", options.batch
    given = [f"--{name}" for name in ("prompt", "prompts", "chat") if getattr(options, name)]
    if len(given) > 1:
        problem = f"{given[0]} and {given[1]}: prompts come from one place; give one of these"
    elif options.out and not options.prompts:
        problem = f"--out={options.out}: is for --prompts=FILE; a single text goes to the screen"
    elif "" in options.stop:
        remedy = "give one with characters, or leave it out"
        problem = f"--stop: an empty string ends every text before it begins; {remedy}"
    elif not (batch.isdecimal() and 0 < int(batch) < 1_000_000):
        problem = f"--batch={config_lib.printable(batch)}: give a whole number from 1 on"
    found = [config] if problem or options.experts is None else choices(config, options.experts)
    if len(found) > 1:
        problem = f"--experts={options.experts}: a text is written with one K; give one number"
    if problem:
        raise UserError(problem)
    return found[0]


def run_generate(options: argparse.Namespace, config: Config) -> None:
    """Prints continuations; UserError for prompts that cannot be read or do not fit."""
    config = configured(options, config)
    if options.chat and sys.stdin is None:
        raise UserError(f"--chat: standard input is closed; {_LINES}")
    prompts = read_prompts(options.prompts) if options.prompts else {}
    from uoe_jax.distributed import setup

    setup.start(config)
    from uoe_jax.data.tokenizers.load import tokenizer_of_run
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
            completions = sampler.complete(texts, options.stop, batch=int(options.batch))
            _write(options.out, completions)
            if cut := sum(c.cut for c in completions):
                _say(f"{cut} of {len(completions)} texts: {_full(sampler)}")
        else:
            _one(sampler, options)
        _report(sampler, run.step)


def read_prompts(name: str) -> dict[int, str]:
    """The prompts of a file by line number, from 1: its lines, or "prompt" of its JSON lines.

    A file has JSON lines by its name or by its first line. Empty lines are left out.
    """
    wanted = 'give text, one prompt a line, or JSON lines of {"prompt": "…"}'
    try:
        with os_errors(name):
            data = locate(name, "--prompts").read_bytes()
        if other := other_format(data):
            raise UserError(f"--prompts={name}: {other}; {wanted}")
        text = data.decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--prompts={name}: cannot be read ({reason(error)}); {wanted}") from error
    numbered = enumerate(re.split("\r\n|\r|\n", text), 1)
    found = {number: line for number, line in numbered if line.strip()}
    first = json_of(next(iter(found.values()), ""))
    if name.lower().endswith(JSON_LINES) or isinstance(first, dict):
        found = {n: _prompt_of(line, f"--prompts={name}: line {n}") for n, line in found.items()}
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
        raise UserError(f"{where}: is {what} where {wanted}; fix the line")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError(f"{where}: its prompt holds half a character (a surrogate); fix the line")
    return prompt


def _write(out: str | None, completions: list[Any]) -> None:
    # JSON is UTF-8; where the screen is not, other characters are escaped.
    escaped, lines = not out and not takes_utf8(sys.stdout), ""
    for c in completions:
        one = {"prompt": c.prompt, "text": c.followed, "tokens": c.n_tokens, "ended": c.ended}
        lines += json.dumps(one, ensure_ascii=escaped) + "\n"
    if not out:
        _show(lines)
    elif coordination.is_process_zero():
        write_out(out, lines)


def _show(text: str) -> None:
    if coordination.is_process_zero():
        print(text, end="", flush=True)


def _say(text: str) -> None:
    if coordination.is_process_zero():
        print(f"[{text}]", file=sys.stderr)


def _full(sampler: Any) -> str:
    """Why a text ended before --max_tokens."""
    context, limit = sampler.config.model.context_length, sampler.config.generate.max_tokens
    return f"the context of {context} tokens was full before --max_tokens={limit}"


def _one(sampler: Any, options: argparse.Namespace) -> None:
    """Shows the one prompt and its continuation, token by token or (no_stream) at once."""
    prompt = sampler.config.generate.prompt
    sampler.encoded(prompt)  # a prompt that cannot be continued is not shown
    if options.no_stream:
        completion = sampler.complete([prompt], options.stop)[0]
        _show(completion.text)
    else:
        _show(prompt)
        completion = sampler.complete([prompt], options.stop, show=lambda _, text: _show(text))[0]
    _show("\n")
    limit = f"limit of {completion.n_tokens} tokens"
    limit += f": {_full(sampler)}" if completion.cut else ""
    ends = {"document": "end of document", "stop": "stop string", "limit": limit}
    _say(ends[completion.ended])


def chat(sampler: Any, stops: list[str], lines: TextIO) -> None:
    """Continues the text so far with every line from the terminal, raw; an empty line ends it."""
    if coordination.are_several():
        remedy = "start this once, and not by srun or its like"
        raise UserError(f"--chat: one terminal works with one process; {remedy}")
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
        text += line.removeprefix("\ufeff")  # of a file that is piped in
        kept = fitting(sampler, text)
        if dropped := len(text) - len(kept):
            _say(f"the context is full: the first {dropped} characters are forgotten")
        show = lambda _, more: _show(more)  # noqa: E731
        (completion,) = sampler.complete([kept], stops, first=turn, show=show)
        newline = "" if completion.followed.endswith("\n") else "\n"
        text, turn = completion.text + newline, turn + 1
        _show(newline)


def fitting(sampler: Any, text: str) -> str:
    """The end of a text that leaves room in the context: max_tokens, at most a quarter of it."""
    context = sampler.config.model.context_length
    room = max(1, context - 1 - min(sampler.config.generate.max_tokens, max(1, context // 4)))
    fits = lambda dropped: len(sampler.tokenizer.encode(text[dropped:])) <= room  # noqa: E731
    return text if fits(0) else text[bisect.bisect_left(range(len(text)), True, key=fits) :]


def _report(sampler: Any, step: int) -> None:
    from uoe_jax.costs.memory import cache_bytes

    m, cache = sampler.config.model, sampler.cache_bytes
    parts = [f"{r.k} of {r.n_experts} experts in {name}" for name, r in m.unions().items()]
    rate = f"{sampler.timed / sampler.seconds:.1f} tokens/s once compiled" if sampler.timed else ""
    _say(f"step {step}: " + "; ".join([*parts, rate or "too few tokens to time"]))
    if cache:
        dense = cache_bytes(m, rows=1, dense=True)
        share = f"{cache / dense:.2f} of the {dense / 1e3:.1f} kB of dense attention"
        _say(f"cache of {m.context_length} tokens: {cache / 1e3:.1f} kB, {share}")

"""The commands of `uoe`: each checks its input, then imports the modules that need jax.

A command takes the parsed options and the overrides {key: text}, and returns an exit code or None.
"""

import argparse
import dataclasses
import json
import shlex
from collections.abc import Mapping

from uoe_jax import config as config_lib
from uoe_jax import runtime_env
from uoe_jax.compare.table import TableConfig, load_table
from uoe_jax.config import listing
from uoe_jax.config.baselines import ATTENTIONS, MLPS
from uoe_jax.config.data import sources_of
from uoe_jax.config.load import resolve
from uoe_jax.config.schema import Config
from uoe_jax.config.validate import check_training
from uoe_jax.data.registry import known_vocabulary, text_source
from uoe_jax.data.tokenizers.hf import HFTokenizer
from uoe_jax.data.tokenizers.load import check_tokenizer
from uoe_jax.errors import EXIT_DOES_NOT_FIT, EXIT_DONE, ConfigError, UserError, os_error_as
from uoe_jax.exchange.transfer import run_export
from uoe_jax.infer.command import run_generate
from uoe_jax.infer.experts import choices
from uoe_jax.runtime_env import default_cache_dir
from uoe_jax.workdir import checkpoint_path, is_remote, locate, os_errors, read_config, write_text

KEYS_PAGE = """\
# All keys

Every key of a configuration, with its default, the values it may have and its meaning. A key is set
in a config file, or by an override such as `--config.train.steps=100`
([configurations](configs.md)). Keys marked *free* may change when a run is resumed.

The same on the command line, with the values of a configuration:

```sh
uoe config --config=quickstart --changed
uoe config optimizer
uoe config '*.n_experts' --json
```

This page is the output of `uoe config --markdown`.

"""
TABLE_KEYS = (
    "## Keys of a comparison\n\nA config file of [`uoe compare`](compare.md) has these keys.\n\n"
)


def load_config(name: str, overrides: Mapping[str, str]) -> Config:
    """The configuration of `--config` with overrides, checked for `uoe train` (UserError)."""
    config = resolve(name, overrides)
    check_training(config, *known_vocabulary(config))
    return config


def train(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    config = load_config(options.config, overrides)
    _check_workdir(options.workdir)
    if config.train.init_from:
        checkpoint_path(config.train.init_from, "config.train.init_from")
    check_tokenizer(config, options.workdir)
    _start(config, stops_itself=True)
    from uoe_jax.infer.sample import sample
    from uoe_jax.report.build import at_end
    from uoe_jax.train.main import train

    return train(config, options.workdir, sample, at_end)


def show_config(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    if options.markdown:
        if options.config or options.pattern or options.changed or options.json or overrides:
            raise UserError("--markdown: prints the reference of all keys; give it alone")
        page = KEYS_PAGE + listing.as_markdown(Config()) + "\n" + TABLE_KEYS
        print(page + listing.as_markdown(TableConfig()).rstrip())
        return
    config = resolve(options.config, overrides)
    found = listing.selected(config, options.pattern, options.changed)
    print(listing.as_json(found) if options.json else listing.as_text(found))


def plan(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    from uoe_jax.plan import hardware, mesh_option

    config = load_config(options.config, overrides)
    for key, blocks in (("attention", ATTENTIONS), ("mlp", MLPS)):
        if getattr(config.model, key) in blocks:
            remedy = "a plan is made for unions of experts and dense blocks only; give one of these"
            raise ConfigError(f"config.model.{key}", getattr(config.model, key), remedy)
    hardware.find(options.hardware)
    devices = options.devices
    if devices is not None and not (devices.isdecimal() and int(devices)):
        raise UserError(f"--devices={devices}: give a whole number from 1 on")
    count = None if devices is None else int(devices)
    mesh = mesh_option.read_mesh(options.mesh, count, config.mesh)
    config = dataclasses.replace(config, mesh=mesh)
    config = config_lib.with_vocabulary(config, known_vocabulary(config)[0])
    if config.model.stem == "tokens" and not config.model.vocab_size:
        remedy = "words are counted when training starts; give their number for a plan"
        raise ConfigError("config.model.vocab_size", 0, remedy)
    from uoe_jax.plan import make, report

    found = make.make(config, options.hardware)
    print(json.dumps(report.as_json(found)) if options.json else report.text(found, options.config))
    return EXIT_DONE if found.least is None else EXIT_DOES_NOT_FIT


def compare(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    table = load_table(options.config, overrides)
    _check_workdir(options.workdir)
    from uoe_jax.compare.run import compare

    exit_code = compare(table, options.workdir)
    if exit_code == EXIT_DONE:
        from uoe_jax.compare.report import write

        runtime_env.print_result(write(table, locate(options.workdir)))
    return exit_code


def evaluate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = read_config(options.workdir)
    if options.experts is not None:
        choices(config, options.experts)
    _start(config)
    from uoe_jax.infer.evaluation import run_eval

    run_eval(options, config)


def generate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    run_generate(options, read_config(options.workdir))


def export(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    run_export(options, read_config(options.workdir))


def report(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    runs = options.workdirs
    if options.out is None and len(runs) > 1:
        raise UserError(f"--workdir: {len(runs)} runs are compared; name the report by --out=FILE")
    configs = [read_config(workdir) for workdir in runs]
    _start(configs[0])
    from uoe_jax.report.build import run_report

    print(run_report(options, configs))


def train_tokenizer(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    given, out = options.vocab, locate(options.out, "--out")
    number = given.isascii() and given.isdecimal() and len(given) < 8
    if not (number and 257 <= int(given) <= 1_000_000):
        shown = config_lib.printable(given)
        raise UserError(f"--vocab={shown}: give a whole number from 257 (bytes alone) to 1000000")
    if not is_remote(out) and (out.is_dir() or not out.parent.is_dir()):
        remedy = "is no place for a file; give a file name in a directory that exists"
        raise UserError(f"--out={options.out}: {remedy}")
    # Loaded with tokenizer='words', which needs neither a vocabulary size nor a tokenizer file.
    words = {"data.tokenizer": "words", "data.tokenizer_file": ""}
    data = load_config(options.config, overrides | words).data
    if data.source not in (known := sources_of("language")):
        remedy = f"is not a source of text; give one of {', '.join(known)}"
        raise ConfigError("config.data.source", data.source, remedy)
    source = text_source(data, default_cache_dir())
    tokenizer = HFTokenizer.train(source.documents("train"), int(given))
    n_bytes = n_tokens = 0
    for document in source.documents("validation"):
        n_bytes, n_tokens = n_bytes + len(document), n_tokens + len(tokenizer.encode(document))
    content = json.dumps(json.loads(tokenizer.to_json()), indent=2) + "\n"
    problem, remedy = f"--out={options.out}: cannot be written", "fix that, or give another file"
    with os_error_as(UserError, problem, remedy), os_errors(out):
        if not out.exists():
            write_text(out, content)
        elif out.read_bytes() != content.encode():
            why = "holds something else already; remove it, or give another file"
            raise UserError(f"--out={options.out}: {why}")
    size = f"{tokenizer.vocab_size} tokens"
    if tokenizer.vocab_size < int(given):
        size += f" (fewer than --vocab={given}: no pair left occurs twice)"
    rate = f"{n_bytes / n_tokens:.3f} bytes each on" if n_tokens else "and no text in"
    next_keys = overrides | {"data.tokenizer": "bpe", "data.tokenizer_file": options.out}
    command = ["uoe", "train", f"--config={options.config}"]
    command += [f"--config.{key}={text}" for key, text in next_keys.items()]
    following = f"next: {shlex.join(command)} --workdir=DIR"
    print(f"{options.out}: {size}, {rate} the validation split; {following}")


def _check_workdir(path: str) -> None:
    """Refuses an impossible workdir before jax is imported."""
    found = checkpoint_path(path)
    if not is_remote(path) and found.exists() and not found.is_dir():
        raise UserError(f"--workdir={path}: is a file; give a directory")


def _start(config: Config, stops_itself: bool = False) -> None:
    from uoe_jax.distributed import setup

    setup.start(config, stops_itself)

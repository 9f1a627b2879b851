"""The `uoe` command: parses the command line, runs a command, and turns errors into exit codes."""

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from uoe_jax import commands, runtime_env
from uoe_jax.commands import load_config
from uoe_jax.config.fields import leaves, printable
from uoe_jax.config.schema import GenerateConfig
from uoe_jax.distributed import coordination, watchdog
from uoe_jax.errors import EXIT_DONE, EXIT_FAILED, ConfigError, UserError
from uoe_jax.exchange.transfer import DTYPES, FORMATS, run_import
from uoe_jax.workdir import locate

__all__ = ["console", "load_config", "main"]

SPLITS = ("train", "validation", "test")

# (usage, help, more arguments of `add_argument`); what is in brackets may be left out.
Option = tuple[str, str, dict[str, Any]]
Run = Callable[[argparse.Namespace, dict[str, str]], int | None]
WORKDIR: Option = ("--workdir DIR", "directory of the run", {})
CONFIG: Option = ("--config FILE[:VARIANT]", "a config file, or a shipped one by name", {})
ANY_CONFIG: Option = (f"[{CONFIG[0]}]", CONFIG[1], {})
STEP: Option = ("[--step STEP]", "latest, best, or the step of a checkpoint", {"default": "latest"})
DEBUG: Option = ("[--debug]", "print tracebacks", {})
TEXT_KEYS: list[Option] = [
    (f"[--{name} {type(value).__name__.upper()}]", meta["doc"], {})
    for name, value, meta in leaves(GenerateConfig())
]
ANY_KEY = "Any key can be overridden: --config.train.steps=100"
ROWS = "Any key can be overridden: --config.base.train.steps=100, --config.rows=uoe,full_attention"


class _Command:
    """A command; with `CONFIG` or `ANY_CONFIG` among its options it takes overrides too."""

    def __init__(self, run: Run, about: str, *options: Option, epilog: str = ANY_KEY) -> None:
        self.run, self.about, self.options, self.epilog = run, about, options, epilog


COMMANDS = {
    "train": _Command(commands.train, "train, or resume the run of the workdir", WORKDIR, CONFIG),
    "config": _Command(
        commands.show_config,
        "list the keys of a configuration: value, default, range and meaning",
        ANY_CONFIG,
        ("PATTERN", "part of a key, or a glob of one", {"nargs": "?"}),
        ("[--changed]", "only keys that differ from their defaults", {}),
        ("[--json]", "one JSON object per key", {}),
        ("[--markdown]", "the reference of all keys, as a Markdown page", {}),
    ),
    "plan": _Command(
        commands.plan,
        "predict memory, FLOPs, traffic and time on accelerators; nothing is run",
        CONFIG,
        ("[--mesh AXIS=SIZE,…]", "in place of config.mesh, such as data=8,fsdp=8", {}),
        ("[--devices N]", "number of devices, where an axis is -1", {}),
        ("[--hardware NAME]", "h100, h200, b200, v5p, v6e, or cpu", {"default": "h100"}),
        ("[--json]", "one JSON line", {}),
    ),
    "compare": _Command(
        commands.compare,
        "train the architectures of one comparison and write its table",
        WORKDIR,
        CONFIG,
        epilog=ROWS,
    ),
    "eval": _Command(
        commands.evaluate,
        "evaluate a run: one JSON line of metrics, every row counted once",
        WORKDIR,
        ("[--split SPLIT]", ", ".join(SPLITS), {"default": "validation", "choices": SPLITS}),
        STEP,
        ("[--experts K]", "K in place of the run's: 2, smha=3,uome=4, or 1..4", {}),
    ),
    "generate": _Command(
        commands.generate,
        "generate text with a trained language model",
        WORKDIR,
        STEP,
        ("[--prompts FILE]", 'prompts, one per line, or .jsonl of {"prompt": …}', {}),
        ("[--out FILE]", "with --prompts: where to write the JSON lines", {}),
        ("[--batch N]", "with --prompts: batch size", {"default": "8"}),
        ("[--chat]", "continue lines from the terminal; an empty line ends", {}),
        ("[--stop TEXT]", "end before TEXT; repeatable", {"action": "append", "default": []}),
        ("[--no-stream]", "print the text only when it is complete", {}),
        ("[--experts K]", "K in place of the run's: 2, or smha=3,uome=4", {}),
        *TEXT_KEYS,
    ),
    "import": _Command(
        run_import,
        "decompose a dense Hugging Face model into experts, as a workdir to train from",
        WORKDIR,
        ANY_CONFIG,
        ("--from DIR", "config.json, safetensors, perhaps tokenizer.json", {"dest": "source"}),
        ("--experts N", "experts per block", {}),
        ("--k K", "experts that a patch chooses; N gives the dense model", {}),
        ("[--capacity FACTOR]", "capacity_factor of both blocks", {}),
    ),
    "export": _Command(
        commands.export,
        "write the weights of a run for other programs, read them back and compare",
        WORKDIR,
        ("--format FORMAT", ", ".join(FORMATS), {"choices": FORMATS}),
        ("--out DIR", "the directory to write", {}),
        ("[--routed]", "with --format=hf: the routed model with its code", {}),
        STEP,
        ("[--dtype DTYPE]", ", ".join(DTYPES), {"default": "float32", "choices": DTYPES}),
        ("[--lossy]", "allow weights that overflow or underflow in --dtype", {}),
    ),
    "report": _Command(
        commands.report,
        "write an HTML report: curves, expert load, and the routing of a sample",
        ("--workdir DIR", "a run; repeatable", {"dest": "workdirs", "action": "append"}),
        ("[--out FILE]", "file to write; for one run by default DIR/report.html", {}),
        STEP,
        ("[--text TEXT]", "show the routing of this text", {}),
    ),
    "tokenizer": _Command(
        commands.train_tokenizer,
        "`uoe tokenizer train`: a BPE tokenizer of the training split of the config's data",
        CONFIG,
        ("ACTION", "train", {"choices": ("train",)}),
        ("--vocab N", "vocabulary size, with the 256 bytes and a separator", {}),
        ("--out FILE", "the tokenizer.json to write", {}),
    ),
}


class _Parser(argparse.ArgumentParser):
    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # raises if the help cannot be written
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        where = "" if self.prog == "uoe" else f"{self.prog}: "  # main begins with "uoe: "
        raise UserError(f"{where}{message}; see {self.prog} --help")


@functools.cache
def _parser() -> argparse.ArgumentParser:
    about = "Pretrain transformers whose blocks are unions of experts."
    parser = _Parser(prog="uoe", description=about, allow_abbrev=False)
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        about, options = command.about, command.options
        sub = subparsers.add_parser(name, help=about, description=about, allow_abbrev=False)
        takes_config = CONFIG in options or ANY_CONFIG in options
        sub.set_defaults(run=command.run, takes_config=takes_config, workdir=None)
        sub.epilog = command.epilog if takes_config else None
        for usage, text, more in (*options, DEBUG):
            required = not usage.startswith("[")
            name, _, metavar = (usage if required else usage[1:-1]).partition(" ")
            if not name.startswith("--"):
                sub.add_argument(name.lower(), metavar=name, help=text, **more)
            elif metavar:
                sub.add_argument(name, required=required, metavar=metavar, help=text, **more)
            else:
                sub.add_argument(name, action="store_true", help=text)
    return parser


def _overrides(argv: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """{a.b: value} of `--config.a.b=value` or `--config.a.b value`, and the other arguments."""
    found: dict[str, str] = {}
    others, left = [], list(argv)
    while left:
        argument = left.pop(0)
        name, equals, text = argument.partition("=")
        if not name.startswith("--config."):
            others.append(argument)
            continue
        if not equals:
            if not left or left[0].startswith("--"):
                raise UserError(f"{printable(name)}: give a value, as in --config.train.steps=100")
            text = left.pop(0)
        key = name.removeprefix("--config.")
        if found.setdefault(key, text) != text:
            remedy = f"was given before as {found[key]!r}; give one value"
            raise ConfigError(f"config.{printable(key)}", text, remedy)
    return found, others


def console() -> NoReturn:
    """The `uoe` command."""
    runtime_env.prepare_process()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (`uoe_jax.errors`)."""
    argv = sys.argv[1:] if argv is None else argv
    options, why = None, ""
    try:
        overrides, others = _overrides(argv)
        options, unknown = _parser().parse_known_args(others)
        if overrides and not options.takes_config:
            unknown = [f"--config.{key}" for key in overrides]
        if unknown:
            name = unknown[0].partition("=")[0]
            raise UserError(f"{printable(name)}: unknown argument; see uoe --help")
        with runtime_env.jax_import_errors():
            exit_code = options.run(options, overrides) or EXIT_DONE
        sys.stdout.flush()
        watchdog.finish()
        return exit_code
    except UserError as error:
        exit_code, why = error.exit_code, str(error)
        if not isinstance(error, coordination.RemoteProcessError):  # shown by the other process
            watchdog.abort_if_peer_lost(error)
            if "--debug" in argv:
                traceback.print_exc()
            runtime_env.notice(why)
    except KeyboardInterrupt:
        runtime_env.notice("interrupted at once; the same command resumes from the last checkpoint")
        exit_code, why = EXIT_FAILED, "interrupted"
    except Exception as error:
        workdir = None if options is None or options.debug else options.workdir
        watchdog.abort_if_peer_lost(error)
        exit_code, why = _unexpected(error, workdir)
    watchdog.abort(exit_code, why)
    return exit_code


def _unexpected(error: Exception, workdir: str | None) -> tuple[int, str]:
    """Reports an unexpected error in a line; its traceback goes to the workdir, else to stderr."""
    text, place = "".join(traceback.format_exception(error)), "above"
    try:
        if workdir is None or not locate(workdir).is_dir():
            raise OSError
        process = os.environ.get(coordination.PROCESS_ID, "0")
        number = int(process) if process.isdecimal() else 0
        file = locate(workdir) / (f"error_{number}.txt" if number else "error.txt")
        file.write_bytes(text.encode("utf-8", "backslashreplace"))
        place = f"in {file}"
    except Exception:  # writing to gs:// can fail in many ways
        print(text, file=sys.stderr)
    first_line = (str(error).strip().splitlines() or [""])[0]
    sentence = f"{type(error).__name__}: {first_line} (traceback {place})"
    runtime_env.notice(sentence)
    return EXIT_FAILED, sentence

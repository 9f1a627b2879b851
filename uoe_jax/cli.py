"""The `uoe` command: parses the command line, runs a command, and turns errors into exit codes."""

import argparse
import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from uoe_jax import commands, runtime_env
from uoe_jax.commands import load_config
from uoe_jax.config.fields import leaves, printable
from uoe_jax.config.schema import GenerateConfig
from uoe_jax.distributed import coordination, watchdog
from uoe_jax.errors import EXIT_DONE, EXIT_FAILED, ConfigError, UserError
from uoe_jax.exchange.transfer import DTYPES, FORMATS, run_import

__all__ = ["console", "load_config", "main"]

SPLITS = ("train", "validation", "test")

TEXT_KEYS: list[tuple[str, str, dict[str, Any]]] = [
    (f"[--{name} {type(value).__name__.upper()}]", meta["doc"], {})
    for name, value, meta in leaves(GenerateConfig())
]
STEP = ("[--step STEP]", "latest, best, or the step of a checkpoint", {"default": "latest"})
ANY_KEY = "Any key can be overridden: --config.train.steps=100"
ROWS = "Any key can be overridden: --config.base.train.steps=100, --config.rows=uoe,full_attention"


class _Command(NamedTuple):
    """A command: what runs it, one line of help, its common options, its own options, an epilog.

    common: of "workdir", "config" (and overrides) and "[config]", where --config may be left out.
    options: (usage, help, more arguments of `add_argument`); those in brackets may be left out.
    """

    run: Callable[[argparse.Namespace, dict[str, str]], int | None]
    about: str
    common: str
    options: Sequence[tuple[str, str, dict[str, Any]]] = ()
    epilog: str = ANY_KEY


COMMANDS = {
    "train": _Command(
        commands.train, "train; resumes if the workdir holds a checkpoint", "workdir config"
    ),
    "config": _Command(
        commands.show_config,
        "list the keys of a configuration: value, default, range and meaning",
        "[config]",
        [
            ("PATTERN", "part of a key, or a glob of one", {"nargs": "?"}),
            ("[--changed]", "only keys that differ from their defaults", {}),
            ("[--json]", "one JSON object per key", {}),
            ("[--markdown]", "the reference of all keys, as a Markdown page", {}),
        ],
    ),
    "plan": _Command(
        commands.plan,
        "predict memory, FLOPs, traffic and time on accelerators; nothing is run",
        "config",
        [
            ("[--mesh AXIS=SIZE,…]", "in place of config.mesh, such as data=8,fsdp=8", {}),
            ("[--devices N]", "number of devices, where an axis is -1", {}),
            ("[--hardware NAME]", "h100, h200, b200, v5p, v6e, or cpu", {"default": "h100"}),
            ("[--json]", "one JSON line", {}),
        ],
    ),
    "compare": _Command(
        commands.compare,
        "train the architectures of one comparison and write its table",
        "workdir config",
        epilog=ROWS,
    ),
    "eval": _Command(
        commands.evaluate,
        "evaluate a run: one JSON line of metrics, every row counted once",
        "workdir",
        [
            ("[--split SPLIT]", ", ".join(SPLITS), {"default": "validation", "choices": SPLITS}),
            STEP,
            ("[--experts K]", "K in place of the run's: 2, smha=3,uome=4, or 1..4", {}),
        ],
    ),
    "generate": _Command(
        commands.generate,
        "generate text with a trained language model",
        "workdir",
        [
            STEP,
            ("[--prompts FILE]", 'prompts, one per line, or .jsonl of {"prompt": …}', {}),
            ("[--out FILE]", "with --prompts: where to write the JSON lines", {}),
            ("[--batch N]", "with --prompts: batch size", {"default": "8"}),
            ("[--chat]", "continue lines from the terminal; an empty line ends", {}),
            (
                "[--stop TEXT]",
                "end before this text; repeatable",
                {"action": "append", "default": []},
            ),
            ("[--no-stream]", "print the text only when it is complete", {}),
            ("[--experts K]", "K in place of the run's: 2, or smha=3,uome=4", {}),
            *TEXT_KEYS,
        ],
    ),
    "import": _Command(
        run_import,
        "decompose a dense Hugging Face model into experts, as a workdir to train from",
        "workdir [config]",
        [
            ("--from DIR", "config.json, safetensors, perhaps tokenizer.json", {"dest": "source"}),
            ("--experts N", "experts per block", {}),
            ("--k K", "experts that a patch chooses; N gives the dense model", {}),
            ("[--capacity FACTOR]", "capacity_factor of both blocks", {}),
        ],
    ),
    "export": _Command(
        commands.export,
        "write the weights of a run for other programs, read them back and compare",
        "workdir",
        [
            ("--format FORMAT", ", ".join(FORMATS), {"choices": FORMATS}),
            ("--out DIR", "the directory to write", {}),
            (
                "[--routed]",
                "with --format=hf: the routed model with its code, not the dense one",
                {},
            ),
            STEP,
            ("[--dtype DTYPE]", ", ".join(DTYPES), {"default": "float32", "choices": DTYPES}),
            ("[--lossy]", "allow weights that overflow or underflow in --dtype", {}),
        ],
    ),
    "report": _Command(
        commands.report,
        "write an HTML report: curves, expert load, and the routing of a sample",
        "",
        [
            ("--workdir DIR", "a run; repeatable", {"dest": "workdirs", "action": "append"}),
            (
                "[--out FILE]",
                "file to write; for one run by default report.html in its workdir",
                {},
            ),
            STEP,
            ("[--text TEXT]", "show the routing of this text", {}),
        ],
    ),
    "tokenizer": _Command(
        commands.train_tokenizer,
        "`uoe tokenizer train`: a BPE tokenizer of the training split of the config's data",
        "config",
        [
            ("ACTION", "train", {"choices": ("train",)}),
            ("--vocab N", "vocabulary size, with the 256 bytes and a separator", {}),
            ("--out FILE", "the tokenizer.json to write", {}),
        ],
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
        about, takes_config = command.about, "config" in command.common
        sub = subparsers.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=command.run, takes_config=takes_config, workdir=None)
        common = command.common.split()
        if "workdir" in common:
            _add(sub, "--workdir DIR", "directory of the run")
        if takes_config:
            file, required = "a config file, or a shipped one by name", "config" in common
            sub.add_argument("--config", required=required, metavar="FILE[:VARIANT]", help=file)
            sub.epilog = command.epilog
        for usage, text, more in command.options:
            _add(sub, usage, text, **more)
        _add(sub, "[--debug]", "print tracebacks")
    return parser


def _add(parser: argparse.ArgumentParser, usage: str, text: str, **more: Any) -> None:
    """Adds an option as its usage shows it: "--out DIR", "[--step STEP]", "[--flag]", or "NAME"."""
    name, _, metavar = usage.strip("[]").partition(" ")
    if not name.startswith("--"):
        parser.add_argument(name.lower(), metavar=name, help=text, **more)
    elif metavar:
        required = not usage.startswith("[")
        parser.add_argument(name, required=required, metavar=metavar, help=text, **more)
    else:
        parser.add_argument(name, action="store_true", help=text, **more)


def _joined(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config.key value` as one, so that no positional argument takes it."""
    out: list[str] = []
    for text in argv:
        last = out[-1] if out else ""
        if last.startswith("--config.") and "=" not in last and not text.startswith("--"):
            out[-1] = f"{last}={text}"
        else:
            out.append(text)
    return out


def _overrides(rest: list[str], options: argparse.Namespace) -> dict[str, str]:
    """{a.b: value} of `--config.a.b=value` or `--config.a.b value`; UserError for anything else."""
    found: dict[str, str] = {}
    rest = list(rest)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        shown = printable(name)
        if not name.startswith("--config.") or not options.takes_config:
            raise UserError(f"{shown}: unknown argument; see uoe --help")
        if not equals and not rest:
            raise UserError(f"{shown}: give it a value, as in --config.train.steps=100")
        text = text if equals else rest.pop(0)
        key = name.removeprefix("--config.")
        if found.setdefault(key, text) != text:
            remedy = f"was given before as {found[key]!r}; give one value"
            raise ConfigError(f"config.{printable(key)}", text, remedy)
    return found


def console() -> NoReturn:
    """The `uoe` command."""
    runtime_env.prepare_process()
    sys.exit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (`uoe_jax.errors`).

    0 done, 2 bad input, 75 stopped early and saved, 76 bad numbers, 77 lost process, 78 a plan
    that does not fit, 1 anything else.
    """
    argv = _joined(sys.argv[1:] if argv is None else argv)
    options, why = None, ""
    try:
        options, rest = _parser().parse_known_args(argv)
        overrides = _overrides(rest, options)
        with runtime_env.jax_import_errors():
            exit_code = options.run(options, overrides) or EXIT_DONE
        sys.stdout.flush()
        watchdog.finish()
        return exit_code
    except coordination.RemoteProcessError as error:
        exit_code, why = error.exit_code, str(error)
    except UserError as error:
        watchdog.abort_if_peer_lost(error)
        if "--debug" in argv:
            traceback.print_exc()
        _complain(f"uoe: {error}")
        exit_code, why = error.exit_code, str(error)
    except KeyboardInterrupt:
        _complain("uoe: interrupted at once; the same command resumes from the last checkpoint")
        exit_code, why = EXIT_FAILED, "interrupted"
    except Exception as error:
        workdir = None if options is None or options.debug else options.workdir
        watchdog.abort_if_peer_lost(error)
        exit_code, why = _unexpected(error, workdir)
    watchdog.abort(exit_code, why)
    return exit_code


def _complain(sentence: str) -> None:
    """Prints to stderr; the process must end with its exit code even if stderr is closed."""
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def _unexpected(error: Exception, workdir: str | None) -> tuple[int, str]:
    """Reports an unexpected error in a line; its traceback goes to the workdir, else to stderr."""
    text = "".join(traceback.format_exception(error))
    place = "above"
    try:
        from uoe_jax.workdir import locate

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
    _complain(f"uoe: {sentence}")
    return EXIT_FAILED, sentence

"""`uoe <command>`: reads the command line and the configuration before jax is imported, and turns errors to exit codes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import traceback
from typing import Any, NoReturn, Sequence

from uoe_jax import config as config_lib
from uoe_jax import runtime_env
from uoe_jax.config.baselines import ATTENTIONS, MLPS
from uoe_jax.config.load import load_config
from uoe_jax.config.schema import Config
from uoe_jax.distributed import coordination, watchdog
from uoe_jax.errors import EXIT_DONE, EXIT_FAILED, ConfigError, UserError
from uoe_jax.exchange.command import DTYPES, FORMATS


def console() -> NoReturn:
    """The `uoe` command."""
    runtime_env.prepare_process()
    sys.exit(main())


class _Parser(argparse.ArgumentParser):
    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # the help may not have been taken
        super().exit(status, message)

    def error(self, message: str) -> NoReturn:
        where = "" if self.prog == "uoe" else f"{self.prog}: "  # every sentence begins with it
        raise UserError(f"{where}{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0 done, 2 bad input, 75 stopped and saved, 76 bad numbers, 77 lost peer, 1 else."""
    argv = list(sys.argv[1:] if argv is None else argv)
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
        _complain("uoe: interrupted at once; the same command goes on from the last checkpoint")
        exit_code, why = EXIT_FAILED, "interrupted"
    except Exception as error:
        workdir = None if options is None or options.debug else options.workdir
        watchdog.abort_if_peer_lost(error)
        exit_code, why = _unexpected(error, workdir)
    watchdog.abort(exit_code, why)
    return exit_code


def _complain(sentence: str) -> None:
    """Says it where somebody reads; the process must end with its code where nobody does."""
    with contextlib.suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)


def _unexpected(error: Exception, workdir: str | None) -> tuple[int, str]:
    """An error nobody foresaw: one line on the screen, the traceback in the workdir, or on the screen where that fails."""
    text = "".join(traceback.format_exception(error))
    place = "above"
    try:
        from uoe_jax.workdir import locate

        if workdir is None or not locate(workdir).is_dir():
            raise OSError
        me = os.environ.get(coordination.PROCESS_ID, "0")
        file = locate(workdir) / (
            f"error_{int(me)}.txt" if me.isdecimal() and int(me) else "error.txt"
        )
        file.write_bytes(text.encode("utf-8", "backslashreplace"))
        place = f"in {file}"
    except (
        Exception
    ):  # gs:// fails in a dozen ways, and this one error is to be told whatever happens
        print(text, file=sys.stderr)
    sentence = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]} (traceback {place})"
    _complain(f"uoe: {sentence}")
    return EXIT_FAILED, sentence


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="uoe",
        description="Pretrain transformers whose blocks are unions of experts.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Any, text: str, *, workdir: bool = True, config: bool = False
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=run, takes_config=config, workdir=None)
        if workdir:
            sub.add_argument("--workdir", required=True, metavar="DIR", help="directory of the run")
        if config:
            sub.add_argument(
                "--config",
                required=True,
                metavar="FILE[:VARIANT]",
                help="a config file, or a shipped one by name",
            )
            sub.epilog = "Any key can be overridden: --config.train.steps=100"
        sub.add_argument("--debug", action="store_true", help="print tracebacks")
        return sub

    command(
        "train",
        _train,
        "train; resumes by itself where the workdir holds a checkpoint",
        config=True,
    )

    what = "memory, operations, bytes moved and time on accelerators; nothing is run"
    plan = command("plan", _plan, what, workdir=False, config=True)
    plan.add_argument(
        "--mesh",
        metavar="AXIS=SIZE,…",
        help="instead of config.mesh, such as data=8,fsdp=8; axes left out are 1",
    )
    plan.add_argument("--devices", metavar="N", help="how many, where an axis is -1")
    plan.add_argument(
        "--hardware", default="h100", metavar="NAME", help="h100, h200, b200, v5p, v6e, or cpu"
    )
    plan.add_argument("--json", action="store_true", help="one JSON line")

    compare = command(
        "compare",
        _compare,
        "trains the architectures of one table and writes the table",
        config=True,
    )
    compare.epilog = (
        "Any key can be overridden: --config.base.train.steps=100, --config.rows=uoe,full_attention"
    )

    evaluate = command("eval", _eval, "one JSON line of measures; every row counted once")
    evaluate.add_argument("--split", default="validation", choices=("train", "validation", "test"))
    evaluate.add_argument(
        "--step", default="latest", help="latest, best, or the step of a checkpoint"
    )
    evaluate.add_argument(
        "--experts",
        metavar="K",
        help="another number than the run's: 2, smha=3,uome=4, or 1..4 for a line each",
    )

    generate = command("generate", _generate, "text from a trained language model")
    generate.add_argument(
        "--step", default="latest", help="latest, best, or the step of a checkpoint"
    )
    generate.add_argument(
        "--prompts",
        metavar="FILE",
        help='many prompts, one a line, or .jsonl of {"prompt": …}; JSON lines come out',
    )
    generate.add_argument("--out", metavar="FILE", help="with --prompts: where to write them")
    generate.add_argument(
        "--batch", default="8", metavar="N", help="with --prompts: how many at a time"
    )
    generate.add_argument(
        "--chat",
        action="store_true",
        help="lines from the terminal, each continued with all before it; an empty one ends",
    )
    generate.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="the text ends before it; may be given several times",
    )
    generate.add_argument("--no-stream", action="store_true", help="show the text when it is whole")
    generate.add_argument(
        "--experts", metavar="K", help="another number than the run's: 2, or smha=3,uome=4"
    )
    for name, value, meta in config_lib.leaves(config_lib.GenerateConfig()):
        generate.add_argument(f"--{name}", metavar=type(value).__name__.upper(), help=meta["doc"])

    what = "a dense model of Hugging Face's layout, cut in experts, as a workdir to train from"
    into = command("import", _import, what)
    into.add_argument(
        "--from",
        dest="source",
        required=True,
        metavar="DIR",
        help="with config.json, safetensors, and tokenizer.json for text",
    )
    into.add_argument(
        "--experts", required=True, metavar="N", help="experts that attention and MLP are cut in"
    )
    into.add_argument(
        "--k",
        required=True,
        metavar="K",
        help="of these, how many a patch chooses; N: the dense model",
    )
    into.add_argument(
        "--capacity",
        metavar="FACTOR",
        help="capacity_factor of both blocks; left out: 1.25, or the config's",
    )
    into.add_argument(
        "--config",
        metavar="FILE[:VARIANT]",
        help="whose data, optimizer and routing to take; the model is that of DIR",
    )
    into.set_defaults(takes_config=True)
    into.epilog = (
        "Any key can be overridden: --config.model.smha.n_experts=2, --config.model.attention=dense"
    )

    export = command(
        "export",
        _export,
        "the weights of a run, for other programs; written whole, read back and compared",
    )
    export.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="weights by name; a model for transformers; a program for jax alone",
    )
    export.add_argument("--out", required=True, metavar="DIR", help="the directory to write")
    export.add_argument(
        "--routed",
        action="store_true",
        help="with --format=hf: the routed model and its code, not the dense one of all experts",
    )
    export.add_argument(
        "--step", default="latest", help="latest, best, or the step of a checkpoint"
    )
    export.add_argument("--dtype", default="float32", choices=DTYPES, help="of the weights")
    export.add_argument(
        "--lossy",
        action="store_true",
        help="go on where a weight overflows or underflows in --dtype",
    )

    report = command(
        "report",
        _report,
        "one HTML file to look at: curves, load of experts, and the routing of a sample",
        workdir=False,
    )
    report.add_argument(
        "--workdir",
        dest="workdirs",
        required=True,
        action="append",
        metavar="DIR",
        help="directory of the run; several times, to compare runs",
    )
    report.add_argument(
        "--out",
        metavar="FILE",
        help="the file to write; left out, with one run: report.html in its workdir",
    )
    report.add_argument(
        "--step",
        default="latest",
        help="whose routing is shown: latest, best, or the step of a checkpoint",
    )
    report.add_argument(
        "--text",
        metavar="TEXT",
        help="a passage to show the routing of, instead of rows of the validation split",
    )

    what = (
        "`uoe tokenizer train`: pieces of words (BPE) from the training split of the config's data"
    )
    tokenizer = command("tokenizer", _tokenizer_train, what, workdir=False, config=True)
    tokenizer.add_argument("action", choices=("train",), help="what to do")
    tokenizer.add_argument(
        "--vocab",
        required=True,
        metavar="N",
        help="tokens, such as 4096; the 256 bytes and a separator among them",
    )
    tokenizer.add_argument(
        "--out", required=True, metavar="FILE", help="the tokenizer.json to write"
    )
    return parser


def _overrides(rest: list[str], options: argparse.Namespace) -> dict[str, str]:
    """`--config.a.b=value` or `--config.a.b value` as {a.b: value}; anything else left over is an error."""
    found: dict[str, str] = {}
    rest = list(rest)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--config.") or not options.takes_config:
            raise UserError(f"{config_lib.printable(name)}: unknown argument; see uoe --help")
        if not equals:
            if not rest:
                raise UserError(
                    f"{config_lib.printable(name)}: give it a value, as in --config.train.steps=100"
                )
            text = rest.pop(0)
        key = name.removeprefix("--config.")
        if found.setdefault(key, text) != text:
            raise ConfigError(
                f"config.{config_lib.printable(key)}",
                text,
                f"was given before as {found[key]!r}; give one value",
            )
    return found


def _train(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    from uoe_jax.data.tokenizers.workdir import check_tokenizer
    from uoe_jax.workdir import checkpoint_path

    config = load_config(options.config, overrides)
    _check_workdir(options.workdir)
    if config.train.init_from:
        checkpoint_path(config.train.init_from, "config.train.init_from")
    check_tokenizer(config, options.workdir)
    _start(config, stops_itself=True)
    from uoe_jax.infer.sample import sample
    from uoe_jax.report.command import at_end
    from uoe_jax.train.main import train

    return train(config, options.workdir, sample, at_end)


def _plan(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    import dataclasses

    from uoe_jax.plan import hardware, make, report

    config = load_config(options.config, overrides)
    for key, block, peers in (
        ("attention", config.model.attention, ATTENTIONS),
        ("mlp", config.model.mlp, MLPS),
    ):
        if block in peers:
            remedy = "memory and time are predicted for unions of experts and dense blocks alone; give one of these"
            raise ConfigError(f"config.model.{key}", block, remedy)
    hardware.find(options.hardware)
    devices = options.devices
    if devices is not None and not (devices.isdecimal() and int(devices)):
        raise UserError(f"--devices={devices}: give a whole number from 1 on")
    mesh = make.read_mesh(options.mesh, None if devices is None else int(devices), config.mesh)
    from uoe_jax.data.registry import known_vocabulary

    config = config_lib.with_vocabulary(
        dataclasses.replace(config, mesh=mesh), known_vocabulary(config)[0]
    )
    if config.model.stem == "tokens" and not config.model.vocab_size:
        raise ConfigError(
            "config.model.vocab_size",
            0,
            "words are counted when training starts; give their number for a plan",
        )
    found = make.make(config, options.hardware)
    print(json.dumps(report.as_json(found)) if options.json else report.text(found, options.config))
    return EXIT_DONE


def _compare(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    from uoe_jax.compare.table import load_table

    table = load_table(options.config, overrides)
    _check_workdir(options.workdir)
    from uoe_jax.compare.run import compare

    return compare(table, options.workdir)


def _eval(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from uoe_jax.infer.experts import choices

    config = _stored_config(options)
    if options.experts is not None:
        choices(config, options.experts)
    _start(config)
    from uoe_jax.infer.evaluation import run_eval

    run_eval(options, config)


def _generate(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from uoe_jax.infer.command import run_generate

    run_generate(options, _stored_config(options))


def _import(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from uoe_jax.exchange.command import run_import

    run_import(options, overrides)


def _export(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from uoe_jax.exchange.command import run_export

    run_export(options, _stored_config(options))


def _report(options: argparse.Namespace, overrides: dict[str, str]) -> None:
    from uoe_jax.workdir import read_config

    if options.out is None and len(options.workdirs) > 1:
        raise UserError(
            f"--workdir: {len(options.workdirs)} runs are compared; say with --out=FILE where the report is to go"
        )
    configs = [read_config(workdir) for workdir in options.workdirs]
    _start(configs[0])
    from uoe_jax.report.command import run_report

    print(run_report(options, configs))


def _tokenizer_train(options: argparse.Namespace, overrides: dict[str, str]) -> int:
    import shlex

    from uoe_jax.config.data import TEXT
    from uoe_jax.data.pipeline import default_cache_dir
    from uoe_jax.data.registry import text_source
    from uoe_jax.data.tokenizers.load import BPETokenizer
    from uoe_jax.workdir import is_remote, locate

    vocab, out = options.vocab, locate(options.out, "--out")
    if not (
        vocab.isascii() and vocab.isdecimal() and len(vocab) < 8 and 257 <= int(vocab) <= 1_000_000
    ):
        raise UserError(
            f"--vocab={config_lib.printable(vocab)}: give a whole number from 257 (bytes alone) to 1000000"
        )
    if not is_remote(out) and (out.is_dir() or not out.parent.is_dir()):
        raise UserError(
            f"--out={options.out}: is no place for a file; give a file name in a directory that exists"
        )
    # With words, nothing is asked of the vocabulary's size, nor of the file that is yet to be made.
    data = load_config(
        options.config, {**overrides, "data.tokenizer": "words", "data.tokenizer_file": ""}
    ).data
    if data.source not in TEXT:
        raise ConfigError(
            "config.data.source",
            data.source,
            f"holds no running text; give one of {', '.join(TEXT)}",
        )
    source = text_source(data, default_cache_dir())
    tokenizer = BPETokenizer.train(source.documents("train"), int(vocab))
    sizes = [
        (len(document), len(tokenizer.encode(document)))
        for document in source.documents("validation")
    ]
    n_bytes, n_tokens = (sum(column) for column in zip(*sizes)) if sizes else (0, 0)
    rate = (
        f"{n_bytes / n_tokens:.3f} bytes each on the validation split"
        if n_tokens
        else "and no text in the validation split"
    )
    _write_once(out, json.loads(tokenizer.to_json()), options.out)
    fewer = (
        ""
        if tokenizer.vocab_size == int(vocab)
        else f" (no more: there is no pair left that occurs twice, and --vocab={vocab})"
    )
    kept = {
        key: text
        for key, text in overrides.items()
        if key not in ("data.tokenizer", "data.tokenizer_file")
    }
    kept |= {"data.tokenizer": "bpe", "data.tokenizer_file": options.out}
    command = [
        "uoe",
        "train",
        f"--config={options.config}",
        *(f"--config.{key}={text}" for key, text in kept.items()),
    ]
    print(
        f"{options.out}: {tokenizer.vocab_size} tokens{fewer}, {rate}; next: {shlex.join(command)} --workdir=DIR"
    )
    return EXIT_DONE


def _write_once(out: Any, content: Any, shown: str) -> None:
    """Writes a JSON file whole, or leaves it where it is the same already; UserError where it holds anything else."""
    from uoe_jax.workdir import os_errors, write_json

    try:
        with os_errors(out):
            if not out.exists():
                write_json(out, content)
            elif out.read_bytes() != (json.dumps(content, indent=2) + "\n").encode():
                raise UserError(
                    f"--out={shown}: holds something else already; remove it, or give another file"
                )
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"--out={shown}: cannot be written ({reason}); fix that, or give another file"
        ) from error


def _stored_config(options: argparse.Namespace) -> Config:
    from uoe_jax.workdir import read_config

    return read_config(options.workdir)


def _check_workdir(path: str) -> None:
    """Refuses a hopeless workdir before jax is imported."""
    from uoe_jax.workdir import checkpoint_path, is_remote

    found = checkpoint_path(path)
    if not is_remote(path) and found.exists() and not found.is_dir():
        raise UserError(f"--workdir={path}: is a file; give a directory")


def _start(config: Config, stops_itself: bool = False) -> None:
    from uoe_jax.distributed import setup

    setup.start(config, stops_itself)

"""The documentation: its pages are built without a warning, and every command that it or README shows is run here, made small.

A command is what a code block of a document shows to be typed. Those that need what a test has not (a dataset, SLURM) say so where
they stand: `<!-- needs: … -->` before the block, or `# needs …` behind the command. These are read as far as can be:
by the parser of `uoe`, and with their configuration. All others are run, or stand in `ELSEWHERE` with what runs them.
"""

from __future__ import annotations

import argparse
import html
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib
from typing import NamedTuple

import pytest
from helpers import ROOT, environment, write_source
from markdown_it import MarkdownIt

from uoe_jax import cli
from uoe_jax import config as config_lib
from uoe_jax.compare.table import TableConfig, load_table
from uoe_jax.config.fields import leaves
from uoe_jax.data.tokenizers.hf import HFTokenizer

PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", *PAGES]
SHELL = ("sh", "bash", "console")  # languages of a block in which every line is a command
PROGRAMS = (
    "uoe",
    "python",
    "pip",
    "pytest",
    "sbatch",
    "srun",
    "tfds",
    "kubectl",
    "bash",
    "git",
    "gcloud",
)

# Command -> what runs it: a file, and a line of it.
CI_INSTALLS = (".ci/run", "python -m pip install --quiet -c constraints.txt '.[test]'")
ELSEWHERE = {
    "pip install .": CI_INSTALLS,
    "pip install '.[test]'": CI_INSTALLS,
    "pip install '.[docs]'": CI_INSTALLS,  # which the extra `test` asks for
    "pytest": (".ci/run", "pytest"),
    "python -m benchmarks [layer model length scaling decode trainer loader] [--out=runs/benchmarks]": (
        "tests/test_benchmarks.py",
        '[sys.executable, "-m", "benchmarks", "scaling", "loader", f"--out={tmp_path}"],',  # the others take minutes
    ),
    "python -m sphinx -W --keep-going -b html docs build/docs": (
        "tests/test_docs.py",
        "def pages(tmp_path_factory):",
    ),
}

# Commands that show what may be given, and the commands that are run for them.
INSTEAD = {
    "uoe export --workdir=DIR --format=FORMAT --out=PATH [--step=best] [--dtype=bfloat16]": [
        "uoe export --workdir=tuned --format=safetensors --out=named --step=best --dtype=bfloat16",
        "uoe export --workdir=tuned --format=hf --out=dense",
        "uoe export --workdir=tuned --format=stablehlo --out=program",
    ],
    "uoe plan --config=FILE [--mesh=data=8,fsdp=8,expert=4] [--devices=N] [--hardware=h100|h200|b200|v5p|v6e|cpu] [--json]": [
        "uoe plan --config=quickstart --mesh=data=2,fsdp=2,expert=2 --hardware=v5p --json",
    ],
    "uoe plan --config=uoe_1b --mesh=data=1 --hardware=h100 --config.train.accumulation=32": [
        "uoe plan --config=quickstart --mesh=data=1 --hardware=h100 --config.train.accumulation=2",
    ],
    "uoe plan --config=uoe_1b --mesh=fsdp=4,expert=2 --hardware=h100": [
        "uoe plan --config=quickstart --mesh=fsdp=4,expert=2 --hardware=h100",
    ],
    "python -m benchmarks.loader": ["python -m benchmarks.loader --config=quickstart:tiny --rounds=2"],
    "uoe compare --config=compare/digits --workdir=runs/digits_table": [
        "uoe compare --config=compare/digits:tiny --workdir=runs/digits_table --config.rows=uoe,full_attention",
    ],
}  # fmt: skip

# What makes a run small, whatever the document sets these keys to.
FEW_STEPS = {
    "train.steps": 3, "train.batch_size": 8, "train.log_every": 1, "eval.every": 0, "eval.batches": 1, "checkpoint.every": 0,
    "generate.max_tokens": 4, "optimizer.warmup_steps": 1, "train.report": "false",  # `uoe report` is run by itself
}  # fmt: skip
SMALL_MODEL = {"model.n_layers": 1, "model.d_model": 32, "model.d_hidden": 64}
SHORT_ROWS = {"model.context_length": 64}  # not of images, whose size settles it


class Command(NamedTuple):
    """text: as it stands there. needs: what a test has not, "" where it is nothing."""

    text: str
    needs: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands_of(text: str) -> list[Command]:
    """The commands that a document shows, in its order."""
    found, before = [], ""
    for token in MarkdownIt("commonmark").parse(text):
        if token.type in ("fence", "code_block"):
            needs = re.fullmatch(r"<!-- needs: (.+) -->", before.strip())
            every = token.info.strip() in SHELL
            if every or token.info.strip() == "":
                found += _in_block(token.content, needs[1] if needs else "", every)
        before = token.content if token.type == "html_block" else ""
    return found


def _in_block(content: str, needs: str, every: bool) -> list[Command]:
    found = []
    for line in content.replace("\\\n", " ").splitlines():
        line, _, comment = line.partition(" # ")
        here = (
            comment.strip().removeprefix("needs ")
            if comment.strip().startswith("needs ")
            else needs
        )
        for text in filter(None, (" ".join(part.split()) for part in line.split("&&"))):
            if every or text.split()[0] in PROGRAMS or text.startswith("launch/"):
                found.append(Command(text, here))
    return found


COMMANDS = {path.relative_to(ROOT).as_posix(): commands_of(path.read_text()) for path in DOCUMENTS}
EVERY = [
    pytest.param(command, id=f"{name}: {command.text}"[:120])
    for name, found in COMMANDS.items()
    for command in found
]


def run_here(command: Command) -> list[list[str]]:
    """What a test runs for a command."""
    if command.needs or command.text in ELSEWHERE:
        return []
    return [shlex.split(text) for text in INSTEAD.get(command.text, [command.text])]


# --- every command is accounted for -------------------------------------------------------------------------------------


def test_commands_are_found():
    """The parser of documents: continued lines, `&&`, comments, markers, and what is no command."""
    text = "a\n\n    uoe a \\\n      --b && pytest   # why\n    y = x\n\n<!-- needs: C4 -->\n\n```sh\nuoe c\n```\n\n```python\npip = 1\n```\n\n    uoe d # needs SLURM\n"
    assert commands_of(text) == [
        ("uoe a --b", ""),
        ("pytest", ""),
        ("uoe c", "C4"),
        ("uoe d", "SLURM"),
    ]
    for path in DOCUMENTS:  # a line that looks like a command is one
        known = [command.text for command in COMMANDS[path.relative_to(ROOT).as_posix()]]
        for line in re.findall(
            r"^(?: {4})?((?:uoe|python|sbatch|pip install|tfds) \S+)",
            path.read_text(),
            re.MULTILINE,
        ):
            assert any(text.startswith(line) for text in known), (path.name, line)


@pytest.mark.parametrize("command", EVERY)
def test_a_command_is_run_or_says_what_it_needs(command, monkeypatch, forgotten):
    monkeypatch.chdir(ROOT)
    if command.text in ELSEWHERE:
        file, line = ELSEWHERE[command.text]
        lines = (text.strip() for text in (ROOT / file).read_text().splitlines())
        assert any(text == line or text.startswith(f"{line} --") for text in lines), file
    else:
        for words in [command.words] if command.needs else run_here(command):
            understood(words)


def understood(words: list[str]) -> None:
    """A command line that `uoe` takes, or of another program that a test can run; AssertionError for what nobody knows."""
    program, *rest = words
    if program == "uoe":
        options, overrides = arguments_of(rest)
        config = getattr(options, "config", None)
        if config and not (
            config == "mine.py" or config.endswith("config.json")
        ):  # these are made by the commands before
            load = load_table if rest[0] == "compare" else cli.load_config
            load(config, overrides)
        for key in overrides if rest[0] != "compare" else ():
            assert key in config_lib.ALL_KEYS, key
    elif words[:2] == ["python", "launch/local.py"]:
        understood(words[words.index("--") + 1 :])
    elif program == "python" and words[1].startswith(
        "examples/"
    ):  # an example with the command line of `uoe`
        assert (ROOT / words[1]).is_file(), words
        understood(["uoe", *words[2:]])
    elif program == "sbatch":
        script = words.index("launch/slurm.sbatch")
        understood(["uoe", "train", *words[script + 1 :]])
    else:
        assert (
            words[:2] == ["python", "-m"]
            and words[2].split(".")[0] == "benchmarks"
            or program == "tfds"
        ), words


def arguments_of(words: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    overrides, others = cli._overrides(words)
    options = cli._parser().parse_args(others)
    assert options.takes_config or not overrides
    return options, overrides


def test_the_extras_that_are_installed_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert "uoe-jax[docs]" in extras["test"]
    for path in DOCUMENTS:
        for named in re.findall(r"'\.\[([a-z,]+)\]'", path.read_text()):
            assert set(named.split(",")) <= extras.keys(), (path.name, named)


def test_nothing_is_listed_that_no_document_shows():
    shown = {command.text for found in COMMANDS.values() for command in found}
    assert not {*ELSEWHERE, *INSTEAD} - shown


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_options_named_in_a_line_exist(path):
    """`uoe NAME --option` in running text and tables: the command and its options, though not their values."""
    parsers = cli._parser()._subparsers._group_actions[0].choices
    keys = {
        *config_lib.ALL_KEYS,
        *(f"base.{key}" for key in config_lib.ALL_KEYS),
        "rows",
        *(name for name, _, _ in leaves(TableConfig())),
    }
    for token in MarkdownIt("commonmark").enable("table").parse(path.read_text()):
        for span in token.children or ():
            if span.type != "code_inline":
                continue
            words = span.content.replace("[", " ").replace("]", " ").split()
            options = None
            if len(words) > 1 and words[0] == "uoe" and re.fullmatch("[a-z]+", words[1]):
                assert words[1] in parsers, span.content
                actions = parsers[words[1]]._actions if words[1] in parsers else ()
                options = {name for action in actions for name in action.option_strings}
            for word in words:
                name = word.partition("=")[0]
                if re.fullmatch(r"--config(\.[a-z0-9_]+)+", name):
                    assert name.removeprefix("--config.") in keys, span.content
                elif options and name.startswith("--"):
                    assert name in options, span.content


# --- the pages ----------------------------------------------------------------------------------------------------------


def test_every_module_is_in_the_reference_once():
    sources = [
        p
        for p in (ROOT / "uoe_jax").rglob("*.py")
        if p.read_text().strip() and "configs" not in p.parts
    ]
    modules = {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in sources
    }
    # The package's names are in api.md; __main__ runs cli; PyTorch's file is exported with a model.
    modules -= {"uoe_jax", "uoe_jax.__main__", "uoe_jax.exchange.hf-code.modeling_uoe"}
    shown = re.findall(
        r"^\.\. automodule:: (\S+)$", "\n".join(p.read_text() for p in PAGES), re.MULTILINE
    )
    assert sorted(shown) == sorted(modules)


def test_the_examples_of_config_files(tmp_path):
    for name, variant, key, value in (
        ("configs", ":wide", "d_hidden", 1024),
        ("getting-started", "", "d_model", 128),
        ("moe", "", "d_hidden", 768),
    ):
        (tmp_path / f"{name}.py").write_text(python_of(name)[-1])
        assert getattr(cli.load_config(f"{tmp_path}/{name}.py{variant}", {}).model, key) == value


def test_the_variants_that_are_named_exist():
    rows = re.findall(
        r"^\| (\[.*?) \| (`.*) \|$", (ROOT / "docs" / "configs.md").read_text(), re.MULTILINE
    )
    pairs = [
        (name, variant)
        for names, variants in rows
        for name in re.findall(r"\[(\w+)\]", names)
        for variant in re.findall(r"`([\w-]+)`", variants)
    ]
    assert {name for name, _ in pairs} == {p.stem for p in (ROOT / "configs").glob("*.py")}
    for name, variant in pairs:
        cli.load_config(f"{name}:{variant}", {})


def python_of(name: str) -> list[str]:
    text = (ROOT / "docs" / f"{name}.md").read_text()
    return [
        token.content
        for token in MarkdownIt("commonmark").parse(text)
        if token.type == "fence" and token.info == "python"
    ]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages, built by the command that the documents name."""
    out = tmp_path_factory.mktemp("pages")
    (command,) = (text for text in ELSEWHERE if "sphinx" in text)
    words = [str(out) if word == "build/docs" else word for word in shlex.split(command)[1:]]
    done = subprocess.run(
        [sys.executable, *words, "-q", "-d", f"{out}/.doctrees"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_pages_are_built_without_a_warning(pages):
    """-W makes an error of a warning. Every document has its page, and no link of a page leads nowhere."""
    for path in PAGES:
        assert (pages / path.relative_to(ROOT / "docs").with_suffix(".html")).is_file(), path
    links = 0
    for page in pages.rglob("*.html"):
        for target in re.findall(r'(?:href|src)="([^"#?]+)', page.read_text()):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / html.unescape(target)).exists(), (page.name, target)
                links += 1
    assert links > 1000


@pytest.mark.slow
def test_pages_have_every_key_and_what_the_docstrings_say(pages):
    text = html.unescape(re.sub(r"<[^>]+>", "", (pages / "keys.html").read_text()))
    for _, _, meta in [*leaves(config_lib.Config()), *leaves(TableConfig())]:
        assert plain(meta["doc"]) in plain(text), meta["doc"]
    layers = html.unescape(re.sub(r"<[^>]+>", "", (pages / "api" / "layers.html").read_text()))
    for said in (
        "n_heads: int, routing: RoutingConfig",
        "Raises",
        "[source]",
        "[N,B,g,S,k]",
    ):  # arguments, errors, source, shapes
        assert said in layers, said


def plain(text: str) -> str:
    """Letters and digits alone, in lower case: quotes, dashes and spaces are set differently."""
    return re.sub(r"[\W_]+", "", text).lower()


# --- the commands, run --------------------------------------------------------------------------------------------------


def small_model(folder: pathlib.Path) -> None:
    """`DIR`: a dense model in Hugging Face's layout, with a tokenizer of its own."""
    run = [
        "train",
        "--config=quickstart",
        "--workdir=DIR_run",
        "--config.model.attention=dense",
        "--config.model.mlp=dense",
    ]
    run += [
        "--config.model.activation=swiglu",
        "--config.model.tie_embeddings=false",
        "--config.model.vocab_size=300",
    ]
    assert cli.main(made_small(run, folder)) == 0
    assert cli.main(["export", "--workdir=DIR_run", "--format=hf", "--out=DIR"]) == 0
    tokenizer = HFTokenizer.train([b"def f(x):\n    return x\n"] * 20, 280)
    (folder / "DIR" / "tokenizer.json").write_text(tokenizer.to_json())
    write_source(folder / "notes")
    for file in (folder / "notes").iterdir():
        file.rename(file.with_suffix(".txt"))


def small_text(folder: pathlib.Path) -> None:
    """`DIR`: text files."""
    write_source(folder / "DIR")
    for file in (folder / "DIR").iterdir():
        file.rename(file.with_suffix(".txt"))


def small_notes(folder: pathlib.Path) -> None:
    """`notes`: text files."""
    small_text(folder)
    (folder / "DIR").rename(folder / "notes")


def small_run(folder: pathlib.Path) -> None:
    """`DIR`: the workdir of a run."""
    assert cli.main(made_small(["train", "--config=quickstart", "--workdir=DIR"], folder)) == 0


def own_config(folder: pathlib.Path) -> None:
    (folder / "mine.py").write_text(python_of("getting-started")[-1])


BEFORE = {
    "docs/exchange.md": small_model, "docs/data.md": small_text, "docs/getting-started.md": own_config,
    "docs/generate.md": small_run, "docs/report.md": small_run, "docs/tutorial-own-text.md": small_notes,
}  # fmt: skip


def made_small(words: list[str], folder: pathlib.Path) -> list[str]:
    """The arguments of `uoe` for the same command with a small model and few steps, on the small source in `folder`."""
    if words[0] == "generate":
        return [*words, "--max_tokens=4"]
    if words[0] not in ("train", "import", "tokenizer"):
        return words
    options, overrides = arguments_of(words)
    changed: dict[str, object] = {}
    name = options.config or "quickstart"
    imported = words[0] == "import" or name.endswith("config.json")
    config = cli.load_config(name, overrides)
    if words[0] != "tokenizer":
        changed |= FEW_STEPS if words[0] == "train" else {"eval.batches": 1}
        changed |= {} if imported else SMALL_MODEL
        changed |= (
            SHORT_ROWS
            if config.model.task == "language" and not name.endswith("config.json")
            else {}
        )
    if config.data.source == "stdlib":
        changed["data.path"] = folder / "source"
    kept = [
        word for word in words if word.removeprefix("--config.").partition("=")[0] not in changed
    ]
    return [*kept, *(f"--config.{key}={value}" for key, value in changed.items())]


def run(words: list[str], folder: pathlib.Path) -> None:
    if words[0] == "uoe":
        assert cli.main(made_small(words[1:], folder)) == 0, words
        return
    at = words.index("--") + 2 if "--" in words else 2 if words[1].startswith("examples/") else None
    if at is not None:  # where the arguments of `uoe` begin
        words = [*words[:at], *made_small(words[at:], folder)]
    env = environment(PATH=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=folder, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, (words, done.stderr)


STORIES = [name for name, found in COMMANDS.items() if any(map(run_here, found))]


@pytest.mark.slow
@pytest.mark.parametrize("name", STORIES)
def test_the_commands_of_a_document_run_in_its_order(name, tmp_path, monkeypatch, forgotten):
    monkeypatch.chdir(tmp_path)
    for shared in ("configs", "launch", "examples"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    write_source(tmp_path / "source")
    BEFORE.get(name, lambda folder: None)(tmp_path)
    for command in COMMANDS[name]:
        for words in run_here(command):
            run(words, tmp_path)

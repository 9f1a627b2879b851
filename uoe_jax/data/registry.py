"""Opens the source that data.source names."""

from collections.abc import Callable
from pathlib import Path

from uoe_jax.config.data import FROM_FILE, SOURCES, DataConfig, Facts, Source
from uoe_jax.config.schema import Config
from uoe_jax.data.examples import ExampleSource, TextSource
from uoe_jax.data.sources import aan, digits, listops, pathfinder, stdlib, text, tfds, wikitext
from uoe_jax.data.tokenizers.base import Tokenizer
from uoe_jax.data.tokenizers.load import load_tokenizer
from uoe_jax.runtime_env import expanded


def add_source(
    name: str,
    opened: Callable[[DataConfig], TextSource | ExampleSource],
    facts: Facts | None = None,
) -> None:
    """Makes `data.source=name` a source of your own, in each process that calls this.

    A config file is a good place for the call. Raises ValueError for the name of a built-in source.

    opened: takes the `data` section. Without `facts` it gives the documents of a language model,
    with them the examples of a classifier. With several processes every document counts as
    progress; what takes longer before the first one calls `watchdog.tick` as it goes on.
    """
    if name in SOURCES and SOURCES[name].open is None:
        raise ValueError(f"data.source={name!r} is built in; choose another name")
    SOURCES[name] = Source(facts, opened)


def text_source(c: DataConfig, cache_dir: Path, quiet: bool = False) -> TextSource:
    """The documents of a language model; quiet: does not print which files are skipped."""
    built_in: dict[str, Callable[[], TextSource]] = {
        "stdlib": lambda: stdlib.open_stdlib(c.path, cache_dir),
        "text": lambda: text.open_text(c.path, cache_dir, c.held_out, quiet),
        "wikitext103": lambda: wikitext.open_wikitext103(c.path, cache_dir),
        "tfds_text": lambda: tfds.open_tfds_text(c.name, c.path),
    }
    opened = SOURCES[c.source].open
    return opened(c) if opened else built_in[c.source]()


def labelled_source(c: DataConfig, cache_dir: Path) -> ExampleSource:
    """The examples of a classifier."""
    built_in: dict[str, Callable[[], ExampleSource]] = {
        "listops": lambda: listops.open_listops(c.listops),
        "aan": lambda: aan.open_aan(c.path, cache_dir),
        "pathfinder": lambda: pathfinder.open_pathfinder(c.path, c.pathfinder),
        "digits": digits.open_digits,
    }
    named = lambda: tfds.open_named(c.source, c.path)  # noqa: E731
    opened = SOURCES[c.source].open
    return opened(c) if opened else built_in.get(c.source, named)()


def known_vocabulary(c: Config) -> tuple[int, Tokenizer | None]:
    """(token ids the model must have, the tokenizer of text), as far as known before data is read.

    The ids are 0 for images, for words that are still to be counted, and for a tokenizer_file that
    is not there: a plan can do without it, and so can a run that keeps its own.
    """
    d, facts = c.data, SOURCES[c.data.source].facts
    if c.model.stem == "image":
        return 0, None
    if d.source == "listops":
        return len(listops.SYMBOLS), None
    if facts is not None and not facts.text:
        return facts.n_ids, None
    file = expanded(d.tokenizer_file, "config.data.tokenizer_file")
    if d.tokenizer in FROM_FILE and not (file and Path(file).is_file()):
        return 0, None
    tokenizer = load_tokenizer(d.tokenizer, d.tokenizer_file, d.separator, d.start)
    return (tokenizer.vocab_size if tokenizer else 0), tokenizer

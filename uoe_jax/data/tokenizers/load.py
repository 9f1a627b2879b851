"""Opens the tokenizer that the configuration or the cache names, and keeps a run's own."""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from etils import epath

from uoe_jax.config.data import FROM_FILE, DataConfig
from uoe_jax.config.schema import Config
from uoe_jax.data.tokenizers.base import ByteTokenizer, Tokenizer, json_object
from uoe_jax.data.tokenizers.ends import FILES, find_ends
from uoe_jax.data.tokenizers.hf import HFTokenizer
from uoe_jax.data.tokenizers.words import WordTokenizer
from uoe_jax.errors import ConfigError, RunError, UserError, os_error_as, reason
from uoe_jax.runtime_env import expanded
from uoe_jax.workdir import locate, os_errors, read_json, read_text, write_text

TOKENIZER = "tokenizer.json"
_KEY = "config.data.tokenizer_file"
_OTHER = "or make one with uoe tokenizer train --config=… --vocab=4096 --out=tokenizer.json"


def load_tokenizer(kind: str, file: str, separator: str = "", start: str = "") -> Tokenizer | None:
    """The tokenizer of data.tokenizer, .tokenizer_file, .separator and .start; None for words."""
    if kind in FROM_FILE:
        if not file:
            raise ConfigError(_KEY, file, f"{kind!r} takes a file; give one, {_OTHER}")
        path = epath.Path(expanded(file, _KEY))
        try:
            with os_errors(path):
                text = read_text(path)
            return _opened(kind, text, json.dumps(files_beside(path.parent)), separator, start)
        except (OSError, ValueError, UserError) as error:
            why = error if isinstance(error, UserError) else f"cannot be read ({reason(error)})"
            other = "read it by data.tokenizer=library, " if kind == "bpe" else ""
            raise ConfigError(_KEY, file, f"{why}; {other}give another file, {_OTHER}") from error
    for key, value in (("tokenizer_file", file), ("separator", separator), ("start", start)):
        if value:
            remedy = f"is of no use with data.tokenizer={kind!r}; give 'bpe' or 'library' there"
            raise ConfigError(f"config.data.{key}", value, remedy)
    return ByteTokenizer() if kind == "bytes" else None


@functools.lru_cache(maxsize=2)  # a command asks for its tokenizer up to three times
def _opened(kind: str, text: str, files: str, separator: str, start: str) -> HFTokenizer:
    """text: of the file. files: JSON of `files_beside`."""
    content, beside = json_object(text), json.loads(files)
    # What a run kept has the ends in the file itself.
    separator = separator or str(content.get("separator", ""))
    start = start or str(content.get("start", ""))
    return HFTokenizer(content, kind, lambda c: find_ends(c, beside, separator, start))


def files_beside(directory: Any) -> dict[str, dict[str, Any]]:
    """{name: object} of the files that name a model's ends. Raises UserError for a damaged one."""
    remedy = "it says which tokens end and begin a document; fix it or take it away"
    found = {name: read_json(directory / name, remedy) for name in FILES}
    return {name: values for name, values in found.items() if values is not None}


def tokenizer_of(
    c: DataConfig, documents: Callable[[], Iterable[bytes]], cached: Path | None = None
) -> Tokenizer:
    """The configured tokenizer. `documents` are read to count words, unless `cached` has them."""
    found = load_tokenizer(c.tokenizer, c.tokenizer_file, c.separator, c.start)
    if found is not None:
        return found
    if cached is not None:
        with contextlib.suppress(UserError, OSError, UnicodeError):  # absent or damaged: count
            return stored(cached.read_text(encoding="utf-8"))
    words = WordTokenizer.train(documents(), c.min_count)
    if cached is not None:
        remedy = "free space there or set UOE_CACHE elsewhere"
        with os_error_as(RunError, f"{cached}: cannot be written", remedy):
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_text(cached, words.to_json())
    return words


def stored(text: str) -> Tokenizer:
    """The tokenizer of any kind whose `to_json` this is. Raises UserError for anything else."""
    content = json_object(text)
    kind = content.get("kind", "bpe" if "model" in content else None)
    if kind == "bytes" and content.get("fingerprint") == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    if kind == "words":
        return WordTokenizer.from_json(content)
    if kind in FROM_FILE:
        return HFTokenizer(content, kind)
    raise UserError("is no tokenizer that this version of uoe_jax knows")


def read_tokenizer(workdir: str) -> Tokenizer | None:
    """The copy that a run keeps, as file or data may change; None without one, as for bytes."""
    file = locate(workdir) / TOKENIZER
    try:
        with os_errors(file):
            return stored(read_text(file)) if file.is_file() else None
    except (OSError, UnicodeError, UserError) as error:
        raise UserError(f"{file}: {error}; restore it, or start in another --workdir") from error


def tokenizer_of_run(config: Config, workdir: str) -> Tokenizer:
    """The tokenizer that a run was trained with. Raises UserError where it is lost."""
    kept = ByteTokenizer() if config.data.tokenizer == "bytes" else read_tokenizer(workdir)
    if kept is None:
        lost = "is gone, and with it what the run's tokens mean; restore it"
        raise UserError(f"{locate(workdir) / TOKENIZER}: {lost}")
    return kept


def keep_tokenizer(workdir: epath.Path, tokenizer: Tokenizer | None) -> None:
    """Stores a tokenizer that came from a file or from data."""
    file = workdir / TOKENIZER
    if tokenizer is not None and not isinstance(tokenizer, ByteTokenizer) and not file.exists():
        write_text(file, tokenizer.to_json())


def check_tokenizer(config: Config, workdir: str) -> None:
    """Raises ConfigError for a data.tokenizer_file that is unusable or not the run's tokenizer."""
    data, name = config.data, config.data.tokenizer_file
    kept = read_tokenizer(workdir)
    if kept is not None and not (name and os.path.isfile(expanded(name, _KEY))):
        return
    given = load_tokenizer(data.tokenizer, name, data.separator, data.start)
    if kept is not None and given is not None and given.fingerprint != kept.fingerprint:
        remedy = "give that one, or none, or start in another --workdir"
        raise ConfigError(_KEY, name, f"is not the tokenizer of the run in {workdir}; {remedy}")

"""Opens the tokenizer that the configuration, a run or the cache names."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from etils import epath

from uoe_jax.config.data import FROM_FILE, DataConfig
from uoe_jax.data.tokenizers.base import ByteTokenizer, Tokenizer, json_object
from uoe_jax.data.tokenizers.ends import FILES, find_ends
from uoe_jax.data.tokenizers.hf import HFTokenizer
from uoe_jax.data.tokenizers.words import WordTokenizer
from uoe_jax.errors import ConfigError, RunError, UserError
from uoe_jax.runtime_env import expanded
from uoe_jax.workdir import read_json, write_text

_KEY = "config.data.tokenizer_file"
_OTHER = "or make one with uoe tokenizer train --config=… --vocab=4096 --out=tokenizer.json"


def load_tokenizer(kind: str, file: str, separator: str = "", start: str = "") -> Tokenizer | None:
    """The tokenizer of `data.tokenizer`; None for words, which are counted in the data.

    The arguments are data.tokenizer, .tokenizer_file, .separator and .start. Raises ConfigError
    where the file is missing or unusable, or a key is set that this kind ignores.
    """
    if kind in FROM_FILE:
        if not file:
            remedy = "tokenizers 'bpe' and 'library' take a file; give one"
            raise ConfigError(_KEY, file, f"{remedy}, {_OTHER}")
        path = epath.Path(expanded(file, _KEY))
        versions = tuple(_version(path.parent / name) for name in (path.name, *FILES))
        # A file on this machine is read again only where it has changed. Others have no inode.
        args = (kind, file, path, separator, start)
        return _read_cached(*args, versions) if versions[0] else _read(*args)
    for key, value in (("tokenizer_file", file), ("separator", separator), ("start", start)):
        if value:
            remedy = f"is of no use with data.tokenizer={kind!r}; give 'bpe' or 'library' there"
            raise ConfigError(f"config.data.{key}", value, remedy)
    return ByteTokenizer() if kind == "bytes" else None


def _version(file: epath.Path) -> tuple[int, ...] | None:
    with contextlib.suppress(OSError, ValueError):
        found = os.stat(file)
        return found.st_ino, found.st_size, found.st_mtime_ns
    return None


@functools.lru_cache(maxsize=2)
def _read_cached(
    kind: str, shown: str, file: epath.Path, separator: str, start: str, versions: object
) -> HFTokenizer:
    return _read(kind, shown, file, separator, start)


def _read(kind: str, shown: str, file: epath.Path, separator: str, start: str) -> HFTokenizer:
    """shown: data.tokenizer_file as it was written, for errors."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except Exception as error:  # the clients of gs:// raise exceptions of a dozen kinds
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        remedy = f"cannot be read ({reason}); give another file, {_OTHER}"
        raise ConfigError(_KEY, shown, remedy) from error
    try:
        content = json_object(text)
        kept = content.get("separator", ""), content.get("start", "")  # by a run
        ends = functools.partial(
            find_ends,
            files=files_beside(file.parent),
            separator=separator or str(kept[0]),
            start=start or str(kept[1]),
        )
        return HFTokenizer(content, kind, ends)
    except UserError as error:
        other = "read it by data.tokenizer=library, " if kind == "bpe" else ""
        raise ConfigError(_KEY, shown, f"{error}; {other}give another file, {_OTHER}") from error


def files_beside(directory: Any) -> dict[str, dict[str, Any]]:
    """{name: object} of the files that name a model's ends. Raises UserError for a damaged one."""
    remedy = "it says which tokens end and begin a document; fix it or take it away"
    found = {name: read_json(directory / name, remedy) for name in FILES}
    return {name: values for name, values in found.items() if values is not None}


def tokenizer_of(
    c: DataConfig, documents: Callable[[], Iterable[bytes]], cached: Path | None = None
) -> Tokenizer:
    """The tokenizer of the `data` section.

    documents: the training split, to count words. cached: where that vocabulary is kept.
    """
    found = load_tokenizer(c.tokenizer, c.tokenizer_file, c.separator, c.start)
    if found is not None:
        return found
    if cached is not None and cached.is_file():
        # Damaged ones are counted again.
        with contextlib.suppress(UserError, OSError, UnicodeError):
            return stored(cached.read_text(encoding="utf-8"))
    words = WordTokenizer.train(documents(), c.min_count)
    if cached is not None:
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            write_text(cached, words.to_json())
        except OSError as error:
            remedy = "free space there or set UOE_CACHE elsewhere."
            raise RunError(f"{cached}: cannot be written ({error}): {remedy}") from error
    return words


def stored(text: str) -> Tokenizer:
    """The tokenizer of any kind whose `to_json` this is. Raises UserError for anything else."""
    content = json_object(text)
    kind = content.get("kind", "bpe" if "model" in content else None)
    if kind == "bytes" and content.get("fingerprint") == ByteTokenizer.fingerprint:
        return ByteTokenizer()
    if kind == "words":
        return WordTokenizer.from_json(text)
    if kind in FROM_FILE:
        return HFTokenizer(content, kind)
    raise UserError("is no tokenizer that this version of uoe_jax knows")

"""The tokenizer kept in a run's workdir: its file or data may have changed since the run began."""

import os

from etils import epath

from uoe_jax.config.schema import Config
from uoe_jax.data.tokenizers.base import ByteTokenizer, Tokenizer
from uoe_jax.data.tokenizers.load import load_tokenizer, stored
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.runtime_env import expanded
from uoe_jax.workdir import locate, os_errors, read_text, write_text

TOKENIZER = "tokenizer.json"


def read_tokenizer(workdir: str) -> Tokenizer | None:
    """The kept tokenizer; None without one, as for bytes. Raises UserError for a damaged file."""
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
    key, data, name = "config.data.tokenizer_file", config.data, config.data.tokenizer_file
    kept = read_tokenizer(workdir)
    if kept is not None and not (name and os.path.isfile(expanded(name, key))):
        return
    given = load_tokenizer(data.tokenizer, name, data.separator, data.start)
    if kept is not None and given is not None and given.fingerprint != kept.fingerprint:
        remedy = "give that one, or none, or start in another --workdir"
        raise ConfigError(key, name, f"is not the tokenizer of the run in {workdir}; {remedy}")

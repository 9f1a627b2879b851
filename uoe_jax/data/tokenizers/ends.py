"""Which tokens end and begin a document: what the model's files say, else a guess by name.

End: `eos_token_id` of config.json or generation_config.json, `eos_token` of tokenizer_config.json
or special_tokens_map.json, or what the post-processor of tokenizer.json appends to a text. Start:
what `transformers` prepends to a text (`add_bos_token`, else the post-processor); where that is
nothing, the separator, as such models were trained.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from uoe_jax.errors import UserError

CONFIG, SETTINGS = "config.json", "tokenizer_config.json"
FILES = (CONFIG, "generation_config.json", SETTINGS, "special_tokens_map.json")
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")
STARTS = ("<|begin_of_text|>", "<s>", "<bos>", "<｜begin▁of▁sentence｜>")
# Their tokenizer prepends the start token unless add_bos_token says otherwise.
_ADD_BOS_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")

Json = Mapping[str, Any]  # an object
Files = Mapping[str, Json]  # {name: object} of those that the model has


class Ends(NamedTuple):
    """Tokens by their text."""

    separator: str  # a document's last target
    start: str  # its first input
    notes: tuple[str, ...] = ()  # a sentence for each statement of a file that was not followed


def added_tokens(content: Json) -> list[dict[str, Any]]:
    """Of the object in a tokenizer.json, as they stand there."""
    return [token for token in content.get("added_tokens") or () if isinstance(token, dict)]


def special(content: Json) -> dict[str, int]:
    """{special token: id} of the object in a tokenizer.json."""
    return {t["content"]: t["id"] for t in added_tokens(content) if t.get("special")}


def find_ends_by_name(content: Json) -> Ends:
    """The known separator and start among the special tokens, else the only one; else UserError."""
    names = list(special(content))
    known = [name for name in SEPARATORS if name in names] or names[: len(names) == 1]
    if known:
        return Ends(known[0], next((name for name in STARTS if name in names), known[0]))
    raise UserError(
        f"has no special token known to separate documents ({', '.join(SEPARATORS)}; its special "
        f"tokens: {', '.join(names) or 'none'}); name the token with --config.data.separator"
    )


def find_ends(content: Json, files: Files, separator: str = "", start: str = "") -> Ends:
    """The ends for one tokenizer. content: the object in its tokenizer.json. files: see `FILES`.

    separator, start: data.separator and data.start, which come first; "": not set. UserError where
    nothing names the end, several tokens are prepended, or a given one is not in the vocabulary.
    """
    search = _Search(content, files)
    for key, name in (("separator", separator), ("start", start)):
        if name and name not in search.tokens:
            raise UserError(f"has no token {name!r}, which data.{key} names; give one that it has")
    stated = search.stated("eos") or next(iter(search.appended), None)
    last = separator or stated or find_ends_by_name(content).separator
    return Ends(last, start or search.start(last, stated is not None), tuple(search.notes))


class _Search:
    def __init__(self, content: Json, files: Files) -> None:
        self.content, self.files = content, {name: files.get(name, {}) for name in FILES}
        self.added = {token["content"] for token in added_tokens(content)}
        vocabulary = (content.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, dict):
            self.by_id = {i: token for token, i in vocabulary.items()}
        else:  # of Unigram: [token, score]
            self.by_id = {i: entry[0] for i, entry in enumerate(vocabulary)}
        self.by_id |= {token["id"]: token["content"] for token in added_tokens(content)}
        self.tokens = set(self.by_id.values())
        self.prepended, self.appended = template(content.get("post_processor"))
        self.notes: list[str] = []

    def start(self, separator: str, end_is_stated: bool) -> str:
        """end_is_stated: some file names the end; then the start is not guessed by name either."""
        settings, model_type = self.files[SETTINGS], self.files[CONFIG].get("model_type")
        adds, name = settings.get("add_bos_token"), settings.get("tokenizer_class")
        class_adds = str(name).removesuffix("Fast") in _ADD_BOS_CLASSES
        if settings and name is None:  # then the class follows from the model's
            class_adds = model_type in ("llama", "mistral")
        if adds is True or (class_adds and adds is not False):
            return self.stated("bos", (SETTINGS, *FILES)) or (self.prepended or [separator])[0]
        if class_adds:
            return separator  # its class follows add_bos_token, whatever the post-processor is
        if len(self.prepended) > 1:
            puts = f"puts {' '.join(self.prepended)} in front of a text, where one token can stand"
            raise UserError(f"{puts} here; name it with --config.data.start")
        if self.prepended:
            return self.prepended[0]
        if settings:
            return separator  # transformers prepends nothing
        found = self.stated("bos")
        if found or end_is_stated or model_type:
            return found or separator
        names = special(self.content)
        return next((name for name in STARTS if name in names), separator)

    def stated(self, which: str, order: Sequence[str] = FILES) -> str | None:
        """The token of `bos` or `eos` in the first file that names one of the tokenizer's."""
        found: str | None = None
        for name in order:
            for key in (f"{which}_token_id", f"{which}_token"):
                token = self.token(self.files[name].get(key), name, key)
                if token and found and token != found and which == "eos":
                    self.notes.append(f"{name} has {key}={token!r}; documents end with {found!r}")
                found = found or token
        return found

    def token(self, value: Any, file: str, key: str) -> str | None:
        """A token by its id, its text, an object of either, or the first of a list; else None."""
        value = value[0] if isinstance(value, list) and value else value
        value = value.get("content") if isinstance(value, dict) else value
        if value is None or value == []:
            return None
        token = self.by_id.get(value) if type(value) is int else None
        if isinstance(value, str) and value in self.tokens:
            token = value
        if token in self.added or re.fullmatch(r"[<\[](?!0x).+[>\]]", token or ""):
            return token
        self.notes.append(f"{file} has {key}={value!r}; no special token, so it is not used")
        return None


def template(step: Any) -> tuple[list[str], list[str]]:
    """(special tokens that a post-processor prepends to a text, those it appends)."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence":
        parts = [template(part) for part in step.get("processors") or ()]
        front, back = (next((part[i] for part in parts if part[i]), []) for i in (0, 1))
        return front, back
    if kind in ("RobertaProcessing", "BertProcessing"):
        return [step["cls"][0]], [step["sep"][0]]
    sides: tuple[list[str], list[str]] = [], []
    if kind == "TemplateProcessing":
        seen = False  # the text itself
        for piece in step.get("single") or ():
            if "Sequence" in piece:
                seen = True
            else:
                sides[seen].append(piece["SpecialToken"]["id"])
    return sides

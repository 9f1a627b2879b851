"""Which tokens begin and end a document: what the model's files say, and a guess by name only where none of them does.

The end is `eos_token_id` of `config.json` or `generation_config.json`, `eos_token` of `tokenizer_config.json` or
`special_tokens_map.json`, or what the post-processor of `tokenizer.json` puts behind a text. The start is what
`transformers` puts in front of a text (`add_bos_token`, else the post-processor); where it puts nothing there, a document
begins with the separator, as in the training of such models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from uoe_jax.errors import UserError

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<｜end▁of▁sentence｜>")
STARTS = ("<|begin_of_text|>", "<s>", "<bos>", "<｜begin▁of▁sentence｜>")
# Their tokenizer puts the start token in front unless add_bos_token says otherwise.
_ADD_BOS_CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")

Files = Mapping[str, Mapping[str, Any]]


class UnknownEnds(UserError):
    """No file says which token ends a document, and no token has a known name; data.separator names one."""


class Ends(NamedTuple):
    """Tokens by their text.

    separator: a document's last target. start: its first input. notes: one sentence for every statement that was not
    followed.
    """

    separator: str
    start: str
    notes: tuple[str, ...] = ()


def by_name(special: Sequence[str]) -> Ends:
    """The first known separator and start among the special tokens; or else the only special token.

    Raises:
      UnknownEnds: there is none.
    """
    known = [name for name in SEPARATORS if name in special] or (
        list(special) if len(special) == 1 else []
    )
    if known:
        return Ends(known[0], next((name for name in STARTS if name in special), known[0]))
    shown = ", ".join(special) or "none"
    raise UnknownEnds(
        f"has no special token known to separate documents ({', '.join(SEPARATORS)}; its special tokens: {shown}); "
        "name the token with --config.data.separator"
    )


def find_ends(
    content: Mapping[str, Any], files: Files, separator: str = "", start: str = ""
) -> Ends:
    """The ends of documents for one tokenizer.

    Args:
      content: the object in its tokenizer.json.
      files: {name: object} of those of `FILES` that the model has.
      separator, start: data.separator and data.start, which come first; "": not given.

    Raises:
      UserError: a given token is not in the vocabulary, or the post-processor puts several tokens in front.
      UnknownEnds: nothing says what ends a document.
    """
    return _Search(content, files).ends(separator, start)


class _Search:
    def __init__(self, content: Mapping[str, Any], files: Files) -> None:
        added = [token for token in content.get("added_tokens") or () if isinstance(token, dict)]
        self.special = [token["content"] for token in added if token.get("special")]
        self.added = {token["content"] for token in added}
        self.by_id = {i: token for token, i in _vocabulary(content)} | {
            token["id"]: token["content"] for token in added
        }
        self.tokens = set(self.by_id.values())
        self.front, self.back = template(content.get("post_processor"))
        self.config, self.generation, self.tokenizer, self.map = (
            files.get(name, {}) for name in FILES
        )
        self.notes: list[str] = []

    def ends(self, separator: str, start: str) -> Ends:
        for key, name in (("separator", separator), ("start", start)):
            if name and name not in self.tokens:
                raise UserError(
                    f"has no token {name!r}, which data.{key} names; give the text of a token it has"
                )
        said = self.said("eos")
        if separator:
            last = separator
        elif said or self.back:
            last = said or self.back[0]
        else:
            last = by_name(self.special).separator
        return Ends(last, start or self.start(last, bool(said or self.back)), tuple(self.notes))

    def start(self, separator: str, told: bool) -> str:
        """told: some file has said what ends a document, so that nothing is guessed of its start either."""
        adds, by_class = self.tokenizer.get("add_bos_token"), self._class_adds_bos()
        if adds is True or (by_class and adds is not False):
            return (
                self.said("bos", ("tokenizer_config.json", *FILES))
                or (self.front or [separator])[0]
            )
        if adds is False and by_class:
            return separator  # its class goes by that key, whatever the post-processor is
        if len(self.front) > 1:
            shown = " ".join(self.front)
            raise UserError(
                f"puts {shown} in front of a text, where one token can stand here; name it with --config.data.start"
            )
        if self.front:
            return self.front[0]
        if self.tokenizer:
            return separator  # transformers puts nothing in front
        found = self.said("bos")
        if found or told or self.config.get("model_type"):
            return found or separator
        return next((name for name in STARTS if name in self.special), separator)

    def _class_adds_bos(self) -> bool:
        """Whether the class of the tokenizer puts the start in front by itself."""
        name = self.tokenizer.get("tokenizer_class")
        if self.tokenizer and name is None:  # then the class follows from the model's
            return self.config.get("model_type") in ("llama", "mistral")
        return str(name).removesuffix("Fast") in _ADD_BOS_CLASSES

    def said(self, which: str, order: Sequence[str] = FILES) -> str | None:
        """The token of `bos` or `eos` in the first of the files that names one that the tokenizer has."""
        files = dict(zip(FILES, (self.config, self.generation, self.tokenizer, self.map)))
        found: str | None = None
        for name in order:
            for key in (f"{which}_token_id", f"{which}_token"):
                token = self.token(files[name].get(key), name, key)
                if token and found and token != found and which == "eos":
                    self.notes.append(f"{name} has {key}={token!r}; documents end with {found!r}")
                found = found or token
        return found

    def token(self, value: Any, file: str, key: str) -> str | None:
        """A token by its id, its text, the object of either, or the first of a list; None where there is none."""
        value = value[0] if isinstance(value, list) and value else value
        value = value.get("content") if isinstance(value, dict) else value
        if value is None or value == []:
            return None
        token = self.by_id.get(value) if type(value) is int else None
        if isinstance(value, str) and value in self.tokens:
            token = value
        if token in self.added or (
            token is not None and re.fullmatch(r"[<\[](?!0x).+[>\]]", token)
        ):
            return token
        self.notes.append(
            f"{file} has {key}={value!r}, which is no special token of tokenizer.json; it is not used"
        )
        return None


def _vocabulary(content: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(token, id) of the model's vocabulary; a dict, or of Unigram a list of [token, score]."""
    model = content.get("model")
    found = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(found, dict):
        yield from found.items()
    elif isinstance(found, list):
        yield from ((entry[0], i) for i, entry in enumerate(found))


def template(step: Any) -> tuple[list[str], list[str]]:
    """(special tokens that a post-processor puts in front of a text, those it puts behind it)."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind == "Sequence":
        parts = [template(part) for part in step.get("processors") or ()]
        return next((front for front, _ in parts if front), []), next(
            (back for _, back in parts if back), []
        )
    if kind in ("RobertaProcessing", "BertProcessing"):
        return [step["cls"][0]], [step["sep"][0]]
    if kind != "TemplateProcessing":
        return [], []
    front: list[str] = []
    back: list[str] = []
    seen = False
    for piece in step.get("single") or ():
        if "Sequence" in piece:
            seen = True
        else:
            (back if seen else front).append(piece["SpecialToken"]["id"])
    return front, back

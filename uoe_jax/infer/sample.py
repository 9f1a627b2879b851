"""Text from a language model: prefill, then cached decoding token by token."""

import dataclasses
import itertools
import time
from typing import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from uoe_jax.config.schema import Config
from uoe_jax.data.tokenizers.base import Tokenizer
from uoe_jax.distributed.mesh import everywhere
from uoe_jax.errors import UserError
from uoe_jax.models.decoder import Layers, Transformer
from uoe_jax.train.step import Params, Program

Model = Callable[[Params], Transformer]


@dataclasses.dataclass(frozen=True)
class Completion:
    """One prompt and its continuation."""

    prompt: str
    followed: str
    n_tokens: int
    ended: str  # by "document" (the separator), "stop" (a stop string, left out) or "limit"
    cut: bool = False  # the context was full before generate.max_tokens

    @property
    def text(self) -> str:
        return self.prompt + self.followed


def pick(logits_BV: Array, key: Array, temperature: Array, top_k: Array, top_p: Array) -> Array:
    """Draws a token for each row, int32 [B], from float32 logits.

    key: typed keys [B], so that a row's token does not depend on the other rows. temperature: 0
    takes the likeliest. top_k: 0 keeps all. top_p: keeps the likeliest up to this probability.
    """
    greedy_B = logits_BV.argmax(-1)
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    divisor = jnp.where(temperature > 0, temperature, 1.0)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1) / divisor
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    rank_1V = jnp.arange(logits_BV.shape[-1])[None]
    allowed_BV = (before_BV < top_p) & ((rank_1V < top_k) | (top_k == 0)) | (rank_1V == 0)
    drawn_B = jax.vmap(jax.random.categorical)(key, jnp.where(allowed_BV, sorted_BV, -jnp.inf))
    token_B = jnp.take_along_axis(order_BV, drawn_B[:, None], axis=-1)[:, 0]
    return jnp.where(temperature > 0, token_B, greedy_B).astype(jnp.int32)


class GrowingText:
    """What a model writes after the prompt `before`; it ends before the first of the `stops`."""

    def __init__(
        self, tokenizer: Tokenizer, limit: int, stops: Sequence[str] = (), before: str = ""
    ) -> None:
        self._tokenizer, self._limit, self._stops = tokenizer, limit, tuple(stops)
        spaced = tokenizer.tokens_are_words and before and not before.endswith((" ", "\n"))
        self._space = " " if spaced else ""
        self.ids: list[int] = []  # without a separator that ended them
        # "document" (by the separator), "stop" (by a stop string), "limit"; None: not yet.
        self.ended: str | None = "limit" if limit < 1 else None
        self.text = self.shown = ""  # shown: the part of the text that will not change

    def push(self, token: int) -> str:
        """Adds a token; returns what can be shown now and could not before."""
        if token == self._tokenizer.separator:
            self.ended = "document"
        else:
            self.ids.append(token)
            decoded = self._tokenizer.decode(self.ids)
            self.text = self._space + decoded if decoded else ""
            found = [at for stop in self._stops if (at := self.text.find(stop)) >= 0]
            if found:
                self.text, self.ended = self.text[: min(found)], "stop"
            elif len(self.ids) >= self._limit:
                self.ended = "limit"
        size = len(self.text)
        if self.ended is None:
            # Held back: bytes of an incomplete character, and what may be the beginning of a stop.
            beginnings = [stop[:n] for stop in self._stops for n in range(len(stop))]
            partial = [len(b) for b in beginnings if self.text.endswith(b)]
            size = len(self.text.rstrip("\N{REPLACEMENT CHARACTER}")) - max(partial, default=0)
        before, self.shown = self.shown, self.text[: max(size, len(self.shown))]
        return self.shown[len(before) :]


class Sampler:
    """Completes prompts with a model's parameters."""

    def __init__(self, config: Config, model: Model, params: Params, tokenizer: Tokenizer) -> None:
        self.config, self.tokenizer, self._model, self._params = config, tokenizer, model, params
        self.seconds, self.timed = 0.0, 0  # of decoding without compilation, and tokens drawn in it
        self.cache_bytes = 0  # of the KV cache of one row
        self._warm: set[int] = set()  # batch sizes whose programs are compiled
        self._counts = False  # whether the tokens just drawn are timed
        context = config.model.context_length
        self._prefill = jax.jit(lambda p, tokens, length: model(p).prefill(tokens, length, context))
        self._layers: Layers | None = None  # a copy of the layers' weights, from the first token on

        decode = lambda p, layers, cache, x_B: model(p).decode_step(x_B, cache, layers)  # noqa: E731
        self._step = jax.jit(decode, donate_argnums=2)

        def draw(logits_BV, seed, rows_B, next_B, settings):
            fold = jax.vmap(jax.random.fold_in)
            keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(rows_B)
            known_BV = logits_BV[:, : tokenizer.vocab_size]  # the model's vocabulary may be larger
            return everywhere(pick(known_BV, fold(keys_B, next_B), *settings))

        self._draw = jax.jit(draw)

    def complete(
        self,
        prompts: Sequence[str],
        stops: Sequence[str] = (),
        first: int = 0,
        batch: int = 0,
        show: Callable[[int, str], None] = lambda i, text: None,
    ) -> list[Completion]:
        """Continues every prompt as `config.generate` says, independently of the other prompts.

        Args:
          stops: the text of a prompt ends before the first of these.
          first: number of the first prompt; a prompt's draws follow from the seed and its number.
          batch: prompts in a batch, of similar lengths; 0: all.
          show: called with a prompt's index and the next piece of its continuation.
        """
        ids = [self.encoded(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: (self._bucket(len(ids[i])), i))
        size = min(batch or len(ids), len(ids))
        room, most = self.config.model.context_length, self.config.generate.max_tokens
        limits = [min(most, room - len(row)) for row in ids]
        texts = [GrowingText(self.tokenizer, n, stops, p) for n, p in zip(limits, prompts)]
        for start in range(0, len(order), size):
            members = order[start : start + size]
            rows = members + members[:1] * (size - len(members))  # one shape, so one program
            for token_B in self._tokens([ids[i] for i in rows], [first + i for i in rows]):
                for i, token in zip(members, token_B):
                    if texts[i].ended is None:
                        self.timed += self._counts
                        if more := texts[i].push(int(token)):
                            show(i, more)
                if all(texts[i].ended for i in members):
                    break
        cut = [t.ended == "limit" and len(t.ids) < most for t in texts]
        found = zip(prompts, texts, cut)
        return [Completion(p, t.text, len(t.ids), str(t.ended), c) for p, t, c in found]

    def encoded(self, prompt: str, where: str = "") -> np.ndarray:
        """The tokens of a prompt, int32 [L], after the one that starts a document."""
        ids = np.array([self.tokenizer.start, *self.tokenizer.encode(prompt)], np.int32)
        context = self.config.model.context_length
        if len(ids) >= context:
            shown = repr(prompt if len(prompt) < 40 else prompt[:36] + "…")
            what = f"{len(ids)} tokens leave no room in model.context_length={context}"
            raise UserError(f"{where or '--prompt=' + shown}: {what}; shorten it")
        return ids

    def _tokens(self, ids: list[np.ndarray], numbers: list[int]) -> Iterator[np.ndarray]:
        """Yields one token after another for every row, int32 [B]. numbers: of the prompts."""
        c = self.config.generate
        tokens_BL = np.zeros((len(ids), max(self._bucket(len(row)) for row in ids)), np.int32)
        for i, row in enumerate(ids):
            tokens_BL[i, : len(row)] = row
        length_B, rows_B = np.array([*map(len, ids)], np.int32), np.array(numbers, np.uint32)
        knobs = (np.float32(c.temperature), np.int32(c.top_k), np.float32(c.top_p))
        logits, cache = self._prefill(self._params, tokens_BL, length_B)
        self.cache_bytes = sum(a.nbytes for a in jax.tree.leaves(cache.attention)) // len(ids)
        warm, started = len(ids) in self._warm, 0.0
        for turn in itertools.count():
            token_B = self._draw(logits, np.uint32(c.seed), rows_B, cache.next_B, knobs)
            host_B = jax.device_get(token_B)
            self._counts = turn > 0 and (warm or turn > 1)  # the first two compile
            if self._counts:
                self.seconds += time.perf_counter() - started
                self._warm.add(len(ids))
            yield host_B
            started = time.perf_counter()
            if self._layers is None:
                self._layers = jax.jit(lambda p: self._model(p).each_layer())(self._params)
            logits, cache = self._step(self._params, self._layers, cache, token_B)

    def _bucket(self, length: int) -> int:
        """A length to pad a prompt to, one of few, so that few prefills are compiled."""
        multiple = self.config.model.patch_multiple
        power = max(16, 1 << (length - 1).bit_length())
        return min(-(-power // multiple) * multiple, self.config.model.context_length)


def sample(config: Config, program: Program, params: Params, tokenizer: Tokenizer) -> str:
    """One completion of the configured prompt."""
    prompts = [config.generate.prompt]
    return Sampler(config, program.model, params, tokenizer).complete(prompts)[0].text

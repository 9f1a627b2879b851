"""Text from a language model: prefill, then cached decoding token by token."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.config import Config
from uoe_jax.data.tokenizer import Tokenizer
from uoe_jax.errors import UserError
from uoe_jax.mesh import everywhere
from uoe_jax.model import Cache, Transformer
from uoe_jax.train.step import Params, Program


@dataclasses.dataclass(frozen=True)
class Completion:
    """One prompt and what followed: `text` has both. `ended`: the model closed the document; else a limit was met."""

    text: str
    n_tokens: int
    ended: bool


def pick(logits_BV: jax.Array, key: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Draws a token for each row, int32 [B].

    Args:
      logits_BV: float32. key: typed keys [B], one a row, so that a row's draw does not depend on its neighbours.
      temperature: 0 takes the likeliest. top_k: 0 keeps all. top_p: the likeliest tokens up to this probability.
    """
    greedy_B = logits_BV.argmax(-1)
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1) / jnp.where(temperature > 0, temperature, 1.0)
    probability_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
    rank_1V = jnp.arange(logits_BV.shape[-1])[None]
    allowed_BV = (before_BV < top_p) & ((rank_1V < top_k) | (top_k == 0)) | (rank_1V == 0)
    drawn_B = jax.vmap(jax.random.categorical)(key, jnp.where(allowed_BV, sorted_BV, -jnp.inf))
    token_B = jnp.take_along_axis(order_BV, drawn_B[:, None], axis=-1)[:, 0]
    return jnp.where(temperature > 0, token_B, greedy_B).astype(jnp.int32)


class Sampler:
    """Completes prompts with a model's parameters."""

    def __init__(
        self, config: Config, model: Callable[[Params], Transformer], params: Params, tokenizer: Tokenizer
    ) -> None:
        self.config, self.tokenizer, self._params = config, tokenizer, params
        self.seconds, self.drawn = 0.0, 0  # of decoding, for the report
        self.cache_bytes = 0  # of the attention's cache, of one row
        context = config.model.context_length
        self._prefill = jax.jit(lambda p, tokens, length: model(p).prefill(tokens, length, context))

        @functools.partial(jax.jit, donate_argnums=1)
        def step(p: Params, cache: Cache, token_B: jax.Array) -> tuple[jax.Array, Cache]:
            return model(p).step(token_B, cache)

        @jax.jit
        def draw(logits_BV, seed, next_B, settings):
            rows_B = jnp.arange(logits_BV.shape[0])
            fold = jax.vmap(jax.random.fold_in)
            keys_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(rows_B)
            known_BV = logits_BV[:, : tokenizer.vocab_size]  # a model may have more than there are tokens
            return everywhere(pick(known_BV, fold(keys_B, next_B), *settings))

        self._step, self._draw = step, draw

    def complete(self, prompts: Sequence[str]) -> list[Completion]:
        """Continues every prompt as `config.generate` says.

        Raises:
          UserError: a prompt leaves no room in the context.
        """
        settings, context = self.config.generate, self.config.model.context_length
        separator = self.tokenizer.separator
        rows = [np.concatenate([[self.tokenizer.start], self.tokenizer.encode(prompt)]).astype(np.int32) for prompt in prompts]
        longest = max(len(row) for row in rows)
        if longest >= context:
            raise UserError(f"--prompt: {longest} tokens leave no room in model.context_length={context}; shorten it")
        tokens_BL = np.zeros((len(rows), self._bucket(longest)), np.int32)
        for i, row in enumerate(rows):
            tokens_BL[i, : len(row)] = row
        length_B = np.array([len(row) for row in rows], np.int32)
        knobs = (np.float32(settings.temperature), np.int32(settings.top_k), np.float32(settings.top_p))
        logits, cache = self._prefill(self._params, tokens_BL, length_B)
        self.cache_bytes = sum(a.nbytes for a in jax.tree.leaves(cache.attention)) // len(rows)
        generated: list[list[int]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        started = time.perf_counter()
        for _ in range(min(settings.max_tokens, context - longest)):
            token_B = self._draw(logits, np.uint32(settings.seed), cache.next_B, knobs)
            for i, token in enumerate(jax.device_get(token_B)):
                if i in open_rows:
                    if token == separator:
                        open_rows.discard(i)
                    else:
                        generated[i].append(int(token))
                        self.drawn += 1
            if not open_rows:
                break
            logits, cache = self._step(self._params, cache, token_B)
        self.seconds += time.perf_counter() - started
        return [
            Completion(self._joined(prompt, self.tokenizer.decode(ids)), len(ids), i not in open_rows)
            for i, (prompt, ids) in enumerate(zip(prompts, generated))
        ]

    def _joined(self, prompt: str, text: str) -> str:
        """Words are parted by a space that no token stands for."""
        parted = self.tokenizer.tokens_are_words and prompt and text and not prompt.endswith((" ", "\n"))
        return f"{prompt}{' ' * bool(parted)}{text}"

    def _bucket(self, length: int) -> int:
        """A length to pad prompts to: few distinct ones, so that few prefills are compiled."""
        multiple = self.config.model.patch_multiple
        power = max(16, 1 << (length - 1).bit_length())
        return min(-(-power // multiple) * multiple, self.config.model.context_length)


def sample(config: Config, program: Program, params: Params, tokenizer: Tokenizer) -> str:
    """One completion of the configured prompt."""
    return Sampler(config, program.model, params, tokenizer).complete([config.generate.prompt])[0].text

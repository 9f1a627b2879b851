"""Tokens a second while text is generated, UoE against the dense model of its width: `python -m benchmarks.decode`.

8 sequences, 8 layers, D 512, F 2048, H 8, V 256, capacity_factor 1, half the experts for every token. Both models write their
caches in place. A step reads its whole cache however much of it is filled, so that prompts may be short. Operations are those
of a step as it is compiled: few, as what takes time is to read weights and caches.
"""

from __future__ import annotations

import functools
import statistics
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks import timing
from benchmarks.model import PAIR, config
from uoe_jax.train.step import functional

BATCH, STEPS = 8, 8
BARS = {512: 1.2, 4096: 1.5}  # of the dense model's tokens a second


class Decoder(NamedTuple):
    """run: STEPS tokens of every sequence. cache: bytes of keys and values. flops, temporary: of a step, as XLA counts them."""

    run: Callable[[], Any]
    cache: int
    flops: float
    temporary: int


def decoder(attention: str, mlp: str, context: int) -> Decoder:
    c = config(attention, mlp, timing.dtype(), context_length=context)
    init, model, _ = functional(c.model)
    params = jax.jit(init)(jax.random.key(0))
    layers = jax.jit(lambda p: model(p).each_layer())(params)
    prompt = jnp.ones((BATCH, 16), jnp.int32)
    _, cache = jax.jit(lambda p: model(p).prefill(prompt, jnp.full((BATCH,), 16), context))(params)
    jitted = functools.partial(jax.jit, donate_argnums=2)(
        lambda p, layers, cache, token: model(p).decode_step(token, cache, layers)
    )
    step = jitted.lower(params, layers, cache, jnp.ones((BATCH,), jnp.int32)).compile()
    held = {"cache": cache}

    def run() -> Any:
        token = jnp.ones((BATCH,), jnp.int32)
        for _ in range(STEPS):
            logits, held["cache"] = step(params, layers, held["cache"], token)
            token = logits.argmax(-1).astype(jnp.int32)
        return token

    size = sum(a.nbytes for layer in cache.attention for a in (layer.k, layer.v))
    return Decoder(
        run, size, step.cost_analysis()["flops"], step.memory_analysis().temp_size_in_bytes
    )


def main() -> None:
    options = timing.arguments(__doc__, rounds=5)
    rows = []
    for context, bar in BARS.items():
        decoders = {name: decoder(*blocks, context) for name, blocks in PAIR.items()}
        product, operations = timing.matmul(timing.dtype())
        times = timing.interleaved(
            {"peak": product} | {name: d.run for name, d in decoders.items()}, options.rounds
        )
        peak = operations / min(times["peak"])
        for name, d in decoders.items():
            found = timing.against(
                times["dense"], times[name]
            )  # tokens a second: the other way round
            row = {
                "context": context,
                "model": name,
                "tokens_per_s": BATCH * STEPS / statistics.median(times[name]),
            }
            row |= {
                "ratio": found["ratio"],
                "ratio_low": found["ratio_low"],
                "ratio_high": found["ratio_high"],
            }
            used = d.flops * STEPS / statistics.median(times[name]) / peak
            row |= {
                "flop_ratio": d.flops / decoders["dense"].flops,
                "of_peak_%": 100 * used,
                "temp_MB": d.temporary / 1e6,
            }
            row |= {"cache_MB": d.cache / 1e6, "cache_ratio": d.cache / decoders["dense"].cache}
            if name == "UoE":
                row |= {
                    "bars": f"{bar}, 0.525",
                    "met": row["ratio"] >= bar and row["cache_ratio"] <= 0.5 * 1.05,
                }
            rows.append(row)
        del decoders
    timing.finish("decode", options.out, rows)


if __name__ == "__main__":
    main()

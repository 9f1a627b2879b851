"""One block, forward and backward, against the dense block of its width: `python -m benchmarks.layer [--rounds=4] [--shares=half,quarter]`.

UoME and SMHA at half and a quarter of the tokens per expert, causal token choice and expert choice; beside them, of the same
selection, the one-hot dispatch of Flaxformer's expert choice, and `jax.lax.ragged_dot`. Attention is compared with the dense
block of this project, which computes tiles and none behind a causal mask, and with one that holds whole squares. On a CPU in
float32; on an accelerator in bfloat16 at larger sizes. Beside it, the share of a roofline that adds up the kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks import timing
from uoe_jax.config import ModelConfig
from uoe_jax.config.routing import RoutingConfig
from uoe_jax.costs.flops import attention_flops, mlp_flops
from uoe_jax.distributed.manual import Region
from uoe_jax.layers.attention import Attention
from uoe_jax.layers.common import Tokens, rotary_tables
from uoe_jax.layers.tiles import computed_scores
from uoe_jax.layers.uome import UoME
from uoe_jax.models.decoder import make_attention, make_mlp
from uoe_jax.moe.dispatch import backend_for, combine_slots, gather_slots
from uoe_jax.moe.routing import decide


class Sizes(NamedTuple):
    """Of the cases of one kind of device."""

    dtype: str
    mlp: tuple[int, int, int, int]  # B, L, D, F
    attention: tuple[int, int, int, int]  # B, L, D, H
    n: int


CPU = Sizes("float32", (8, 512, 512, 2048), (4, 1024, 512, 8), 8)
ACCELERATOR = Sizes("bfloat16", (8, 4096, 2048, 8192), (8, 4096, 2048, 16), 8)
RIVALS = ("one-hot dispatch", "ragged_dot")
# Share of the tokens an expert works on: (K of 8 with capacity 1, causal; capacity of expert choice, to which all may come)
SHARES = {"half": (0.5, 4), "quarter": (0.25, 2)}
BARS = {
    "uome half": 0.53, "uome quarter": 0.28, "smha half": 0.39, "smha quarter": 0.17,
    "accelerator uome half": 0.70, "accelerator smha half": 0.75,
}  # fmt: skip


class RaggedUoME(UoME):
    """The same block, its products by `jax.lax.ragged_dot`: as mixtures with groups of any size."""

    def _project(self, x_NRSD: jax.Array) -> tuple[jax.Array, ...]:
        return (_ragged(x_NRSD, self.w_up[...].astype(self.dtype)),)

    def _out(self, projected: tuple[jax.Array, ...], weight_NRS: jax.Array) -> jax.Array:
        weight_NRS1 = weight_NRS[..., None].astype(self.dtype)
        hidden = jax.nn.gelu(projected[0], approximate=False) * weight_NRS1
        return _ragged(hidden, self.w_down[...].astype(self.dtype))


class WholeSquares(Attention):
    """The dense block in two plain matmuls: XLA then holds every score of a row at once."""

    def _mix(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        x_BLD: jax.Array,
        tokens: Tokens,
        region: Region,
    ) -> jax.Array:
        b, s, h, dh = q.shape
        q, k, v = (a.swapaxes(1, 2).reshape(b * h, s, dh) for a in (q, k, v))
        scores = jnp.einsum("xtk,xsk->xts", q * dh**-0.5, k, preferred_element_type=jnp.float32)
        scores = (
            jnp.where(jnp.tril(jnp.ones((s, s), bool))[None], scores, -1e30)
            if self.causal
            else scores
        )
        o = jnp.einsum("xts,xsv->xtv", jax.nn.softmax(scores).astype(v.dtype), v)
        return o.reshape(b, h, s, dh).swapaxes(1, 2)


def whole_flops(c: ModelConfig, b: int) -> float:
    """Of the dense block, forward and backward, with every score computed."""
    length, heads = c.context_length, 4 * c.n_heads * c.head_dim
    return (
        3
        * b
        * (attention_flops(c, length) + heads * (length**2 - computed_scores(length, c.causal)))
    )


def _ragged(x_NRSX: jax.Array, w_NXY: jax.Array) -> jax.Array:
    n, r, s, x = x_NRSX.shape
    y = jax.lax.ragged_dot(x_NRSX.reshape(n * r * s, x), w_NXY, jnp.full((n,), r * s, jnp.int32))
    return y.reshape(n, r, s, -1)


class Variant(NamedTuple):
    """run: () -> the loss and gradients. flops: forward and backward. bytes: temporary, as XLA counts them."""

    run: Callable[[], Any]
    flops: float
    bytes: int


def variant(
    make: Callable[..., nnx.Module],
    c: ModelConfig,
    b: int,
    flops: Callable[[ModelConfig, int], float],
) -> Variant:
    """A block's result and its gradient with respect to input and weights, compiled.

    The loss is given back as well: the gradient of a sum alone needs no last product of the forward pass, and XLA leaves it out.
    """
    length, d = c.context_length, c.d_model
    block = make(c, nnx.Rngs(0))
    graphdef, state = nnx.split(block)
    x, t = (jax.random.normal(jax.random.key(i), (b, length, d), c.dtype) for i in range(2))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (b, length))
    tokens = Tokens(None, positions, rotary_tables(positions, c.head_dim, 1e4))

    def loss(state: nnx.State, x: jax.Array) -> jax.Array:
        return (nnx.merge(graphdef, state)(x, tokens)[0].astype(jnp.float32) * t).sum()

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(state, x).compile()
    return Variant(
        lambda: compiled(state, x),
        3 * b * flops(c, length),
        compiled.memory_analysis().temp_size_in_bytes,
    )


def routings(share: float, k: int, n: int) -> dict[str, tuple[bool, RoutingConfig]]:
    """(causal, routing) of causal token choice and of expert choice."""
    causal = RoutingConfig(n_experts=n, k=k)
    choice = RoutingConfig(n_experts=n, k=n, priority="score", capacity_factor=share)
    return {"causal token choice": (True, causal), "expert choice": (False, choice)}


def mlp_variants(sizes: Sizes, share: float, k: int) -> dict[str, Variant]:
    b, length, d, f = sizes.mlp
    base = ModelConfig(
        d_model=d,
        d_hidden=f,
        context_length=length,
        n_heads=8,
        attention="dense",
        mlp="dense",
        dtype=sizes.dtype,
    )

    def made(make: Any = make_mlp, **changes: Any) -> Variant:
        return variant(make, dataclasses.replace(base, **changes), b, mlp_flops)

    def ragged(c: ModelConfig, rngs: nnx.Rngs) -> UoME:
        return RaggedUoME(
            d, f, c.uome, causal=False, dtype=c.dtype, out_scale=c.out_scale, rngs=rngs
        )

    both = routings(share, k, sizes.n)
    out = {"dense": made()} | {
        name: made(mlp="uome", causal=causal, uome=r) for name, (causal, r) in both.items()
    }
    choice = both["expert choice"][1]
    if sizes is CPU:
        out["one-hot dispatch"] = made(
            mlp="uome", causal=False, uome=dataclasses.replace(choice, dispatch="onehot")
        )
    out["ragged_dot"] = made(ragged, mlp="uome", causal=False, uome=choice)
    return out


def attention_variants(sizes: Sizes, share: float, k: int, causal: bool) -> dict[str, Variant]:
    b, length, d, h = sizes.attention
    base = ModelConfig(
        d_model=d,
        context_length=length,
        n_heads=h,
        attention="dense",
        mlp="dense",
        dtype=sizes.dtype,
        causal=causal,
    )

    def made(**changes: Any) -> Variant:
        return variant(make_attention, dataclasses.replace(base, **changes), b, attention_flops)

    name = "causal token choice" if causal else "expert choice"
    r = routings(share, k, sizes.n)[name][1]

    def whole(c: ModelConfig, rngs: nnx.Rngs) -> Attention:
        return WholeSquares(d, h, causal=causal, dtype=c.dtype, out_scale=c.out_scale, rngs=rngs)

    out = {"dense": made()}
    if sizes is not ACCELERATOR:
        out["dense, whole squares"] = variant(whole, base, b, attention_flops)._replace(
            flops=whole_flops(base, b)
        )
    out[name] = made(attention="smha", smha=r)
    out[f"{name}, project first"] = made(
        attention="smha", smha=dataclasses.replace(r, order="project")
    )
    return out


def moving(sizes: Sizes) -> dict[str, tuple[Callable[[], Any], float]]:
    """Gather and combine of half the tokens by themselves: (what runs, the bytes it reads and writes: a token counts as often
    as it is gathered)."""
    b, length, d, _ = sizes.mlp
    r = routings(0.5, 4, sizes.n)["expert choice"][1]
    logits, valid = (
        jax.random.normal(jax.random.key(0), (b, length, sizes.n)),
        jnp.ones((b, length), bool),
    )
    selection = jax.jit(lambda logits: decide(logits, valid, r)[0].pack())(logits)
    how = backend_for("auto", jnp.dtype(sizes.dtype), 1, False)
    x = jax.random.normal(jax.random.key(1), (b, length, d), sizes.dtype)
    gather, combine = (
        jax.jit(lambda a, f=f: f(a, selection, how)) for f in (gather_slots, combine_slots)
    )
    slots = jax.block_until_ready(gather(x))
    return {
        "gather": (lambda: gather(x), 2.0 * slots.nbytes),
        "combine": (lambda: combine(slots), float(slots.nbytes + x.nbytes)),
    }


def kernel_sum(sizes: Sizes, share: float, peak: float, bandwidth: float) -> float:
    """Seconds of a UoME's forward and backward where each kernel takes the longer of its operations and its bytes: gather,
    product, activation, product, combine. The backward pass takes twice the products and activations, and gathers and combines
    once more, where tokens and what was gathered of them count once."""
    b, length, d, f = sizes.mlp
    item, t, h = jnp.dtype(sizes.dtype).itemsize, b * length, f // sizes.n
    rows = sizes.n * share * t

    def kernel(flops: float, moved: float) -> float:
        return max(flops / peak, item * moved / bandwidth)

    product = kernel(2 * rows * d * h, rows * (d + h) + sizes.n * d * h)
    return 2 * 2 * kernel(0, (rows + t) * d) + 3 * (2 * product + kernel(0, 2 * rows * h))


def measured(
    case: str, variants: dict[str, Variant], rounds: int, dtype: str, bar: float
) -> list[dict[str, Any]]:
    """A row for every variant."""
    product, operations = timing.matmul(dtype)
    times = timing.interleaved(
        {"peak": product} | {name: v.run for name, v in variants.items()}, rounds
    )
    peak = operations / min(times["peak"])
    rows = []
    for name, v in variants.items():
        found = timing.against(times[name], times["dense"])
        row = {
            "case": case,
            "variant": name,
            **found,
            "flop_ratio": v.flops / variants["dense"].flops,
        }
        if "dense, whole squares" in variants:
            row["to_whole_squares"] = timing.against(times[name], times["dense, whole squares"])[
                "ratio"
            ]
        row |= {"of_peak_%": 100 * v.flops / found["seconds"] / peak, "temp_MB": v.bytes / 1e6}
        if name in ("causal token choice", "expert choice"):
            row |= {"bar": bar, "met": found["ratio"] <= bar}
        if name in RIVALS:  # of the same selection
            row["times_ours"] = timing.against(times[name], times["expert choice"])["ratio"]
            row |= {"bar": 2.0, "met": row["times_ours"] >= 2.0}
        rows.append(row)
    return rows


def main() -> None:
    options = timing.arguments(__doc__, rounds=4, shares=",".join(SHARES))
    timing.keep_memory()
    shares = {named: SHARES[named] for named in options.shares.split(",")}
    sizes = CPU if jax.default_backend() == "cpu" else ACCELERATOR
    prefix = "" if sizes is CPU else "accelerator "
    rows: list[dict[str, Any]] = []
    for named, (share, k) in shares.items():
        bar = BARS.get(f"{prefix}uome {named}", float("nan"))
        rows += measured(
            f"UoME, {named}", mlp_variants(sizes, share, k), options.rounds, sizes.dtype, bar
        )
        for causal in (True, False):
            bar = BARS.get(f"{prefix}smha {named}", float("nan"))
            case = f"SMHA, {named}{', causal' if causal else ''}"
            rows += measured(
                case, attention_variants(sizes, share, k, causal), options.rounds, sizes.dtype, bar
            )
    moved = moving(sizes)
    (copied, copied_bytes), (product, operations) = timing.copy(), timing.matmul(sizes.dtype)
    times = timing.interleaved(
        {"copy": copied, "product": product} | {name: f for name, (f, _) in moved.items()},
        options.rounds,
    )
    bandwidth, peak = copied_bytes / min(times["copy"]), operations / min(times["product"])
    rates = {"copy_GB_per_s": bandwidth / 1e9, "matmul_TFLOP_per_s": peak / 1e12}
    rates |= {
        f"{name}_GB_per_s": size / min(times[name]) / 1e9 for name, (_, size) in moved.items()
    }
    for named, (share, _) in shares.items():
        bound = kernel_sum(sizes, share, peak, bandwidth)
        row = next(
            r for r in rows if r["case"] == f"UoME, {named}" and r["variant"] == "expert choice"
        )
        rates[f"uome_{named}_of_kernel_sum_%"] = 100 * bound / row["seconds"]
    timing.finish("layer", options.out, rows, rates=rates)
    print("  " + ", ".join(f"{name} {value:.3g}" for name, value in rates.items()))


if __name__ == "__main__":
    main()

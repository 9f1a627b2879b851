"""Dense references of a few lines, written from DESIGN.md without the library: no slots, only masks and loops.

Sequences are taken one at a time: x [L,D], scores [M,N], valid [M]. Weights `w` are the plain nested dicts that
`weights_of` takes from a module. Selection is brute force in numpy, the blocks are jnp so that they can be differentiated.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.moe import routing

# --- handling modules -------------------------------------------------------------------------------------------


def build(
    make: Callable[[], nnx.Module], seed: int = 0, scale: float = 0.3
) -> tuple[nnx.GraphDef, nnx.State]:
    """The module that `make` describes, split, with random parameters, biases and scales too: none is 0 or 1."""
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    leaves, tree = jax.tree.flatten(abstract)
    rng = np.random.default_rng(seed)
    return graphdef, jax.tree.unflatten(
        tree, [jnp.asarray(scale * rng.normal(size=a.shape), a.dtype) for a in leaves]
    )


def selected(*args, **kwargs) -> tuple[routing.Selection, routing.RoutingStats]:
    """The library's decision, listed by slot, and its statistics."""
    decision, stats = routing.decide(*args, **kwargs)
    return decision.pack(), stats


def weights_of(state: nnx.State) -> dict:
    return nnx.to_pure_dict(state)


def jit(f: Callable) -> Callable:
    """jax.jit without machine-code optimisation, which takes much longer than these tiny programs run."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def flat(tree) -> list[tuple[str, np.ndarray]]:
    return [
        (jax.tree_util.keystr(path), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def error(a, b) -> float:
    """The largest max|a-b| / max|b| over the leaves of two trees; where b is 0, max|a|."""
    assert jax.tree.structure(a) == jax.tree.structure(b), (
        jax.tree.structure(a),
        jax.tree.structure(b),
    )
    worst = 0.0
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        u, v = np.asarray(u, np.float64), np.asarray(v, np.float64)
        assert u.shape == v.shape, (u.shape, v.shape)
        assert np.isfinite(u).all() and np.isfinite(v).all()
        worst = max(worst, float(np.abs(u - v).max() / (np.abs(v).max() or 1.0)))
    return worst


def norm_error(a, b) -> float:
    """|a-b| / |b| in the 2-norm over all leaves of two trees."""
    u, v = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(t)])
        for t in (a, b)
    )
    return float(np.linalg.norm(u - v) / np.linalg.norm(v))


def merge(w: dict) -> dict:
    """Expert weights [N,…] of a SMHA or UoME, without the router, as the weights of the dense block."""

    def columns(a):  # [N,D,x…] -> [D,N·x…]
        return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])

    def rows(a):  # [N,x,…] -> [N·x,…]
        return a.reshape(-1, *a.shape[2:])

    how = dict.fromkeys(("w_up", "w_gate", "w_q", "w_k", "w_v"), columns)
    how |= dict.fromkeys(("w_down", "w_o", "b_up", "b_gate", "b_q", "b_k", "b_v"), rows)
    how |= {name: lambda a: a for name in ("bias_out", "q_scale", "k_scale")}
    return {name: how[name](a) for name, a in w.items() if name in how}


# --- selection, brute force -------------------------------------------------------------------------------------


def capacity(factor: float, patches: int, k: int, n: int) -> int:
    """The smallest whole number of slots that is at least factor·patches·k/n, between 1 and `patches`."""
    wanted, slots = Fraction(str(factor)) * patches * k / n, 1
    while slots < wanted and slots < patches:
        slots += 1
    return slots


def choose(scores: np.ndarray, valid: np.ndarray, k: int) -> np.ndarray:
    """bool [M,N]: the k best of every valid patch; the lower index wins a tie."""
    chosen = np.zeros(scores.shape, bool)
    for i in np.flatnonzero(valid):
        chosen[i, sorted(range(scores.shape[1]), key=lambda e: (-scores[i, e], e))[:k]] = True
    return chosen


def keep_by_position(chosen: np.ndarray, window: int, cap: int) -> np.ndarray:
    kept = np.zeros_like(chosen)
    for e in range(chosen.shape[1]):
        taken = 0
        for i in range(chosen.shape[0]):
            if i % window == 0:
                taken = 0
            if chosen[i, e] and taken < cap:
                kept[i, e] = True
                taken += 1
    return kept


def keep_by_score(chosen: np.ndarray, scores: np.ndarray, cap: int) -> np.ndarray:
    kept = np.zeros_like(chosen)
    for e in range(chosen.shape[1]):
        asking = [i for i in range(chosen.shape[0]) if chosen[i, e]]
        kept[sorted(asking, key=lambda i: (-scores[i, e], i))[:cap], e] = True
    return kept


def select(
    logits: np.ndarray | None, valid: np.ndarray, r, sequence_logits=None
) -> tuple[np.ndarray, np.ndarray]:
    """(chosen, kept), bool [M,N], of one sequence; logits [M,N] of the patches, [N] of the sequence."""
    scores = [softmax(a) for a in (logits, sequence_logits) if a is not None]
    whole = r.unit != "patch"
    own = np.broadcast_to(scores[-1], (len(valid), r.n_experts)) if whole else scores[0]
    chosen = choose(own, valid, r.k)
    k, n = (1, 1) if whole else (r.k, r.n_experts)
    if r.priority == "position":
        cap = capacity(r.capacity_factor, r.capacity_window, k, n)
        return chosen, keep_by_position(chosen, r.capacity_window, cap)
    if not valid.any():
        return chosen, chosen
    cap = capacity(r.capacity_factor, int(valid.sum()), k, n)
    return chosen, keep_by_score(chosen, scores[0] * own if r.unit == "hierarchical" else own, cap)


def softmax(logits) -> np.ndarray:
    return np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1))


def stats(logits_BMN: np.ndarray, valid_BM: np.ndarray, r) -> dict[str, np.ndarray]:
    """What RoutingStats must hold, counted patch by patch in float64."""
    b, m, n = logits_BMN.shape
    out = dict.fromkeys(("balance", "z", "patches", "untouched", "entropy"), 0.0)
    out |= {name: np.zeros(n) for name in ("chosen_N", "kept_N")} | {
        name: np.zeros(4) for name in ("chosen_4", "kept_4")
    }
    for row in range(b):
        chosen, kept = select(logits_BMN[row], valid_BM[row], r)
        here = np.flatnonzero(valid_BM[row])
        mean_score, z = np.zeros(n), 0.0
        for i in here:
            logit = logits_BMN[row, i].astype(np.float64)
            score = np.exp(logit) / np.exp(logit).sum()
            mean_score += score / len(here)
            z += np.log(np.exp(logit).sum()) ** 2 / len(here)
            out["entropy"] -= (score * np.log(score)).sum()
            out["patches"] += 1
            out["untouched"] += not kept[i].any()
            for e in range(n):
                out["chosen_N"][e] += chosen[i, e]
                out["kept_N"][e] += kept[i, e]
                out["chosen_4"][4 * i // m] += chosen[i, e]
                out["kept_4"][4 * i // m] += kept[i, e]
        out["balance"] += n * (chosen.sum(0) / (max(len(here), 1) * r.k) * mean_score).sum()
        out["z"] += z
    return out


# --- blocks -----------------------------------------------------------------------------------------------------


def bias(w: dict, name: str):
    return w[name][None] if name in w else 0.0


def mlp(w: dict, x, activation: str):
    up = x @ w["w_up"] + bias(w, "b_up")
    if activation == "gelu":
        hidden = 0.5 * up * (1 + jax.lax.erf(up / math.sqrt(2)))
    else:
        gated = x @ w["w_gate"] + bias(w, "b_gate")
        hidden = gated / (1 + jnp.exp(-gated)) * up  # swiglu
    return hidden @ w["w_down"] + bias(w, "bias_out")


def rope(x, positions, theta: float = 1e4):
    """x [L,Dh]; dimension i is paired with i + Dh/2."""
    half = x.shape[1] // 2
    out = [None] * (2 * half)
    for i in range(half):
        angle = positions.astype(jnp.float32) * theta ** (-2 * i / x.shape[1])
        a, b = x[:, i], x[:, i + half]
        out[i], out[i + half] = (
            a * jnp.cos(angle) - b * jnp.sin(angle),
            b * jnp.cos(angle) + a * jnp.sin(angle),
        )
    return jnp.stack(out, axis=1)


def attention(w: dict, x, allowed, positions):
    """allowed: bool [L,L], which key (second) a query (first) may see; one that may see nothing sees itself."""
    heads, kv_heads, width = w["w_q"].shape[1], w["w_k"].shape[1], w["w_q"].shape[2]
    allowed = allowed | jnp.eye(x.shape[0], dtype=bool)
    y = jnp.zeros_like(x)
    for i in range(heads):
        j = i * kv_heads // heads
        q, k, v = (
            x @ w["w_" + a][:, at] + (w["b_" + a][at][None] if "b_" + a in w else 0.0)
            for a, at in zip("qkv", (i, j, j))
        )
        if "q_scale" in w:
            q, k = (
                a / jnp.sqrt((a**2).mean(1, keepdims=True) + 1e-6) * w[f"{n}_scale"][None]
                for a, n in ((q, "q"), (k, "k"))
            )
        if positions is not None:
            q, k = rope(q, positions), rope(k, positions)
        s = jax.nn.softmax(jnp.where(allowed, q @ k.T / math.sqrt(width), -jnp.inf), axis=1)
        y = y + s @ v @ w["w_o"][i]
    return y + bias(w, "bias_out")


def visible(segments, causal: bool):
    l = segments.shape[0]
    same = segments[:, None] == segments[None]
    return same & jnp.tril(jnp.ones((l, l), bool)) if causal else same


def router_logits(w: dict, x, segments, p: int, causal: bool):
    """[M,N]: from the first token of a patch if causal, else from the mean of its valid tokens."""
    patches, ok = x.reshape(-1, p, x.shape[1]), (segments > 0).astype(x.dtype).reshape(-1, p, 1)
    summary = patches[:, 0] if causal else (patches * ok).sum(1) / jnp.maximum(ok.sum(1), 1)
    return jnp.matmul(summary, w["router"]["kernel"], precision="highest") + bias(
        w["router"], "bias"
    )


def sequence_logits(w: dict, x, segments):
    """[N]: from the mean of the valid tokens of the whole row."""
    ok = (segments > 0).astype(x.dtype)[:, None]
    mean = (x * ok).sum(0) / jnp.maximum(ok.sum(), 1)
    r = w["router"]
    return jnp.matmul(mean, r["sequence_kernel"], precision="highest") + r.get("sequence_bias", 0.0)


def combine_weights(w: dict, x, segments, chosen, r, causal: bool):
    """[M,N]; with two routers the product of both gates."""
    weight = jnp.ones(chosen.shape)
    if r.unit != "sequence":
        weight = weight * gate(
            r.gate, router_logits(w, x, segments, r.patch_size, causal), chosen, r.k
        )
    if r.unit != "patch":
        weight = weight * gate(
            r.gate, jnp.broadcast_to(sequence_logits(w, x, segments), chosen.shape), chosen, r.k
        )
    return weight


def gate(name: str, logits, chosen, k: int):
    s = jax.nn.softmax(logits, axis=-1)
    if name == "sigmoid":
        return 2 / (1 + jnp.exp(-logits))
    if name == "normalized":
        return k * s / jnp.maximum(jnp.where(chosen, s, 0).sum(-1, keepdims=True), 1e-30)
    if name == "score":
        return s.shape[-1] * s
    if name == "straight_through":
        return 1 + s - jax.lax.stop_gradient(s)
    assert name == "none", name
    return jnp.ones_like(s)


def union(
    w: dict, x, segments, positions, chosen, kept, r, *, causal: bool, activation: str = "gelu"
):
    """One sequence through a UoME or SMHA, given who takes what ([M,N]); every expert works on everything, masked."""
    ok = segments > 0
    weight = combine_weights(w, x, segments, chosen, r, causal)
    takes = jnp.repeat(kept, r.patch_size, axis=0) & ok[:, None]
    weight = jnp.where(takes, jnp.repeat(weight, r.patch_size, axis=0), 0)
    y = jnp.zeros_like(x)
    for e in range(r.n_experts):
        part = {name: a[e] for name, a in w.items() if name[:2] in ("w_", "b_")}
        part |= {name: w[name] for name in ("q_scale", "k_scale") if name in w}
        if "w_up" in w:
            y_e = mlp(part, x, activation)
        else:
            y_e = attention(
                part,
                x,
                visible(segments, causal) & takes[:, e][:, None] & takes[:, e][None],
                positions,
            )
        y = y + weight[:, e][:, None] * y_e
    return y + jnp.where(ok[:, None], bias(w, "bias_out"), 0.0)

"""Makes the golden vectors of the efficient attentions of encoders; run and read like make.py, beside which it stands.

Nyströmformer and Reformer are the modules of `transformers`; Linformer, Performer and Long-Short the published equations,
head by head in float64, without the tricks that make them fast. So are Nyströmformer and Reformer where landmarks or chunks
do not divide a row (uneven/), which the modules refuse or pad. Those stored were made with torch 2.13.0 and transformers
5.24.0 on a CPU, which every file says in `made`. Rows are full: what padding does is in tests/test_baselines_encoders.py.
"""

from __future__ import annotations

import functools
from unittest import mock

import make
import numpy as np
import torch
import torch.nn.functional as F
from make import DH, EQUATIONS, HF, D, H, Weights, store, weights
from torch.func import functional_call

L = 32  # more than make.py's, for several chunks, segments and landmarks
SHAPES = dict(w_q=(D, H, DH), w_v=(D, H, DH), w_o=(H, DH, D))
WITH_KEYS = SHAPES | dict(w_k=(D, H, DH))
ENCODER = dict(n_heads=H)


def linear(w: torch.Tensor) -> torch.Tensor:
    """[D,H,Dh] as the weight of a torch Linear."""
    return w.flatten(1).T


def out(heads: torch.Tensor, w: Weights) -> torch.Tensor:
    """Heads' values [...,H·Dh] through the output projection."""
    return heads @ w["w_o"].flatten(0, 1)


def by_heads(mix):
    """A function of one head's q, k, v [L,Dh], the weights, its number, and the row [L,D] as one of x and all weights."""

    def forward(w: Weights, x: torch.Tensor) -> torch.Tensor:
        rows, names = [], ("w_q", "w_k" if "w_k" in w else "w_q", "w_v")
        for row in x:
            heads = [mix(*(row @ w[n][:, i] for n in names), w, i, row) for i in range(H)]
            rows.append(out(torch.cat(heads, dim=-1), w))
        return torch.stack(rows)

    return forward


def linformer(q, k, v, w, i, x):
    """Wang et al., equation 7: softmax(Q·(E·K)ᵀ/√d)·(F·V)."""
    return torch.softmax(q @ (w["w_keys"].T @ k).T / DH**0.5, dim=-1) @ (w["w_values"].T @ v)


def performer(q, k, v, w, i, x):
    """Choromanski et al., lemma 1 and the authors' stabilisers: the whole L x L matrix of φ(q)·φ(k), rows made to sum to 1."""

    def phi(x, is_query):
        x = x / DH**0.25
        along = x @ w["directions"].T
        most = along.max(dim=-1, keepdim=True).values if is_query else along.max()
        return torch.exp(along - x.square().sum(-1, keepdim=True) / 2 - most.detach()) + 1e-4

    matrix = phi(q, True) @ phi(k, False).T
    return matrix / matrix.sum(-1, keepdim=True) @ v


def long_short(q, k, v, w, i, x, window=4):
    """Zhu et al., section 3: one softmax over a window of 2·w keys around a segment and R projected ones, DualLN on both.

    P is made of the row itself (equation 3).
    """
    p = torch.softmax(x @ w["w_p"][:, i], dim=0)
    far_k, far_v = (
        F.layer_norm(p.T @ a, (DH,), w["far_scale"][i], w["far_bias"][i], 1e-6) for a in (k, v)
    )
    near_k, near_v = (
        F.layer_norm(a, (DH,), w["near_scale"][i], w["near_bias"][i], 1e-6) for a in (k, v)
    )
    rows = []
    for t in range(L):
        start = t // window * window
        seen = [s for s in range(start - window // 2, start + window + window // 2) if 0 <= s < L]
        keys, values = torch.cat([near_k[seen], far_k]), torch.cat([near_v[seen], far_v])
        rows.append(torch.softmax(keys @ q[t] / DH**0.5, dim=0) @ values)
    return torch.stack(rows)


def nystromformer(q, k, v, w, i, x, landmarks):
    """Xiong et al., section 3, over the landmarks that have tokens, with the iteration of equation 11."""
    cuts = [range(j * L // landmarks, (j + 1) * L // landmarks) for j in range(landmarks)]
    few_q, few_k = (torch.stack([a[list(cut)].mean(0) for cut in cuts if cut]) for a in (q, k))
    near, among, far = (
        torch.softmax(a @ b.T / DH**0.5, dim=-1)
        for a, b in ((q, few_k), (few_q, few_k), (few_q, k))
    )
    z, one = among.T / among.sum(0).max(), torch.eye(len(among)).double()
    for _ in range(6):
        az = among @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return near @ z @ far @ v


def reformer(q, k, v, w, i, x, chunk):
    """Kitaev et al., section 2, token by token; before a round's first chunk stands the last one of the round before."""
    k, rounds = k * (k.square().mean(-1, keepdim=True) + 1e-6).rsqrt() / DH**0.5, []
    for turned in torch.einsum("tk,krn->rtn", q, w["rotations"][i]).detach():
        bucket = torch.cat([turned, -turned], dim=-1).argmax(-1).tolist()
        order = sorted(range(L), key=lambda t: (bucket[t], t))
        rounds.append([order[start : start + chunk] for start in range(0, L, chunk)])
    rows = []
    for t in range(L):
        found, totals = [], []
        for r, chunks in enumerate(rounds):
            c = next(c for c, own in enumerate(chunks) if t in own)
            seen = [*(chunks[c - 1] if c else rounds[r - 1][-1]), *chunks[c]]
            scores = torch.where(torch.tensor(seen) == t, -1e5, k[seen] @ q[t])
            found.append(torch.softmax(scores, dim=0) @ v[seen])
            totals.append(torch.logsumexp(scores, dim=0))
        rows.append(torch.softmax(torch.stack(totals), dim=0) @ torch.stack(found))
    return torch.stack(rows)


def uneven() -> None:
    (make.OUT / "uneven").mkdir(exist_ok=True)
    for landmarks in (5, L + 8):  # the second: some have no token
        config = dict(
            attention="nystromformer", nystromformer=dict(landmarks=landmarks, kernel=0), **ENCODER
        )
        w, mix = (
            weights(np.random.default_rng(0), **WITH_KEYS),
            functools.partial(nystromformer, landmarks=landmarks),
        )
        store(f"uneven/nystromformer_{landmarks}", config, w, by_heads(mix), EQUATIONS)
    for chunk, n_hashes in ((5, 2), (20, 1)):
        config = dict(
            attention="reformer", reformer=dict(chunk=chunk, n_hashes=n_hashes), **ENCODER
        )
        w = weights(np.random.default_rng(0), **SHAPES, rotations=(H, DH, n_hashes, -(-L // chunk)))
        store(
            f"uneven/reformer_{chunk}_{n_hashes}",
            config,
            w,
            by_heads(functools.partial(reformer, chunk=chunk)),
            EQUATIONS,
        )


def equations() -> None:
    rng, config = (
        np.random.default_rng,
        dict(attention="linformer", linformer=dict(rank=5), **ENCODER),
    )
    store(
        "linformer",
        config,
        weights(rng(0), **WITH_KEYS, w_keys=(L, 5), w_values=(L, 5)),
        by_heads(linformer),
        EQUATIONS,
    )

    config = dict(attention="performer", performer=dict(features=6), **ENCODER)
    w = weights(rng(0), **WITH_KEYS, directions=(6, DH))
    w["directions"] *= 2.5

    def fixed(q, k, v, w, i, x):
        return performer(q, k, v, w | {"directions": w["directions"].detach()}, i, x)

    store("performer", config, w, by_heads(fixed), EQUATIONS)

    both = {f"{kind}_{what}": (H, DH) for kind in ("near", "far") for what in ("scale", "bias")}
    config = dict(attention="long_short", long_short=dict(window=4, rank=3), **ENCODER)
    store(
        "long_short",
        config,
        weights(rng(0), **WITH_KEYS, w_p=(D, H, 3), **both),
        by_heads(long_short),
        EQUATIONS,
    )


def nystromformers() -> None:
    from transformers.models.nystromformer import modeling_nystromformer as theirs

    for kernel in (5, 0):
        c = theirs.NystromformerConfig(
            hidden_size=D, num_attention_heads=H, num_landmarks=4, segment_means_seq_len=L, conv_kernel_size=kernel or 1,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        module = theirs.NystromformerSelfAttention(c).double().eval()
        module.init_option = (
            "exact"  # every matrix by itself; its configuration cannot say so (5.24)
        )
        module.conv_kernel_size = kernel or None

        def forward(w: Weights, x: torch.Tensor, module=module, kernel=kernel) -> torch.Tensor:
            named = {
                f"{name}.weight": linear(w[f"w_{name[0]}"]) for name in ("query", "key", "value")
            }
            named |= {
                f"{name}.bias": torch.zeros(D, dtype=torch.float64)
                for name in ("query", "key", "value")
            }
            named |= {"conv.weight": w["w_conv"][:, None, :, None]} if kernel else {}
            return out(functional_call(module, named, (x,))[0], w)

        config = dict(
            attention="nystromformer", nystromformer=dict(landmarks=4, kernel=kernel), **ENCODER
        )
        w = weights(
            np.random.default_rng(0), **WITH_KEYS, **(dict(w_conv=(H, kernel)) if kernel else {})
        )
        store("nystromformer" if kernel else "nystromformer_no_convolution", config, w, forward, HF)


def reformers() -> None:
    """Several chunks, with and without rounds to combine; and a row of one chunk, which it does not hash."""
    from transformers.models.reformer import modeling_reformer as theirs

    for chunk, n_hashes in ((4, 2), (4, 1), (L, 2)):
        half = -(-L // chunk)
        c = theirs.ReformerConfig(
            hidden_size=D, num_attention_heads=H, attention_head_size=DH, lsh_attn_chunk_length=chunk, num_buckets=2 * half,
            num_hashes=n_hashes, lsh_num_chunks_before=1, lsh_num_chunks_after=0, is_decoder=False, hash_seed=None,
            lsh_attention_probs_dropout_prob=0.0, attn_layers=["lsh"],
        )  # fmt: skip
        module = theirs.LSHSelfAttention(c).double().eval()

        def forward(w: Weights, x: torch.Tensor, module=module) -> torch.Tensor:
            named = {"query_key.weight": linear(w["w_q"]), "value.weight": linear(w["w_v"])}
            # The directions, which it draws at every call.
            with mock.patch.object(torch, "randn", lambda *shape, **how: w["rotations"].detach()):
                return out(functional_call(module, named, (x,)).hidden_states, w)

        config = dict(
            attention="reformer", reformer=dict(chunk=chunk, n_hashes=n_hashes), **ENCODER
        )
        w = weights(np.random.default_rng(0), **SHAPES, rotations=(H, DH, n_hashes, half))
        store(f"reformer_{chunk}_{n_hashes}", config, w, forward, HF)


def main() -> None:
    with mock.patch.object(make, "L", L):
        equations()
        nystromformers()
        reformers()
        uneven()


if __name__ == "__main__":
    main()

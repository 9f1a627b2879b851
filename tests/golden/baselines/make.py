"""Makes the golden vectors of the baselines: `python tests/golden/baselines/make.py`, with torch and transformers.

tests/test_parity.py makes them again and compares. Each file holds a small block's weights in uoe_jax's layout, an input x, a cotangent r, the output y, and the gradients of
sum(y·r), all from code that is not uoe_jax's: the modules of `transformers` where it has them, and otherwise the published
equations written out below, token by token, in float64. `config` is the block's configuration as JSON (keys of ModelConfig),
`made` says by what. The efficient attentions of encoders are in make_encoders.py.
"""

from __future__ import annotations

import json
import pathlib
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.func import functional_call

OUT = pathlib.Path(__file__).parent
B, L, D = 2, 12, 16
Weights = dict[str, torch.Tensor]


def weights(rng: np.random.Generator, **shapes: tuple[int, ...]) -> Weights:
    """Drawn weights by name; "." in a name is written "__"."""
    return {
        name.replace("__", "."): torch.tensor(0.4 * rng.normal(size=shape))
        for name, shape in shapes.items()
    }


def store(
    name: str,
    config: dict[str, Any],
    w: Weights,
    forward: Callable[[Weights, torch.Tensor], torch.Tensor],
    made: str,
) -> None:
    rng = np.random.default_rng(1)
    x = torch.tensor(rng.normal(size=(B, L, D)), requires_grad=True)
    r = torch.tensor(rng.normal(size=(B, L, D)))
    w = {k: v.clone().requires_grad_() for k, v in w.items()}
    y = forward(w, x)
    grads = torch.autograd.grad((y * r).sum(), [x, *w.values()], allow_unused=True)
    out = {"x": x, "r": r, "y": y, "d_x": grads[0]}
    out |= {f"w/{k}": v for k, v in w.items()}
    out |= {
        f"d/{k}": torch.zeros_like(v) if g is None else g for (k, v), g in zip(w.items(), grads[1:])
    }
    arrays = {k: v.detach().numpy().astype(np.float32) for k, v in out.items()}
    full = (
        dict(d_model=D, n_layers=1, vocab_size=8, context_length=L, position="none", causal=False)
        | config
    )
    np.savez_compressed(OUT / f"{name}.npz", config=json.dumps(full), made=made, **arrays)
    print(name, made, (OUT / f"{name}.npz").stat().st_size)


def hugging(
    module: torch.nn.Module, layout: Callable[[Weights], dict[str, torch.Tensor]], **how: Any
):
    """A module of transformers as a function of our weights; its output is the first it returns."""
    module = module.double().eval()

    def forward(w: Weights, x: torch.Tensor) -> torch.Tensor:
        y = functional_call(module, layout(w), (x,), how)
        return y[0] if isinstance(y, tuple) else y

    return forward


# --- mixtures of experts ----------------------------------------------------------------------------------------

N, WIDE = 4, 6
HF = f"transformers {transformers.__version__}, torch {torch.__version__}"
EQUATIONS = f"the published equations, torch {torch.__version__}"


def experts(rng, gated: bool, n_shared: int = 0) -> Weights:
    shapes = dict(router__kernel=(D, N), w_up=(N, D, WIDE), w_down=(N, WIDE, D))
    if gated:
        shapes["w_gate"] = (N, D, WIDE)
    if n_shared:
        s = n_shared * WIDE
        shapes |= dict(shared__w_up=(D, s), shared__w_gate=(D, s), shared__w_down=(s, D))
    return weights(rng, **shapes)


def gate_up(w: Weights) -> torch.Tensor:
    return torch.cat([w["w_gate"], w["w_up"]], dim=2).transpose(1, 2)


def shared(w: Weights) -> dict[str, torch.Tensor]:
    names = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down"}
    return {
        f"shared_experts.{theirs}.weight": w[f"shared.{ours}"].T for theirs, ours in names.items()
    }


def expert(w: Weights, i: int, x: torch.Tensor) -> torch.Tensor:
    return F.relu(x @ w["w_up"][i]) @ w["w_down"][i]


def by_tokens(
    w: Weights, x: torch.Tensor, choose: Callable[[torch.Tensor], dict[int, torch.Tensor]]
) -> torch.Tensor:
    """Every token by itself: `choose` gives the weight of each expert it takes, from its logits."""
    rows = [
        [sum(g * expert(w, i, t) for i, g in choose(t @ w["router.kernel"]).items()) for t in row]
        for row in x
    ]
    return torch.stack([torch.stack(row) for row in rows])


def mixtures() -> None:
    moe = dict(n_experts=N, d_expert=WIDE, capacity_factor=float(N))
    common = dict(
        hidden_size=D,
        intermediate_size=WIDE,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=8,
    )

    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    for capacity, factor in ((L, float(N)), (4, 4 * N / L)):
        c = switch.SwitchTransformersConfig(
            d_model=D, d_ff=WIDE, num_experts=N, expert_capacity=capacity, dense_act_fn="relu"
        )
        block = switch.SwitchTransformersSparseMLP(c)
        block.router.dtype = torch.float64

        def layout(w: Weights) -> dict[str, torch.Tensor]:
            found = {"router.classifier.weight": w["router.kernel"].T}
            for i in range(N):
                found |= {
                    f"experts.expert_{i}.wi.weight": w["w_up"][i].T,
                    f"experts.expert_{i}.wo.weight": w["w_down"][i].T,
                }
            return found

        name = "switch" if capacity == L else "switch_drops"
        config = dict(
            mlp="token_choice",
            activation="relu",
            moe={**moe, "k": 1, "capacity_factor": factor, "capacity_window": L},
        )
        store(name, config, experts(np.random.default_rng(0), False), hugging(block, layout), HF)

    from transformers.models.mixtral import modeling_mixtral as mixtral

    c = mixtral.MixtralConfig(num_local_experts=N, num_experts_per_tok=2, **common)

    def layout(w: Weights) -> dict[str, torch.Tensor]:
        down = w["w_down"].transpose(1, 2)
        return {
            "gate.weight": w["router.kernel"].T,
            "experts.gate_up_proj": gate_up(w),
            "experts.down_proj": down,
        }

    config = dict(mlp="token_choice", activation="swiglu", moe={**moe, "k": 2})
    store(
        "mixtral",
        config,
        experts(np.random.default_rng(0), True),
        hugging(mixtral.MixtralSparseMoeBlock(c), layout),
        HF,
    )

    deepseek = dict(
        n_routed_experts=N, num_experts_per_tok=2, moe_intermediate_size=WIDE, n_shared_experts=2, n_group=1, topk_group=1, **common
    )  # fmt: skip
    from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    c = v2.DeepseekV2Config(
        routed_scaling_factor=1.0, topk_method="greedy", norm_topk_prob=False, **deepseek
    )
    config = dict(mlp="deepseek_moe", activation="swiglu", moe={**moe, "k": 2, "n_shared": 2})
    w = experts(np.random.default_rng(0), True, 2)
    store(
        "deepseek_moe", config, w, hugging(v2.DeepseekV2Moe(c), lambda w: layout(w) | shared(w)), HF
    )

    c = v3.DeepseekV3Config(routed_scaling_factor=2.5, norm_topk_prob=True, **deepseek)
    block = v3.DeepseekV3MoE(c)
    bias = torch.tensor([0.3, -0.2, 0.1, 0.0], dtype=torch.float64)
    w["router.load_bias"] = bias
    config = dict(
        mlp="deepseek_moe",
        activation="swiglu",
        moe={**moe, "k": 2, "n_shared": 2, "score": "sigmoid", "scale": 2.5, "bias_rate": 0.001},
    )

    def how(w):
        return (
            layout(w) | shared(w) | {"gate.e_score_correction_bias": w["router.load_bias"].detach()}
        )

    store("deepseek_v3_moe", config, w, hugging(block, how), HF)

    def until(logits: torch.Tensor) -> dict[int, torch.Tensor]:
        """XMoE, section 3.2: the fewest best experts whose probabilities reach the threshold."""
        p, taken, total = torch.softmax(logits, 0), {}, 0.0
        for i in sorted(range(N), key=lambda i: -p[i].item()):
            taken[i], total = p[i], total + p[i].item()
            if total >= 0.7:
                return taken
        return taken

    def skywork(logits: torch.Tensor) -> dict[int, torch.Tensor]:
        """Skywork-MoE, section 4.1: z' = lambda (z - mean) / std before the softmax; the two best, summing to 1."""
        z = 2.0 * (logits - logits.mean()) / torch.sqrt(((logits - logits.mean()) ** 2).mean())
        p = torch.softmax(z, 0)
        best = sorted(range(N), key=lambda i: -p[i].item())[:2]
        return {i: p[i] / sum(p[j] for j in best) for i in best}

    w = experts(np.random.default_rng(0), False)
    xmoe = {**moe, "k": 2, "threshold": 0.7, "capacity_factor": float(N)}
    store(
        "xmoe",
        dict(mlp="xmoe", activation="relu", moe=xmoe),
        w,
        lambda w, x: by_tokens(w, x, until),
        EQUATIONS,
    )
    config = dict(mlp="skywork_moe", activation="relu", moe={**moe, "k": 2, "logit_scale": 2.0})
    store("skywork_moe", config, w, lambda w, x: by_tokens(w, x, skywork), EQUATIONS)

    def expert_choice(w: Weights, x: torch.Tensor) -> torch.Tensor:
        """Zhou et al., section 3.2: S = softmax(X·W_g) over experts; each expert takes its k = L·c/N best tokens (c = 2)."""
        rows = []
        for row in x:
            s, out = torch.softmax(row @ w["router.kernel"], 1), torch.zeros_like(row)
            for i in range(N):
                for t in sorted(range(L), key=lambda t: -s[t, i].item())[: L * 2 // N]:
                    out = (
                        out
                        + F.one_hot(torch.tensor(t), L)[:, None]
                        * (s[t, i] * expert(w, i, row[t]))[None]
                    )
            rows.append(out)
        return torch.stack(rows)

    config = dict(
        mlp="expert_choice", activation="relu", moe={**moe, "k": 2, "capacity_factor": 1.0}
    )
    store("expert_choice", config, w, expert_choice, EQUATIONS)


# --- attentions -------------------------------------------------------------------------------------------------

H, DH = 4, D // 4


def rotation(width: int, theta: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(L, dtype=torch.float64)[:, None] * theta ** (
        -torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    return torch.cos(angle), torch.sin(angle)


def rotated(x: torch.Tensor, places: Any = slice(None)) -> torch.Tensor:
    """Rows of x [T,width] turned by their positions, first half of the width paired with the second."""
    cos, sin = (t[places] for t in rotation(x.shape[-1]))
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attended(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = q @ k.T / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def attentions() -> None:
    rng = np.random.default_rng
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    for rank in (10, 0):
        c = v3.DeepseekV3Config(
            hidden_size=D, num_attention_heads=H, num_key_value_heads=H, q_lora_rank=rank or None, kv_lora_rank=8, qk_rope_head_dim=2,
            qk_nope_head_dim=DH, v_head_dim=DH, rope_interleave=False, num_hidden_layers=1, rms_norm_eps=1e-6, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        c._attn_implementation = "eager"
        block = v3.DeepseekV3Attention(c, 0)
        narrow = dict(w_down=(D, rank), q_scale=(rank,)) if rank else {}
        w = weights(
            rng(0),
            w_latent=(D, 10),
            latent_scale=(8,),
            w_k=(8, H, DH),
            w_v=(8, H, DH),
            w_q=(rank or D, H, DH + 2),
            w_o=(H, DH, D),
            **narrow,
        )

        def layout(w: Weights) -> dict[str, torch.Tensor]:
            into = w["w_q"].flatten(1).T
            queries = (
                {
                    "q_a_proj.weight": w["w_down"].T,
                    "q_a_layernorm.weight": w["q_scale"],
                    "q_b_proj.weight": into,
                }
                if rank
                else {"q_proj.weight": into}
            )
            both = torch.cat([w["w_k"], w["w_v"]], dim=2).flatten(1).T
            return {
                "kv_a_proj_with_mqa.weight": w["w_latent"].T, "kv_a_layernorm.weight": w["latent_scale"], "kv_b_proj.weight": both,
                "o_proj.weight": w["w_o"].flatten(0, 1).T, **queries,
            }  # fmt: skip

        cos, sin = (torch.cat([t, t], dim=-1)[None] for t in rotation(2))
        mask = torch.zeros(1, 1, L, L, dtype=torch.float64).masked_fill(
            torch.ones(L, L).triu(1).bool(), -torch.inf
        )
        forward = hugging(block, layout, position_embeddings=(cos, sin), attention_mask=mask)
        config = dict(attention="mla", n_heads=H, mla=dict(q_rank=rank, kv_rank=8, d_rope=2))
        store(
            "mla" if rank else "mla_whole_queries",
            {**config, "position": "rope", "causal": True},
            w,
            forward,
            HF,
        )

    shapes = dict(
        w_q=(H, D, 1, DH),
        w_k=(H, D, 1, DH),
        w_v=(H, D, 1, DH),
        w_o=(H, 1, DH, D),
        router__kernel=(D, H),
    )

    def mosa(w: Weights, x: torch.Tensor) -> torch.Tensor:
        """MoSA, equations 1 to 5, without a mask: the best L/2 tokens of every head by a sigmoid score, which scales the output."""
        rows = []
        for row in x:
            scores, out = torch.sigmoid(row @ w["router.kernel"]), torch.zeros_like(row)
            for i in range(H):
                places = sorted(sorted(range(L), key=lambda t: -scores[t, i].item())[: L // 2])
                chosen = row[places]
                q, k, v = (chosen @ w[name][i, :, 0] for name in ("w_q", "w_k", "w_v"))
                o = attended(rotated(q, places), rotated(k, places), v, causal=False)
                out = out + F.one_hot(torch.tensor(places), L).double().T @ (
                    scores[places, i, None] * o @ w["w_o"][i, 0]
                )
            rows.append(out)
        return torch.stack(rows)

    config = dict(attention="mosa", n_heads=H, mosa=dict(capacity_factor=0.5), position="rope")
    store("mosa", config, weights(rng(0), **shapes), mosa, EQUATIONS)

    shapes = dict(w_q=(D, H, DH), w_k=(D, H, DH), w_v=(D, H, DH), w_o=(H, DH, D))

    def moh(w: Weights, x: torch.Tensor, n_shared: int) -> torch.Tensor:
        """MoH, equations 5 to 8, scaled as the authors' code does: S shared heads, and of the others the two best."""
        rows = []
        for row in x:
            heads = []
            for i in range(H):
                q, k, v = (row @ w[name][:, i] for name in ("w_q", "w_k", "w_v"))
                heads.append(attended(rotated(q), rotated(k), v, causal=True) @ w["w_o"][i])
            p = torch.softmax(row @ w["w_routed"], dim=-1)
            out = []
            for t in range(L):
                best = sorted(range(H - n_shared), key=lambda i: -p[t, i].item())[:2]
                kinds = 2 * torch.softmax(row[t] @ w["w_kinds"], 0) if n_shared else torch.ones(2)
                among = (
                    n_shared * torch.softmax(row[t] @ w["w_shared"], 0)
                    if n_shared > 1
                    else torch.ones(n_shared)
                )
                y = sum(
                    (kinds[0] * among[i] * heads[i][t] for i in range(n_shared)),
                    torch.zeros(D, dtype=torch.float64),
                )
                norm = sum(p[t, i] for i in best)
                out.append(
                    y + sum(kinds[1] * 2 * p[t, i] / norm * heads[n_shared + i][t] for i in best)
                )
            rows.append(torch.stack(out))
        return torch.stack(rows)

    for s in (0, 1, 2):
        own = (
            dict(w_routed=(D, H - s))
            | (dict(w_kinds=(D, 2)) if s else {})
            | (dict(w_shared=(D, s)) if s > 1 else {})
        )
        # With two of two routed heads all are chosen; with more, some are not.
        config = dict(
            attention="moh", n_heads=H, moh=dict(n_shared=s, k=2), position="rope", causal=True
        )
        store(
            f"moh_{s}",
            config,
            weights(rng(0), **shapes, **own),
            lambda w, x, s=s: moh(w, x, s),
            EQUATIONS,
        )


def main() -> None:
    mixtures()
    attentions()


if __name__ == "__main__":
    main()

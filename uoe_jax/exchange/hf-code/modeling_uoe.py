"""Causal language models of unions of experts (UoE) in PyTorch.

This file is self-contained and lies beside the weights: transformers loads both from one directory
with `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`. Its logits are those
of the JAX model that uoe_jax trained. It is written to be read: every expert computes every token,
and tokens that it did not select are masked. No KV cache, no dropout, no balance loss.

Letters: B sequences, L tokens, M patches of P tokens, D model width, N experts (a patch chooses K),
H heads, G key/value heads, Dh head width, F hidden width of the MLP, T layers, V vocabulary.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

Model = dict[str, Any]  # the keys of uoe_jax's config.model
Weights = dict[str, Any]  # nested by name; tensors of one layer
Rotary = tuple[Tensor, Tensor]  # cos and sin, float32 [L,Dh/2]

GATED = {"swiglu": F.silu, "geglu": F.gelu}
PLAIN = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}

# Sizes under transformers' names, and ours.
STANDARD = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_hidden",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "max_position_embeddings": "context_length",
    "tie_word_embeddings": "tie_embeddings",
}

SUPPORTED = {
    "task": ("language",),
    "causal": (True,),
    "attention": ("smha", "dense"),
    "mlp": ("uome", "dense"),
    "activation": (*GATED, *PLAIN),
    "norm": ("rmsnorm", "layernorm"),
    "position": ("rope", "learned", "none"),
    "cutoffs": ("",),
}
SUPPORTED_ROUTING = {
    "unit": ("patch",),
    "priority": ("position",),
    "gate": ("sigmoid", "normalized", "score", "straight_through", "none"),
}


class UoEConfig(PretrainedConfig):
    """`model`: the dict of uoe_jax's config.model, from which the standard names follow."""

    model_type = "uoe"

    def __init__(self, model: Model | None = None, **kwargs: Any) -> None:
        self.model = model or {}
        if model:
            kwargs |= {name: model[key] for name, key in STANDARD.items()}
        super().__init__(**kwargs)


def routed_blocks(m: Model) -> list[str]:
    """Those of "smha" and "uome" that the model has."""
    return [name for name in ("smha", "uome") if name in (m.get("attention"), m.get("mlp"))]


def check(m: Model) -> None:
    """Raises ValueError where the configuration asks for what this file does not have."""
    asked: list[tuple[str, Any, Any]]
    asked = [(f"model.{key}", m.get(key), allowed) for key, allowed in SUPPORTED.items()]
    for block in routed_blocks(m):
        for key, allowed in SUPPORTED_ROUTING.items():
            asked.append((f"model.{block}.{key}", m[block].get(key), allowed))
    for key, value, allowed in asked:
        if value not in allowed:
            known = ", ".join(map(repr, allowed))
            raise ValueError(f"config.{key}={value!r}: this model has {known} only")
    if not m["vocab_size"]:
        raise ValueError("config.model.vocab_size=0: give the rows of the embedding")


def shapes(m: Model) -> dict[str, Any]:
    """Shapes of all weights, nested by name; those of `layers` are of one of T stacked layers."""
    d, scales = m["d_model"], _norm_shapes(m)
    layer = {"attention_norm": scales, "attention": _attention_shapes(m)}
    layer |= {"mlp_norm": scales, "mlp": _mlp_shapes(m)}
    tree = {"embedding": (m["vocab_size"], d), "layers": layer, "norm": scales}
    if m["position"] == "learned":
        tree["positions"] = (m["context_length"], d)
    if not m["tie_embeddings"]:
        tree["head"] = (d, m["vocab_size"])
    return tree


def _norm_shapes(m: Model) -> Weights:
    names = ("scale", "bias") if m["norm"] == "layernorm" else ("scale",)
    return dict.fromkeys(names, (m["d_model"],))


def _attention_shapes(m: Model) -> Weights:
    h, g, dh = head_sizes(m)
    d, (lead, n) = m["d_model"], _experts(m, "smha")
    queries, keys = (h // n, dh), (g // n, dh)
    tree = {"w_q": (*lead, d, *queries), "w_k": (*lead, d, *keys), "w_v": (*lead, d, *keys)}
    tree["w_o"] = (*lead, *queries, d)
    if m["bias"] or m["qkv_bias"]:
        tree |= {"b_q": (*lead, *queries), "b_k": (*lead, *keys), "b_v": (*lead, *keys)}
    if m["bias"]:
        tree |= {"bias_out": (d,)}
    if m["qk_norm"]:
        tree |= {"q_scale": (dh,), "k_scale": (dh,)}
    return tree | _router_shapes(m, "smha")


def _mlp_shapes(m: Model) -> Weights:
    d, (lead, n) = m["d_model"], _experts(m, "uome")
    f = m["d_hidden"] // n
    into = ("up", "gate") if m["activation"] in GATED else ("up",)
    tree = {f"w_{name}": (*lead, d, f) for name in into} | {"w_down": (*lead, f, d)}
    if m["bias"]:
        tree |= {f"b_{name}": (*lead, f) for name in into} | {"bias_out": (d,)}
    return tree | _router_shapes(m, "uome")


def _router_shapes(m: Model, block: str) -> Weights:
    lead, n = _experts(m, block)
    if not lead:
        return {}
    kept = {"bias": m[block]["router_bias"], "load_bias": m[block]["bias_rate"]}
    vectors = {name: (n,) for name, there in kept.items() if there}
    return {"router": {"kernel": (m["d_model"], n), **vectors}}


def _experts(m: Model, block: str) -> tuple[tuple[int, ...], int]:
    """The leading axis of a block's weights, () in a dense block, and its number of experts."""
    n = m[block]["n_experts"]
    return ((n,), n) if block in routed_blocks(m) else ((), 1)


def head_sizes(m: Model) -> tuple[int, int, int]:
    """H, G and Dh."""
    return m["n_heads"], m["n_kv_heads"] or m["n_heads"], m["d_model"] // m["n_heads"]


class Tree(nn.Module):
    """Weights with the names and shapes of a nested dict, `lead` before every shape."""

    def __init__(self, tree: Weights, lead: tuple[int, ...] = ()) -> None:
        super().__init__()
        for name, shape in tree.items():
            if isinstance(shape, dict):
                self.add_module(name, Tree(shape, lead))
            elif name == "load_bias":  # no gradient reaches it
                self.register_buffer(name, torch.empty(*lead, *shape))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(*lead, *shape)))

    def weights(self, layer: int | None = None) -> Weights:
        """The tensors, nested by name; of stacked ones, those of one layer."""
        own = {**self._parameters, **self._buffers}
        out = {name: tensor if layer is None else tensor[layer] for name, tensor in own.items()}
        return out | {name: child.weights(layer) for name, child in self.named_children()}


def norm(w: Weights, x: Tensor, eps: float) -> Tensor:
    """LayerNorm where there is a bias, else RMSNorm, over the last axis, in float32."""
    y = x.float()
    if "bias" in w:
        y = y - y.mean(-1, keepdim=True)
    y = rms_norm(y, w["scale"], eps)
    return (y + w["bias"].float() if "bias" in w else y).to(x.dtype)


def rms_norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    """float32 x / rms(x) * scale over the last axis."""
    y = x.float()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * scale.float()


def rotary_tables(length: int, dh: int, m: Model, device: torch.device) -> Rotary:
    """cos and sin of a row's rotary angles, float32 [L,Dh/2], scaled as in Llama 3.1 if asked."""
    exponent = -torch.arange(0, dh, 2, dtype=torch.float32, device=device) / dh
    frequency = m["rope_theta"] ** exponent
    if m["rope_scaling"]:
        factor, low, high, trained = (float(part) for part in m["rope_scaling"].split(","))
        kept = ((trained * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rotary: Rotary | None) -> Tensor:
    """Applies rotary tables to x [...,L,Dh]; the first half is paired with the second."""
    if rotary is None:
        return x
    cos, sin = rotary
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def capacity(r: dict[str, Any]) -> int:
    """Slots of an expert in a capacity window: ceil(cf·window·K/N), exact, from 1 to the window."""
    share = Fraction(str(r["capacity_factor"])) * r["capacity_window"] * r["k"] / r["n_experts"]
    return max(1, min(r["capacity_window"], math.ceil(share)))


def route(w: Weights, x_BLD: Tensor, r: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Which experts take each token, bool [B,L,N], and its combine weights there, float32 [B,L,N].

    The first token of a patch decides for all of it. An expert takes the first patches that choose
    it in every capacity window.
    """
    p, k = r["patch_size"], r["k"]
    with torch.autocast(x_BLD.device.type, enabled=False):  # always float32
        logits_BMN = x_BLD[:, ::p].float() @ w["kernel"].float()
    if "bias" in w:
        logits_BMN = logits_BMN + w["bias"].float()
    scores_BMN = logits_BMN.softmax(dim=-1)
    ranked_BMN = scores_BMN + w["load_bias"].float() if "load_bias" in w else scores_BMN
    # Not topk, which promises nothing about ties: the lower index wins.
    best_BMK = ranked_BMN.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen_BMN = torch.zeros_like(scores_BMN, dtype=torch.bool).scatter(-1, best_BMK, True)
    windows = chosen_BMN.split(r["capacity_window"], dim=1)
    rank_BMN = torch.cat([window.cumsum(dim=1) for window in windows], dim=1)
    kept_BMN = chosen_BMN & (rank_BMN <= capacity(r))
    weights_BMN = torch.where(kept_BMN, gate(r, logits_BMN, scores_BMN, chosen_BMN), 0)
    kept_BLN, weights_BLN = (
        a.repeat_interleave(p, dim=1)[:, : x_BLD.shape[1]] for a in (kept_BMN, weights_BMN)
    )
    return kept_BLN, weights_BLN


def gate(r: dict[str, Any], logits: Tensor, scores: Tensor, chosen: Tensor) -> Tensor:
    """Combine weights [B,M,N]; 1 where all logits are 0."""
    if r["gate"] == "sigmoid":
        return 2 * logits.sigmoid()
    if r["gate"] == "normalized":
        of_chosen = torch.where(chosen, scores, 0)
        total = of_chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return r["k"] * of_chosen / total
    if r["gate"] == "score":
        return r["n_experts"] * scores
    if r["gate"] == "straight_through":
        return 1 + (scores - scores.detach())
    return torch.ones_like(scores)  # "none"


def merged(w: Tensor, dense_axes: int) -> Tensor:
    """Projections into experts [N,D,…] as the dense block's [D,N·…]; a dense one as it is."""
    return w if w.dim() == dense_axes else w.transpose(0, 1).flatten(1, 2)


def attention(w: Weights, x_BLD: Tensor, m: Model, rotary: Rotary | None) -> Tensor:
    """Dense attention or SMHA: a token is query and key in heads of experts that took it."""
    h, g, dh = head_sizes(m)

    def project(name: str) -> Tensor:
        y_BHLk = torch.einsum("bld,dhk->bhlk", x_BLD, merged(w[f"w_{name}"], 3))
        y_BHLk = y_BHLk + w[f"b_{name}"].reshape(-1, 1, dh) if f"b_{name}" in w else y_BHLk
        if f"{name}_scale" in w:
            y_BHLk = rms_norm(y_BHLk, w[f"{name}_scale"], m["norm_eps"]).to(y_BHLk.dtype)
        return y_BHLk if name == "v" else rotate(y_BHLk, rotary)

    q, k, v = (project(name) for name in "qkv")
    k, v = (a.repeat_interleave(h // g, dim=1) for a in (k, v))
    itself = torch.eye(x_BLD.shape[1], dtype=torch.bool, device=x_BLD.device)
    allowed = torch.ones_like(itself).tril()
    if "router" in w:
        of_experts = route(w["router"], x_BLD, m["smha"])
        kept_BHL, weights_BHL = (
            a.transpose(1, 2).repeat_interleave(h // a.shape[2], dim=1) for a in of_experts
        )
        # A token that was not taken attends to itself, as its softmax needs a key; its weight is 0.
        allowed = allowed & (kept_BHL[:, :, None] | itself)
    o_BHLk = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    if "router" in w:
        o_BHLk = o_BHLk * weights_BHL[..., None].to(o_BHLk.dtype)
    y_BLD = torch.einsum("bhlk,hkd->bld", o_BHLk, w["w_o"].reshape(h, dh, -1))
    return y_BLD + w["bias_out"] if "bias_out" in w else y_BLD


def mlp(w: Weights, x_BLD: Tensor, m: Model) -> Tensor:
    """Dense MLP or UoME: an expert's hidden units are 0 for tokens it did not take."""

    def project(name: str) -> Tensor:
        y_BLF = x_BLD @ merged(w[f"w_{name}"], 2)
        return y_BLF + w[f"b_{name}"].flatten() if f"b_{name}" in w else y_BLF

    name = m["activation"]
    if name in GATED:
        hidden_BLF = GATED[name](project("gate")) * project("up")
    else:
        hidden_BLF = PLAIN[name](project("up"))
    if "router" in w:
        _, weights_BLN = route(w["router"], x_BLD, m["uome"])
        width = hidden_BLF.shape[-1] // weights_BLN.shape[-1]
        per_unit = weights_BLN.repeat_interleave(width, dim=-1)
        hidden_BLF = hidden_BLF * per_unit.to(hidden_BLF.dtype)
    y_BLD = hidden_BLF @ w["w_down"].reshape(hidden_BLF.shape[-1], -1)
    return y_BLD + w["bias_out"] if "bias_out" in w else y_BLD


class UoEForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder language model of unions of experts, or of one union beside a dense block.

    Raises:
      ValueError: the configuration asks for what this file does not have.
    """

    config_class = UoEConfig
    _supports_sdpa = True

    def __init__(self, config: UoEConfig) -> None:
        super().__init__(config)
        m = config.model
        check(m)
        # float32 in a model of any dtype; transformers 4 refuses names of missing modules.
        norms = ["norm", "attention_norm", "mlp_norm"]
        self._keep_in_fp32_modules_strict = norms + ["router"] * bool(routed_blocks(m))
        for name, shape in shapes(m).items():
            if isinstance(shape, dict):
                self.add_module(name, Tree(shape, (m["n_layers"],) if name == "layers" else ()))
            else:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for name, tensor in {**module._parameters, **module._buffers}.items():
            if name.endswith("scale"):
                nn.init.ones_(tensor)
            elif name.startswith("b_") or "bias" in name:
                nn.init.zeros_(tensor)
            else:
                nn.init.normal_(tensor, std=self.config.hidden_size**-0.5)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple[Tensor, ...]:
        """Logits of the next token.

        Args:
          input_ids: [B,L], L at most the context length.
          attention_mask: [B,L], 0 for padding, which is on the right and changes nothing before.
          labels: [B,L], the tokens, -100 where not counted; the loss is of the next one, in nats.

        Returns:
          CausalLMOutput with logits float32 [B,L,V], and the mean loss if there are labels.

        Raises:
          ValueError: padding on the left or in between, or more tokens than the context.
        """
        m, length = self.config.model, input_ids.shape[1]
        if length > m["context_length"]:
            context = f"the context holds {m['context_length']}"
            raise ValueError(f"input_ids has {length} tokens a row: {context}; give no more")
        if attention_mask is not None and (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
            remedy = "pad on the right, or give prompts of one length"
            raise ValueError(f"attention_mask has padding in front of tokens: {remedy}")
        x_BLD = F.embedding(input_ids, self.embedding)
        if m["position"] == "learned":
            x_BLD = x_BLD + self.positions[:length]
        rope = m["position"] == "rope"
        rotary = rotary_tables(length, head_sizes(m)[2], m, x_BLD.device) if rope else None
        for i in range(m["n_layers"]):
            w = self.layers.weights(i)
            h_BLD = norm(w["attention_norm"], x_BLD, m["norm_eps"])
            x_BLD = x_BLD + attention(w["attention"], h_BLD, m, rotary)
            x_BLD = x_BLD + mlp(w["mlp"], norm(w["mlp_norm"], x_BLD, m["norm_eps"]), m)
        x_BLD = norm(self.norm.weights(), x_BLD, m["norm_eps"])
        logits_BLV = (x_BLD @ (self.embedding.T if m["tie_embeddings"] else self.head)).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BLV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        output = CausalLMOutput(loss=loss, logits=logits_BLV)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> dict[str, Tensor | None]:
        """The whole text at every step: there is no KV cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

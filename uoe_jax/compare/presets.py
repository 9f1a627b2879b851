"""Architectures of the paper's tables by name: the keys of blocks that make a model one of them.

Numbers of experts follow the released code on Long Range Arena where it has them (DeepSeek-MoE: 3
of 7 and one shared; Skywork-MoE: 2 of 4; XMoE: many small ones); the others are small ones chosen
here. No jax is imported.
"""

import copy
import math
from typing import Any, Mapping

from uoe_jax.config.baselines import MLPS, SECTIONS, UNIONS
from uoe_jax.config.load import put
from uoe_jax.config.routing import GATES
from uoe_jax.errors import ConfigError

Changes = dict[str, Any]  # values by dotted key below `model`

DROPLESS = ("deepseek_moe", "xmoe")  # experts have a slot for every token, as DeepSeek's do
CAPACITIES = (0.75, 1.0, 1.25, 1.5, 2.0)


def _blocks(attention: str, mlp: str, **moe: Any) -> Changes:
    return {"attention": attention, "mlp": mlp, **{f"moe.{key}": v for key, v in moe.items()}}


def _unions(**changes: Any) -> Changes:
    return {f"{section}.{key}": value for section in UNIONS for key, value in changes.items()}


_V3 = dict(score="sigmoid", bias_rate=0.001, balance_weight=0.0001)
_ATTENTIONS = ("mosa", "moh", "mla", "linformer", "nystromformer", "performer", "reformer")
PRESETS: dict[str, Changes] = {
    "full_attention": _blocks("dense", "dense"),
    "switch": _blocks("dense", "token_choice", n_experts=4, k=1),
    "gshard": _blocks("dense", "token_choice", n_experts=8, k=2),
    "expert_choice": _blocks("dense", "expert_choice", n_experts=8, k=2, capacity_factor=1.0),
    "deepseek_moe": _blocks("dense", "deepseek_moe", n_experts=7, k=3, n_shared=1),
    "deepseek_v3": _blocks("mla", "deepseek_moe", n_experts=7, k=3, n_shared=1, **_V3),
    "skywork_moe": _blocks("dense", "skywork_moe", n_experts=4, k=2, adaptive_rate=0.2),
    "xmoe": _blocks("dense", "xmoe", n_experts=16, k=10, threshold=0.9),
    **{name: _blocks(name, "dense") for name in (*_ATTENTIONS, "long_short")},
    "uoe": _blocks("smha", "uome"),
    "smha_only": _blocks("smha", "dense"),
    "uome_only": _blocks("dense", "uome"),
    "hierarchical": _unions(unit="hierarchical", priority="score"),
    "by_sequence": _unions(unit="sequence"),
    "by_patch": _unions(unit="patch"),
    **{f"gate_{gate}": _unions(gate=gate) for gate in GATES},
    **{f"capacity_{factor}": _unions(capacity_factor=factor) for factor in CAPACITIES},
    "no_balance": _unions(balance_weight=0.0, bias_rate=0.0),
    "switch_balance": _unions(balance_weight=0.01, bias_rate=0.0),
    "bias_balance": _unions(balance_weight=0.0, bias_rate=0.003),
}


def apply(name: str, model: Mapping[str, Any], changes: Changes | None = None) -> dict[str, Any]:
    """The `model` section, as nested dicts, with a preset's blocks and a row's own changes.

    Sections of other blocks are dropped. Raises ConfigError where the hidden width is too small for
    its experts, or where a change, or all that the preset changes, is of other blocks.
    """
    preset, changes, out = PRESETS[name], changes or {}, copy.deepcopy(dict(model))
    for key, value in (preset | changes).items():
        put(out, key, value)
    own = {SECTIONS.get(out["attention"]), SECTIONS.get(out["mlp"])}
    blocks = f"{out['attention']} + {out['mlp']}"
    for key, value in changes.items():
        if "." in key and key.partition(".")[0] not in own:
            remedy = f"the row {name!r} is {blocks}, which read nothing of it; leave it out"
            raise ConfigError(f"config.rows: model.{key}", value, remedy)
    if "mlp" not in preset and own.isdisjoint(key.partition(".")[0] for key in preset):
        remedy = f"changes unions of experts, and its blocks are {blocks}; leave it out"
        raise ConfigError("config.rows", name, remedy)
    for section in set(SECTIONS.values()) - {*UNIONS, *own}:
        del out[section]  # the base's, of another row's blocks
    for key, value in _derived(name, out, changes).items():
        if key not in changes:
            put(out, key, value)
    return out


def _derived(name: str, model: Mapping[str, Any], changes: Changes) -> Changes:
    """Keys that follow from the model's sizes, unless the row sets them.

    A mixture's experts together are as wide as the dense MLP, with the capacity windows of the
    base's UoME. MLA's latents are D/2 wide, as in the released code. MoH shares a quarter of the
    heads, and a token chooses half of the others, at least two.
    """
    out: Changes = {}
    heads, hidden, parts = model["n_heads"], model["d_hidden"], hidden_parts(model)
    where = f"(in the row {name!r})"
    if model["mlp"] in MLPS:
        moe = model["moe"]
        if hidden < parts:
            remedy = f"{where} it is cut in {parts} experts; give at least that"
            raise ConfigError("config.model.d_hidden", hidden, remedy)
        out["moe.d_expert"] = hidden // parts
        if model["mlp"] in DROPLESS:
            out["moe.capacity_factor"] = math.ceil(100 * moe["n_experts"] / moe["k"]) / 100
        if model["mlp"] != "expert_choice":
            window = model["uome"]["capacity_window"]
            out["moe.capacity_window"] = min(window, model["context_length"])
    if model["attention"] == "mla":
        out |= dict.fromkeys(("mla.q_rank", "mla.kv_rank"), model["d_model"] // 2)
    if model["attention"] == "moh":
        shared = changes.get("moh.n_shared", heads // 4)
        if shared >= heads:
            remedy = f"{where} tokens choose among the other heads; give less than {heads}"
            raise ConfigError("config.rows: model.moh.n_shared", shared, remedy)
        out |= {"moh.n_shared": shared, "moh.k": min(heads - shared, max(2, (heads - shared) // 2))}
    return out


def hidden_parts(model: Mapping[str, Any]) -> int:
    """Equal parts of the MLP's hidden width: routed and shared experts; 1 in a dense MLP."""
    if model["mlp"] == "uome":
        return model["uome"]["n_experts"]
    return 1 if model["mlp"] == "dense" else model["moe"]["n_experts"] + model["moe"]["n_shared"]

"""The rows of the paper's tables by name: what a configuration must say so that its model is one of the compared architectures.

A preset starts from a configuration of a union of experts and changes blocks and their sections, nothing else. Matched by
width, the experts of a mixture together are as wide as the dense MLP: they have its weights. How many experts there are
follows the released code's peers on Long Range Arena (DeepSeek-MoE with 7 routed experts of which 3 are chosen and one shared
one, Skywork-MoE with the better 2 of 4, XMoE with small ones); the numbers of the others are small ones
chosen here. No jax is imported.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any, Mapping

from uoe_jax.config.baselines import MLPS, SECTIONS, UNIONS
from uoe_jax.config.load import put
from uoe_jax.errors import ConfigError

Changes = dict[str, Any]  # values by dotted key below `model`

DROPLESS = (
    "deepseek_moe",
    "xmoe",
)  # mixtures whose experts have slots for every token: the former's authors drop nothing
GATES = ("sigmoid", "normalized", "score", "straight_through", "none")
CAPACITIES = (0.75, 1.0, 1.25, 1.5, 2.0)


def _mixture(
    kind: str, attention: str = "dense", *, n: int, k: int, shared: int = 0, **more: Any
) -> Changes:
    """N routed and `shared` experts, which together are as wide as the dense MLP (`hidden_parts`)."""
    moe = {"n_experts": n, "k": k, **({"n_shared": shared} if shared else {}), **more}
    return {
        "attention": attention,
        "mlp": kind,
        **{f"moe.{key}": value for key, value in moe.items()},
    }


def _unions(**changes: Any) -> Changes:
    return {f"{section}.{key}": value for section in UNIONS for key, value in changes.items()}


PRESETS: dict[str, Changes] = {
    "full_attention": {"attention": "dense", "mlp": "dense"},
    "switch": _mixture("token_choice", n=4, k=1),
    "gshard": _mixture("token_choice", n=8, k=2),
    "expert_choice": _mixture("expert_choice", n=8, k=2, capacity_factor=1.0),
    "deepseek_moe": _mixture("deepseek_moe", n=7, k=3, shared=1),
    "deepseek_v3": _mixture(
        "deepseek_moe",
        "mla",
        n=7,
        k=3,
        shared=1,
        score="sigmoid",
        bias_rate=0.001,
        balance_weight=0.0001,
    ),
    "skywork_moe": _mixture("skywork_moe", n=4, k=2, adaptive_rate=0.2),
    "xmoe": _mixture("xmoe", n=16, k=10, threshold=0.9),
    "mosa": {"attention": "mosa", "mlp": "dense"},
    "moh": {"attention": "moh", "mlp": "dense"},
    "mla": {"attention": "mla", "mlp": "dense"},
    "linformer": {"attention": "linformer", "mlp": "dense"},
    "nystromformer": {"attention": "nystromformer", "mlp": "dense"},
    "performer": {"attention": "performer", "mlp": "dense"},
    "reformer": {"attention": "reformer", "mlp": "dense"},
    "long_short": {"attention": "long_short", "mlp": "dense"},
    "uoe": {"attention": "smha", "mlp": "uome"},
    "smha_only": {"attention": "smha", "mlp": "dense"},
    "uome_only": {"attention": "dense", "mlp": "uome"},
    "hierarchical": _unions(unit="hierarchical", priority="score"),
    "by_sequence": _unions(unit="sequence"),
    "by_patch": _unions(unit="patch"),
    **{f"gate_{gate}": _unions(gate=gate) for gate in GATES},
    **{f"capacity_{factor}": _unions(capacity_factor=factor) for factor in CAPACITIES},
    "no_balance": _unions(balance_weight=0.0, bias_rate=0.0),
    "switch_balance": _unions(balance_weight=0.01, bias_rate=0.0),
    "bias_balance": _unions(balance_weight=0.0, bias_rate=0.003),
}


def apply(
    name: str, model: Mapping[str, Any], changes: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """The `model` section of a configuration, as nested dicts, with the blocks of a preset and changes beyond it.

    Sizes that follow the model's own are filled in: experts are `d_hidden` / parts wide and count their capacity in the
    windows of the base's UoME; those of mixtures that drop nothing have slots for every token; MLA's latents are D/2 wide (as
    in the released code); MoH shares a quarter of the heads and lets a token choose half of the others, at least two. Sections of
    blocks that the row does not have are dropped.

    Raises:
      KeyError: no such preset. ConfigError: the hidden width is too small for its experts; a change, or all that the preset
        changes, is of blocks that the row does not have.
    """
    out: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in model.items()
    }
    for key, value in (PRESETS[name] | dict(changes)).items():
        put(out, key, value)
    own = {SECTIONS.get(out["attention"]), SECTIONS.get(out["mlp"])}
    _refuse_without_effect(name, changes, out, own)
    for section in set(SECTIONS.values()) - {*UNIONS, *own}:
        del out[section]  # what the base says of another row's blocks
    for key, value in _following(name, out, changes).items():
        if key not in changes:
            put(out, key, value)
    return out


def _refuse_without_effect(
    name: str, changes: Mapping[str, Any], model: Mapping[str, Any], own: set[str | None]
) -> None:
    """own: the sections of the row's blocks."""
    blocks = f"{model['attention']} + {model['mlp']}"
    for key, value in changes.items():
        if "." in key and key.partition(".")[0] not in own:
            raise ConfigError(
                f"config.rows: model.{key}",
                value,
                f"the row {name!r} is {blocks}, which read nothing of it; leave it out",
            )
    preset = PRESETS[name]
    if not {"attention", "mlp"} & preset.keys() and own.isdisjoint(
        key.partition(".")[0] for key in preset
    ):
        raise ConfigError(
            "config.rows",
            name,
            f"changes unions of experts, and its blocks are {blocks}; leave it out",
        )


def _following(name: str, model: Mapping[str, Any], changes: Mapping[str, Any]) -> Changes:
    """What follows from the sizes of the model, unless the row says otherwise."""
    out: Changes = {}
    d, heads, parts = model["d_model"], model["n_heads"], hidden_parts(model)
    if model["mlp"] in MLPS:
        if model["d_hidden"] < parts:
            raise ConfigError(
                "config.model.d_hidden",
                model["d_hidden"],
                f"(in the row {name!r}) it is cut in {parts} experts; give at least that",
            )
        out["moe.d_expert"] = model["d_hidden"] // parts
        if model["mlp"] in DROPLESS:
            out["moe.capacity_factor"] = (
                math.ceil(100 * model["moe"]["n_experts"] / model["moe"]["k"]) / 100
            )
        if model["mlp"] != "expert_choice":
            out["moe.capacity_window"] = min(
                model["uome"]["capacity_window"], model["context_length"]
            )
    if model["attention"] == "mla":
        out |= {"mla.q_rank": d // 2, "mla.kv_rank": d // 2}
    if model["attention"] == "moh":
        shared = changes.get("moh.n_shared", heads // 4)
        if shared >= heads:
            raise ConfigError(
                "config.rows: model.moh.n_shared",
                shared,
                f"(in the row {name!r}) tokens choose among the other heads; give less than {heads}",
            )
        out |= {"moh.n_shared": shared, "moh.k": min(heads - shared, max(2, (heads - shared) // 2))}
    return out


def hidden_parts(model: Mapping[str, Any]) -> int:
    """Into how many equal parts the hidden width of a model's MLP is cut: routed and shared experts; 1 in a dense one."""
    if model["mlp"] == "uome":
        return model["uome"]["n_experts"]
    return 1 if model["mlp"] == "dense" else model["moe"]["n_experts"] + model["moe"]["n_shared"]

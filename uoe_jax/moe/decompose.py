"""Dense weights to expert weights and back: lossless reshapes and transposes, both ways.

Weights are dicts of numpy or jax arrays, with any leading axes (a model's layers), written "…"
here. Of numpy arrays, results are views where numpy can make one.

    MLP        w_up, w_gate […,D,F]     w_down […,F,D]     b_up, b_gate […,F]     bias_out […,D]
    UoME       w_up, w_gate […,N,D,f]   w_down […,N,f,D]   b_up, b_gate […,N,f]   bias_out […,D]
    Attention  w_q […,D,H,Dh]    w_k, w_v […,D,G,Dh]    w_o […,H,Dh,D]    b_q […,H,Dh]    bias_out
    SMHA       w_q […,N,D,h,Dh]  w_k, w_v […,N,D,g,Dh]  w_o […,N,h,Dh,D]  b_q […,N,h,Dh]  bias_out

and b_k, b_v as b_q; q_scale, k_scale […,Dh] are shared by all heads of either. Expert i holds
hidden units [i·f, (i+1)·f), or heads [i·h, (i+1)·h) and their key/value heads [i·g, (i+1)·g).
"""

import dataclasses
import math
from typing import Any

import numpy as np

from uoe_jax.config.fields import divisors
from uoe_jax.config.schema import GATED_ACTIVATIONS, ModelConfig, RoutingConfig
from uoe_jax.errors import ConfigError, UserError

Weights = dict[str, Any]

# The dense layouts. The expert layouts follow: N in front, and the axis in CUT is 1/N of it.
_LAYOUTS = {
    "mlp": dict(w_up="D F", w_gate="D F", w_down="F D", b_up="F", b_gate="F", bias_out="D"),
    "attention": dict(
        w_q="D H Dh", w_k="D G Dh", w_v="D G Dh", w_o="H Dh D",
        b_q="H Dh", b_k="G Dh", b_v="G Dh", bias_out="D", q_scale="Dh", k_scale="Dh",
    ),
    "router": dict(kernel="D N", bias="N", sequence_kernel="D N", sequence_bias="N", load_bias="N"),
}  # fmt: skip
AXES = {block: {k: a.split() for k, a in leaves.items()} for block, leaves in _LAYOUTS.items()}
CUT = {"F": "d_hidden", "H": "n_heads", "G": "n_kv_heads"}
REQUIRED = {"mlp": ("w_up", "w_down"), "attention": ("w_q", "w_k", "w_v", "w_o")}
BLOCKS = {"smha": "attention", "uome": "mlp"}  # a section of the configuration: the block it routes


def split_block(block: str, dense: Weights, n: int, key: str = "n_experts") -> Weights:
    """The weights of a dense block, "mlp" or "attention", as those of N experts.

    w_gate, biases and scales may be absent. `key` names n in errors.

    Raises:
      ConfigError: n does not divide F, or H and G.
      UserError: a leaf is missing, unknown or of a shape that does not fit.
    """
    _check_even(block, _read(block, dense), n, key)
    return {name: _cut(a, AXES[block][name], n) for name, a in dense.items()}


def merge_block(block: str, experts: Weights) -> Weights:
    """The inverse of `split_block`; raises UserError for leaves as it does."""
    _read(block, experts, experts=True)
    return {name: _join(a, AXES[block][name]) for name, a in experts.items()}


def dense_config(config: ModelConfig) -> ModelConfig:
    """The dense model of the same sizes, whose parameters `split` takes and `merge` gives."""
    return dataclasses.replace(config, attention="dense", mlp="dense")


def split(
    params: Weights, config: ModelConfig, routers: dict[str, Weights] | None = None
) -> Weights:
    """The dense model's parameters as those of `config`, with routed blocks cut in experts.

    Args:
      params: of `dense_config(config)`, or of a model that is dense where `config` routes.
      routers: {"smha" or "uome": all leaves of `router_shapes`}. None: zeros, with which every gate
        gives weight 1; with K = N and nothing dropped this is the dense model's function. To train
        with K < N give random ones: at zero every patch chooses the first K.

    Raises:
      ConfigError: N does not divide what it must.
      UserError: a leaf of a routed block or router is missing, unknown or of another shape.
    """
    routed, layers = config.unions(), dict(params.get("layers", {}))
    if routers is not None and set(routers) != set(routed):
        wanted = f"give one for each routed block of the model, {sorted(routed)}"
        raise UserError(f"routers={sorted(routers)}: {wanted}")
    for section, routing in routed.items():
        block, n = BLOCKS[section], routing.n_experts
        dense, sizes, shapes = (
            _block(layers, block),
            _sizes(config, n),
            router_shapes(config, routing),
        )
        _read(block, dense, sizes=sizes, names=_names(block, config))
        experts = split_block(block, dense, n, f"config.model.{section}.n_experts")
        if routers is None:
            xp = next(iter(dense.values())).__array_namespace__()
            router = {name: xp.zeros(shape, np.float32) for name, shape in shapes.items()}
        else:
            router = dict(routers[section])
            _read("router", router, False, sizes, tuple(shapes), f"routers.{section}")
        layers[block] = experts | {"router": router}
    return {**params, "layers": layers}


def merge(params: Weights, config: ModelConfig) -> Weights:
    """The parameters of `config` as those of `dense_config(config)`, without routers.

    The inverse of `split` for given routers; raises the same. The dense model computes what the
    routed one would with every patch in every expert at weight 1.
    """
    layers = dict(params.get("layers", {}))
    for section, routing in config.unions().items():
        block, sizes = BLOCKS[section], _sizes(config, routing.n_experts)
        experts = dict(_block(layers, block))
        if experts.pop("router", None) is None:
            routed = "the block has no experts, as config.model says it has"
            raise UserError(f"layers.{block}.router is missing: {routed}")
        _check_even(block, sizes, routing.n_experts, f"config.model.{section}.n_experts")
        _read(block, experts, True, sizes, _names(block, config))
        layers[block] = merge_block(block, experts)
    return {**params, "layers": layers}


def cut_leaf(path: str, a: Any, config: ModelConfig) -> Any:
    """One leaf of the dense model, by its dotted path, as `config` has it: `split` leaf by leaf."""
    axes, n = _routed_leaf(path, config)
    return _cut(a, axes, n) if n and axes else a


def join_leaf(path: str, a: Any, config: ModelConfig) -> Any:
    """The inverse of `cut_leaf`."""
    axes, n = _routed_leaf(path, config)
    return _join(a, axes) if n and axes else a


def _routed_leaf(path: str, config: ModelConfig) -> tuple[list[str], int]:
    """(axes of the leaf, none where it is not cut; experts of its block, 0 where none)."""
    block, _, name = path.removeprefix("layers.").partition(".")
    experts = {BLOCKS[section]: routing.n_experts for section, routing in config.unions().items()}
    return AXES.get(block, {}).get(name, []), experts.get(block, 0)


def _block(layers: Weights, block: str) -> Weights:
    if not isinstance(layers.get(block), dict):
        remedy = "give the parameters of a whole model, as nested dicts"
        raise UserError(f"layers.{block} is missing: {remedy}")
    return layers[block]


def _sizes(c: ModelConfig, n: int) -> dict[str, Any]:
    """The sizes by axis, of the dense model and of n experts; "…" is the layer axis."""
    dense = {"D": c.d_model, "F": c.d_hidden, "H": c.n_heads, "G": c.kv_heads, "Dh": c.head_dim}
    return {"…": (c.n_layers,), "N": n, **dense} | {a.lower(): dense[a] // max(n, 1) for a in CUT}


def _names(block: str, c: ModelConfig) -> tuple[str, ...]:
    """The leaves the block has in a model of this configuration."""
    absent = set() if c.bias else {name for name in AXES[block] if name.startswith("b")}
    absent -= {"b_q", "b_k", "b_v"} if c.qkv_bias else set()
    absent |= set() if c.activation in GATED_ACTIVATIONS else {"w_gate", "b_gate"}
    absent |= set() if c.qk_norm else {"q_scale", "k_scale"}
    return tuple(name for name in AXES[block] if name not in absent)


def router_shapes(config: ModelConfig, routing: RoutingConfig) -> dict[str, tuple[int, ...]]:
    """The leaves of a block's router and their shapes, layers in front."""
    patch, sequence, biased = (
        routing.unit != "sequence",
        routing.unit != "patch",
        routing.router_bias,
    )
    present = dict(kernel=patch, bias=patch and biased, load_bias=routing.bias_rate > 0)
    present |= dict(sequence_kernel=sequence, sequence_bias=sequence and biased)
    sizes, leaves = _sizes(config, routing.n_experts), AXES["router"].items()
    return {k: (*sizes["…"], *(sizes[a] for a in axes)) for k, axes in leaves if present[k]}


def _read(
    block: str,
    weights: Weights,
    experts: bool = False,
    sizes: dict[str, Any] | None = None,
    names: tuple[str, ...] | None = None,
    where: str = "",
) -> dict[str, Any]:
    """Sizes by axis, "…" for the leading ones; refuses missing, unknown and unfitting leaves."""
    # Given `sizes` and `names` the leaves must be exactly these; without, they must fit each other.
    where = where or (f"layers.{block}" if names else block)
    allowed, sizes = names or tuple(AXES[block]), dict(sizes or {})
    for name in names or REQUIRED[block]:
        if name not in weights:
            raise UserError(f"{where}.{name} is missing; the block has {', '.join(allowed)}")
    for name, a in weights.items():
        if name not in allowed:
            has = f"which has {', '.join(allowed)}"
            raise UserError(f"{where}.{name} is not a weight of this block, {has}")
        axes, shape = AXES[block][name], np.shape(a)
        if experts and set(axes) & set(CUT):
            axes = ["N", *(axis.lower() if axis in CUT else axis for axis in axes)]
        lead = len(shape) - len(axes)
        for axis, size in zip(("…", *axes), (shape[: max(lead, 0)], *shape[max(lead, 0) :])):
            if lead < 0 or sizes.setdefault(axis, size) != size:
                fit = ", ".join(f"{x}={sizes[x]}" if x in sizes else x for x in ("…", *axes))
                raise UserError(f"{where}.{name} has shape {shape}, which does not fit [{fit}]")
    return sizes


def _check_even(block: str, sizes: dict[str, Any], n: int, key: str) -> None:
    cut = {a: sizes[a] for a in CUT if any(a in axes for axes in AXES[block].values())}
    fits = f"the numbers of experts that work are {divisors(math.gcd(*cut.values()))}"
    for a, size in cut.items():
        if n < 1 or size % n:
            if a == "G":
                fits += " (each expert owns its key/value heads: copies of one would diverge)"
            raise ConfigError(key, n, f"must divide {CUT[a]}={size}; {fits}")


def _cut(a: Any, axes: list[str], n: int) -> Any:
    """[…,x,F,y] to […,N,x,f,y]; a leaf without such an axis is left as it is."""
    lead = a.ndim - len(axes)
    for cut in (lead + i for i, axis in enumerate(axes) if axis in CUT):
        a = a.reshape(*a.shape[:cut], n, a.shape[cut] // n, *a.shape[cut + 1 :])
        a = a.__array_namespace__().moveaxis(a, cut, lead)
    return a


def _join(a: Any, axes: list[str]) -> Any:
    """[…,N,x,f,y] to […,x,F,y]."""
    for i in (i for i, axis in enumerate(axes) if axis in CUT):
        lead = a.ndim - len(axes) - 1
        a = a.__array_namespace__().moveaxis(a, lead, lead + i)
        a = a.reshape(*a.shape[: lead + i], -1, *a.shape[lead + i + 2 :])
    return a

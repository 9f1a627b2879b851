"""Dense weights <-> expert weights: exact both ways, the same function and gradients, and refusals."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import ModelConfig, RoutingConfig
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.moe import decompose
from uoe_jax.moe.decompose import dense_config, merge, merge_block, split, split_block
from uoe_jax.train.step import functional

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "swiglu", "geglu")


def any_bits(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 of any bit pattern: subnormals, both zeros, infinities and NaNs of any payload."""
    return rng.integers(0, 2**32, shape, np.uint32).view(np.float32)


def dense_mlp(make, lead=(), d=3, f=8, gated=True, bias=True) -> dict:
    shapes = dict(w_up=(d, f), w_down=(f, d))
    shapes |= dict(w_gate=(d, f)) if gated else {}
    shapes |= dict(b_up=(f,), bias_out=(d,)) if bias else {}
    shapes |= dict(b_gate=(f,)) if bias and gated else {}
    return {name: make(*lead, *shape) for name, shape in shapes.items()}


def dense_attention(make, lead=(), d=3, h=4, g=4, dh=2, bias=True) -> dict:
    shapes = dict(w_q=(d, h, dh), w_k=(d, g, dh), w_v=(d, g, dh), w_o=(h, dh, d))
    shapes |= (
        dict(b_q=(h, dh), b_k=(g, dh), b_v=(g, dh), bias_out=(d,), q_scale=(dh,), k_scale=(dh,))
        if bias
        else {}
    )
    return {name: make(*lead, *shape) for name, shape in shapes.items()}


def assert_same_bits(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert type(u) is type(v) and u.shape == v.shape and u.dtype == v.dtype
        assert np.asarray(u).tobytes() == np.asarray(v).tobytes()


def there_and_back(block: str, dense: dict, n: int) -> None:
    """Both directions, bit for bit; the expert weights are also checked against new ones of their own."""
    cut, join = functools.partial(split_block, block), functools.partial(merge_block, block)
    experts = cut(dense, n)
    assert_same_bits(join(experts), dense)
    rng = np.random.default_rng(1)
    own = {name: any_bits(rng, *a.shape) for name, a in experts.items()}
    assert_same_bits(cut(join(own), n), own)


sizes = st.integers(1, 3)
leads = st.sampled_from([(), (2,), (2, 3)])
experts, seeds = st.integers(1, 4), st.integers(0, 99)


@given(n=experts, f=sizes, d=sizes, lead=leads, gated=st.booleans(), bias=st.booleans(), seed=seeds)
@settings(max_examples=60, deadline=None)
def test_mlp_there_and_back_is_exact(n, f, d, lead, gated, bias, seed):
    make = functools.partial(any_bits, np.random.default_rng(seed))
    there_and_back("mlp", dense_mlp(make, lead, d, n * f, gated, bias), n)


@given(
    n=experts, g=sizes, group=sizes, d=sizes, dh=sizes, lead=leads, bias=st.booleans(), seed=seeds
)
@settings(max_examples=60, deadline=None)
def test_attention_there_and_back_is_exact(n, g, group, d, dh, lead, bias, seed):
    """MHA (group 1), GQA, and MQA (n = g = 1)."""
    make = functools.partial(any_bits, np.random.default_rng(seed))
    dense = dense_attention(make, lead, d, n * g * group, n * g, dh, bias)
    there_and_back("attention", dense, n)


def test_the_cut_is_contiguous():
    """Which expert holds what, written as slices; each query head meets in its expert the key head it met before."""
    make = functools.partial(any_bits, np.random.default_rng(0))
    n, f, h, g = 2, 4, 4, 2  # per expert: an MLP of 8, GQA of 8 heads and 4 key/value heads
    w = dense_mlp(make, f=n * f)
    experts = split_block("mlp", w, n)
    for i in range(n):
        at = slice(i * f, (i + 1) * f)
        wanted = {name: w[name][:, at] for name in ("w_up", "w_gate")}
        wanted |= {name: w[name][at] for name in ("w_down", "b_up", "b_gate")}
        assert_same_bits({name: experts[name][i] for name in wanted}, wanted)
    w = dense_attention(make, h=n * h, g=n * g)
    experts = split_block("attention", w, n)
    assert experts["bias_out"] is w["bias_out"]
    for i in range(n):
        for j in range(h):
            head = i * h + j
            key = head * g // h  # as in `attend`: G/H of the head
            for name, dense_at, at in (
                ("w_q", head, j),
                ("w_k", key, j * g // h),
                ("w_v", key, j * g // h),
            ):
                assert_same_bits(experts[name][i, :, at], w[name][:, dense_at])
                assert_same_bits(experts["b" + name[1:]][i, at], w["b" + name[1:]][dense_at])
            assert_same_bits(experts["w_o"][i, j], w["w_o"][head])


def test_numpy_arrays_are_not_copied_where_a_view_will_do():
    w = dense_mlp(functools.partial(any_bits, np.random.default_rng(0)), (2,))
    assert all(np.shares_memory(a, w[name]) for name, a in split_block("mlp", w, 4).items())


# --- whole models -----------------------------------------------------------------------------------------------


def model(
    gate="none", smha=2, uome=4, unit="patch", bias_rate=0.0, router_bias=False, **changes
) -> ModelConfig:
    """Every patch kept by every expert; D 8, two layers."""
    experts = {"smha": smha, "uome": uome}
    common = dict(
        gate=gate, capacity_window=4, unit=unit, bias_rate=bias_rate, router_bias=router_bias
    )
    routing = {name: RoutingConfig(n_experts=n, k=n, **common) for name, n in experts.items()}
    sizes = dict(
        vocab_size=11, d_model=8, n_layers=2, n_heads=4, d_hidden=16, context_length=8, remat="none"
    )
    return ModelConfig(**(sizes | routing | changes))


@functools.cache
def shapes_of(c: ModelConfig) -> dict:
    return jax.eval_shape(functional(c)[0], jax.random.key(0))


def filled(tree, seed: int = 0, xp=jnp) -> dict:
    """A tree of shapes with random leaves, so that no bias is 0 and no scale 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: xp.asarray(0.4 * rng.normal(size=a.shape), a.dtype), tree)


def dense_model(c: ModelConfig) -> dict:
    return filled(shapes_of(dense_config(c)), xp=np)


def changed(tree: dict, block: str, **leaves) -> dict:
    """The tree with leaves of a block replaced; None removes one."""
    new = {name: a for name, a in (tree["layers"][block] | leaves).items() if a is not None}
    return {**tree, "layers": tree["layers"] | {block: new}}


def routers_of(params: dict, c: ModelConfig) -> dict:
    return {name: params["layers"][decompose.BLOCKS[name]]["router"] for name in c.routed()}


MODELS = [
    *(
        model(activation=a, bias=a != "relu", smha=n, uome=n)
        for a, n in zip(ACTIVATIONS, (1, 2, 4, 2, 4))
    ),
    model(activation="geglu", n_kv_heads=2, qk_norm=True),
    model(smha=1, n_kv_heads=1, bias=True),
    model(attention="dense", bias=True),
    model(mlp="dense", tie_embeddings=False, position="learned", norm="layernorm"),
    model(mlp="dense", attention="dense"),
    model(bias_rate=0.1),
    model(causal=False, unit="sequence", router_bias=True),
    model(causal=False, unit="hierarchical", router_bias=True, bias_rate=0.1),
]


def test_whole_trees_both_ways():
    """Structure and shapes are those the models declare, also of abstract trees; both ways are exact bit for bit."""
    for c in MODELS:
        dense, routed = shapes_of(dense_config(c)), shapes_of(c)
        as_shapes = functools.partial(jax.tree.map, lambda a: (a.shape, a.dtype))
        assert as_shapes(jax.eval_shape(lambda p: split(p, c), dense)) == as_shapes(routed)
        assert as_shapes(jax.eval_shape(lambda p: merge(p, c), routed)) == as_shapes(dense)
        w, experts = dense_model(c), filled(routed, 1, xp=np)
        assert_same_bits(merge(split(w, c), c), w)
        assert_same_bits(split(merge(experts, c), c, routers_of(experts, c)), experts)
        assert all(not leaf.any() for leaf in jax.tree.leaves(routers_of(split(w, c), c)))


def test_router_bias_and_jax_arrays():
    c = model(bias=True, mlp="dense")
    c = dataclasses.replace(c, smha=dataclasses.replace(c.smha, router_bias=True))
    experts = filled(shapes_of(c))
    assert_same_bits(split(merge(experts, c), c, routers_of(experts, c)), experts)
    assert_same_bits(
        split(merge(experts, c), c)["layers"]["attention"]["router"]["bias"], jnp.zeros((2, 2))
    )
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), merge(experts, c))
    assert_same_bits(merge(split(half, c), c), half)
    assert split(half, c)["layers"]["attention"]["router"]["kernel"].dtype == jnp.float32


def test_the_input_is_left_as_it_was():
    c = model()
    w = dense_model(c)
    before = jax.tree.map(np.copy, w)
    experts = split(w, c)
    again = jax.tree.map(np.copy, experts)
    merge(experts, c)
    assert_same_bits(w, before)
    assert_same_bits(experts, again)


BIG = dict(n_kv_heads=2, bias=True, activation="swiglu", norm="layernorm", tie_embeddings=False)
TOKENS = np.random.default_rng(3).integers(0, 11, (2, 8), dtype=np.int32)
SEGMENTS = np.array([[1] * 5 + [2] * 3, [1] * 8], np.int32)
COTANGENT = np.random.default_rng(4).normal(size=(2, 8, 11)).astype(np.float32)


@functools.cache
def compiled(c: ModelConfig, differentiate: bool):
    rebuild = functional(c)[1]

    def f(params, tokens, segments):
        logits = rebuild(params)(tokens, segments)[0]
        return (logits * COTANGENT).sum(), logits

    return reference.jit(jax.value_and_grad(f, has_aux=True) if differentiate else f)


def logits_of(c: ModelConfig, params: dict):
    return compiled(c, False)(params, TOKENS, SEGMENTS)[1]


def logits_and_gradients(c: ModelConfig, params: dict):
    (_, logits), gradients = compiled(c, True)(params, TOKENS, SEGMENTS)
    return logits, gradients


@functools.cache
def dense_results(c: ModelConfig):
    params = filled(shapes_of(c))
    return params, *logits_and_gradients(c, params)


@pytest.mark.parametrize("gate", ["sigmoid", "normalized", "score", "straight_through"])
def test_every_gate_at_routers_of_zero_gives_the_dense_logits(gate):
    """GQA, SwiGLU, biases, two documents in a row; gate none is below, with gradients."""
    c = model(gate, **BIG)
    params, logits, _ = dense_results(dense_config(c))
    assert reference.error(logits_of(c, split(params, c)), logits) < 1e-5


@pytest.mark.parametrize(
    "c",
    [
        pytest.param(model("none", **BIG), id="gqa-swiglu-none"),
        pytest.param(
            model("sigmoid", smha=1, n_kv_heads=1, uome=2),
            id="mqa-gelu-sigmoid",
            marks=pytest.mark.slow,
        ),
        pytest.param(model("score", smha=4, uome=4), id="mha-gelu-score", marks=pytest.mark.slow),
    ],
)
def test_the_split_model_is_the_dense_model(c):
    """Logits, and gradients: merging is linear, so it takes those of the experts' weights to those of the dense ones.

    With gate none the routers are drawn, as they must not matter.
    """
    params, logits, gradients = dense_results(dense_config(c))
    routers = routers_of(filled(shapes_of(c), 7), c) if c.smha.gate == "none" else None
    split_logits, split_gradients = logits_and_gradients(c, split(params, c, routers))
    assert reference.error(split_logits, logits) < 1e-5
    assert reference.error(merge(split_gradients, c), gradients) < 1e-5
    # The comparison is of something: keys' biases alone have no gradient without positions, and rope gives them one.
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients)) > 1e-3


def test_a_wrong_cut_would_be_seen():
    """The comparison can fail: experts that hold each other's output rows give other logits."""
    c = model("score", **BIG)
    params, logits, _ = dense_results(dense_config(c))
    experts = split(params, c)
    for block, name in (("attention", "w_o"), ("mlp", "w_down")):
        leaf = experts["layers"][block][name]
        assert (
            reference.error(logits_of(c, changed(experts, block, **{name: leaf[:, ::-1]})), logits)
            > 1e-2
        )


# --- refusals ---------------------------------------------------------------------------------------------------


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    "cut, sentence",
    [
        (
            lambda: split_block("mlp", dense_mlp(zeros, f=12), 5),
            "n_experts=5: .* d_hidden=12; .* are 1, 2, 3, 4, 6, 12$",
        ),
        (
            lambda: split_block("mlp", dense_mlp(zeros), 0),
            "n_experts=0: must divide d_hidden=8; .* are 1, 2, 4, 8$",
        ),
        (
            lambda: split_block("attention", dense_attention(zeros, h=8, g=4), 3),
            "n_experts=3: .* n_heads=8; .* are 1, 2, 4$",
        ),
        (
            lambda: split_block("attention", dense_attention(zeros, h=8, g=2), 4),
            "n_kv_heads=2; .* are 1, 2 .each expert owns",
        ),
        (
            lambda: split_block("attention", dense_attention(zeros, h=4, g=1), 4),
            "n_kv_heads=1; .* are 1 .each expert owns",
        ),
        (
            lambda: split(dense_model(model()), model(uome=3)),
            "config.model.uome.n_experts=3: .* are 1, 2, 4, 8, 16$",
        ),
        (
            lambda: merge(filled(shapes_of(model())), model(smha=3)),
            "config.model.smha.n_experts=3: .* are 1, 2, 4$",
        ),
    ],
)
def test_uneven_sizes_are_refused_with_those_that_work(cut, sentence):
    with pytest.raises(ConfigError, match=sentence):
        cut()


C = model(bias=True)


@pytest.mark.parametrize(
    "block, leaves, sentence",
    [
        (
            "mlp",
            dict(w_down=None),
            "layers.mlp.w_down is missing; the block has w_up, w_down, b_up, bias_out",
        ),
        ("mlp", dict(w_up=None), "layers.mlp.w_up is missing"),
        ("attention", dict(b_q=None), "layers.attention.b_q is missing"),
        (
            "attention",
            dict(b_o=zeros(2, 8)),
            "layers.attention.b_o is not a weight of this block, which has w_q",
        ),
        ("mlp", dict(w_gate=zeros(2, 8, 16)), "layers.mlp.w_gate is not a weight of this block"),
        (
            "mlp",
            dict(w_up=zeros(2, 16, 8)),
            "w_up has shape (2, 16, 8), which does not fit […=(2,), D=8, F=16]",
        ),
        (
            "mlp",
            dict(w_up=zeros(8, 16)),
            "layers.mlp.w_up has shape (8, 16), which does not fit […=(2,), D=8, F=16]",
        ),
        ("mlp", dict(w_up=zeros(3, 8, 16)), "layers.mlp.w_up has shape (3, 8, 16)"),
        ("mlp", dict(bias_out={}), "layers.mlp.bias_out has shape ()"),
        ("attention", dict(w_k=zeros(2, 8, 2, 2)), "which does not fit […=(2,), D=8, G=4, Dh=2]"),
        ("attention", dict(w_o=zeros(2, 8, 8)), "which does not fit […=(2,), H=4, Dh=2, D=8]"),
    ],
)
def test_a_wrong_dense_tree_is_refused(block, leaves, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        split(changed(dense_model(C), block, **leaves), C)


@pytest.mark.parametrize(
    "block, leaves, sentence",
    [
        ("mlp", dict(w_down=None), "layers.mlp.w_down is missing"),
        ("mlp", dict(router=None), "layers.mlp.router is missing"),
        ("mlp", dict(w_up=zeros(2, 2, 8, 8)), "which does not fit […=(2,), N=4, D=8, f=4]"),
        ("mlp", dict(bias_out=zeros(2, 4, 8)), "which does not fit […=(2,), D=8]"),
        (
            "attention",
            dict(w_v=zeros(2, 2, 8, 1, 2)),
            "which does not fit […=(2,), N=2, D=8, g=2, Dh=2]",
        ),
    ],
)
def test_a_wrong_tree_of_experts_is_refused(block, leaves, sentence):
    experts = filled(shapes_of(C), xp=np)
    with pytest.raises(UserError, match=re.escape(sentence)):
        merge(changed(experts, block, **leaves), C)


def test_wrong_leaves_of_one_block_are_refused():
    def refused(sentence: str):
        return pytest.raises(UserError, match=re.escape(sentence))

    w = dense_mlp(zeros, (2,))
    with refused("mlp.w_down has shape (2, 9, 3), which does not fit […=(2,), F=8, D=3]"):
        split_block("mlp", w | {"w_down": zeros(2, 9, 3)}, 2)
    with refused("mlp.w_up has shape (8,), which does not fit […, D, F]"):
        split_block("mlp", {"w_up": zeros(8), "w_down": zeros(8)}, 2)
    with refused("mlp.w_up is missing"):
        split_block("mlp", {"w_down": zeros(8, 3)}, 2)
    experts = split_block("attention", dense_attention(zeros), 2)
    with refused(
        "attention.w_o has shape (4, 1, 2, 3), which does not fit […=(), N=2, h=2, Dh=2, D=3]"
    ):
        merge_block("attention", experts | {"w_o": zeros(4, 1, 2, 3)})
    with refused("attention.router is not a weight of this block"):
        merge_block("attention", experts | {"router": zeros(3, 2)})
    for tree in ({}, {"layers": {"attention": zeros(3)}}):
        with refused(
            "layers.attention is missing: give the parameters of a whole model, as nested dicts"
        ):
            split(tree, C)


def test_wrong_routers_are_refused():
    dense, kernels = dense_model(C), {"smha": zeros(2, 8, 2), "uome": zeros(2, 8, 4)}
    routers = {name: {"kernel": kernel} for name, kernel in kernels.items()}
    split(dense, C, routers)
    for wrong, sentence in (
        (
            {"smha": routers["smha"]},
            "routers=['smha']: give one for each routed block of the model, ['smha', 'uome']",
        ),
        (
            routers | {"uome": routers["smha"]},
            "uome.kernel has shape (2, 8, 2), which does not fit […=(2,), D=8, N=4]",
        ),
        (routers | {"uome": {}}, "routers.uome.kernel is missing"),
        (
            routers | {"uome": {"kernel": kernels["uome"], "bias": zeros(2, 4)}},
            "routers.uome.bias is not a weight",
        ),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            split(dense, C, wrong)

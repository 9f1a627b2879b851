"""Experts on the mesh: the same numbers on every factorisation of 8 devices, and the collectives that contract 7 allows."""

from __future__ import annotations

import functools
import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import slow
from small_models import (
    MESH_MODEL,
    MODEL,
    ONE,
    ROUTING,
    assert_same_training,
    batch,
    over_expert,
    program_on,
    sized,
    train_on,
)

from uoe_jax import SMHA, RoutingConfig, UoME
from uoe_jax.config import MeshConfig, ModelConfig, from_dict
from uoe_jax.config.baselines import ATTENTIONS, MLPS, SECTIONS
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.errors import ConfigError
from uoe_jax.infer.sample import Sampler
from uoe_jax.layers.attention import Attention
from uoe_jax.layers.common import tokens_like
from uoe_jax.layers.mlp import MLP
from uoe_jax.models.classifier import Classifier
from uoe_jax.models.decoder import Layer, make_attention, make_mlp
from uoe_jax.plan.hlo import Collective, collectives
from uoe_jax.train.step import build

SHAPES = [(d, f, e) for d, f, e in itertools.product((1, 2, 4, 8), repeat=3) if d * f * e == 8]


# --- contract 6 -------------------------------------------------------------------------------------------------

on_one_device = functools.cache(lambda: train_on(ONE, 20))
EVERY = [sized(1, *shape, sequence_parallel=sp) for shape in SHAPES for sp in (False, True)]
EVERY += [sized(2, 1, 2, 2), sized(2, 2, 1, 2, True), sized(8)]
QUICK_ONES = (sized(2, 1, 2, 2),)


@pytest.mark.parametrize(
    "sizes",
    [s if s in QUICK_ONES else slow(s) for s in EVERY],
    ids=lambda s: "x".join(map(str, s.values())),
)
def test_every_mesh_gives_the_same_run(sizes):
    """20 steps: the same initial parameters bit for bit, losses and gradient norms to 1e-5."""
    assert_same_training(on_one_device(), train_on(sizes, 20))


OTHERS = {
    "a vocabulary that the axis does not divide": dict(
        model=dict(vocab_size=33, bias=True, dropout=0.1)
    ),
    "patches that do not divide the row": dict(
        model=dict(smha={**ROUTING, "patch_size": 4}, qk_norm=True), accumulation=2
    ),
    "dense": dict(model=dict(attention="dense", mlp="dense", attention_dropout=0.1, bias=True)),
    "dense, as Llama": dict(
        model=dict(
            attention="dense",
            mlp="dense",
            n_kv_heads=4,
            activation="swiglu",
            tie_embeddings=False,
            remat="none",
        )
    ),
    "learned positions": dict(
        model=dict(position="learned", norm="layernorm", tie_embeddings=False, bias=True)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_other_models_too(name, sequence_parallel):
    changes = OTHERS[name]
    assert_same_training(
        train_on(ONE, 3, **dict(changes)),
        train_on(sized(1, 2, 2, 2, sequence_parallel), 3, **dict(changes)),
    )


def test_initialisation_never_holds_the_whole_model():
    """Working memory of a device while weights and moments are made: less than a third of the weights, which are cut in 8."""
    program, mesh = program_on(sized(fsdp=8), model=dict(d_model=128, d_hidden=1024, n_layers=4))
    with jax.set_mesh(mesh):
        found = program.init.lower(jax.random.key(0)).compile().memory_analysis()
    weights = sum(a.size * 4 for a in jax.tree.leaves(program.abstract.params))
    assert found.output_size_in_bytes < 3.3 * weights / 8
    assert found.temp_size_in_bytes < weights / 3, (found, weights)


@pytest.mark.slow
def test_text_is_the_same_on_a_mesh():
    """Decoding is left to the partitioner: its few rows need not fit the batch axes."""
    texts = []
    for sizes in (ONE, sized(1, 2, 2, 2, True)):
        program, mesh = program_on(sizes, model=dict(vocab_size=257))
        config = from_dict(
            {
                "model": {**MESH_MODEL, "vocab_size": 257},
                "generate": {"max_tokens": 12, "temperature": 0.0},
            }
        )
        with jax.set_mesh(mesh):
            state = program.init(jax.random.key(1))
            texts.append(
                Sampler(config, program.model, state.params, ByteTokenizer()).complete(
                    ["def ", "x"]
                )
            )
    assert texts[0] == texts[1]


# --- contract 7 -------------------------------------------------------------------------------------------------

BASELINES = (*ATTENTIONS, *MLPS)
MESHES = [(1, 2, 1, 4), (1, 1, 2, 4), (1, 2, 2, 2), (1, 1, 1, 8), (2, 1, 2, 2)]
B, L, D, N = 8, 16, 32, 8


def make(kind: str):
    routing, rngs = RoutingConfig(n_experts=N, k=4, capacity_window=8), nnx.Rngs(0)
    if kind in BASELINES:
        own = dict(
            mla=dict(q_rank=8, kv_rank=8),
            reformer=dict(chunk=4),
            long_short=dict(window=4),
            moe=dict(n_experts=8, n_shared=1, d_expert=8),
        )
        own = {name: changes for name, changes in own.items() if name == SECTIONS[kind]}
        model = dict(d_model=D, n_heads=8, d_hidden=64, context_length=L, causal=False, **own)
        config = from_dict(
            {"model": {**model, "attention" if kind in ATTENTIONS else "mlp": kind}}
        ).model
        return (make_attention if kind in ATTENTIONS else make_mlp)(config, rngs)
    return {
        "uome": lambda: UoME(D, 64, routing, bias=True, rngs=rngs),
        "smha": lambda: SMHA(D, 8, routing, rngs=rngs),
        "mlp": lambda: MLP(D, 64, bias=True, rngs=rngs),
        "attention": lambda: Attention(D, 8, rngs=rngs),
        "layer": lambda: Layer(
            ModelConfig(d_model=D, n_heads=8, d_hidden=64, bias=True, smha=routing, uome=routing),
            rngs=rngs,
        ),
    }[kind]()


def compiled(kind: str, shape: tuple[int, ...], sequence_parallel: bool, backward: bool):
    """The collectives of a block on a mesh."""
    mesh = mesh_lib.make_mesh(MeshConfig(**dict(zip(mesh_lib.AXES, shape))))
    with jax.set_mesh(mesh), mesh_lib.sequence_parallel(sequence_parallel):
        graphdef, state = nnx.split(make(kind))
        placed = jax.tree.map(
            lambda w: w.replace(
                jax.device_put(w[...], mesh_lib.weight_sharding(mesh, w.logical_axes, w.shape))
            ),
            state,
            is_leaf=lambda w: isinstance(w, nnx.Variable),
        )
        x = jax.device_put(
            jnp.ones((B, L, D)), jax.NamedSharding(mesh, mesh_lib.activations(mesh_lib.current()))
        )

        def forward(state, x):
            return nnx.merge(graphdef, state)(x, tokens_like(x))[0]

        f = (
            jax.grad(lambda *args: jnp.square(forward(*args)).sum(), argnums=(0, 1))
            if backward
            else forward
        )
        text = jax.jit(f).lower(placed, x).compile().as_text()
    return collectives(text, mesh.shape), state


def assert_nothing_else(found: list[Collective], state, shape: tuple[int, ...]) -> None:
    """Nothing is exchanged all to all; over the batch axes only weights are gathered and their gradients scattered."""
    mesh = mesh_lib.abstract_mesh(MeshConfig(**dict(zip(mesh_lib.AXES, shape))), 8)
    weights = set()  # as they are gathered: whole but for `expert`
    for w in jax.tree.leaves(state, is_leaf=lambda w: isinstance(w, nnx.Variable)):
        spec = mesh_lib.weight_spec(mesh, w.logical_axes, w.shape)
        weights.add(
            tuple(
                size // (shape[3] if axis == "expert" else 1) for size, axis in zip(w.shape, spec)
            )
        )
    for c in found:
        assert c.kind not in ("all-to-all", "collective-permute"), c
        if c.kind in ("all-gather", "reduce-scatter") and "expert" not in c.axes:
            assert c.axes == ("fsdp",) and max(c.operand.shape, c.result.shape) in weights, (
                c,
                weights,
            )


CUT_KINDS = ("uome", "smha", "mlp", "attention", "mla", "deepseek_moe")
KINDS = [
    *((kind, MESHES[2]) for kind in CUT_KINDS),
    *(slow(kind, MESHES[2]) for kind in BASELINES if kind not in CUT_KINDS),
    *(slow(kind, shape) for kind in CUT_KINDS[:2] for shape in MESHES[:2] + MESHES[3:]),
]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    "kind, shape", KINDS, ids=lambda v: v if isinstance(v, str) else "x".join(map(str, v))
)
def test_one_reduction_over_expert(kind, shape, sequence_parallel):
    """Forward: one all-reduce of the device's activations; or one all-gather and one reduce-scatter."""
    found, state = compiled(kind, shape, sequence_parallel, backward=False)
    activation = (B // math.prod(shape[:3]), L, D)
    expected = ["all-gather", "reduce-scatter"] if sequence_parallel else ["all-reduce"]
    assert over_expert(found) == [(k, activation) for k in expected], found
    assert_nothing_else(found, state, shape)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(
    "shape", [MESHES[2], *map(slow, MESHES[:2] + MESHES[3:])], ids=lambda s: "x".join(map(str, s))
)
def test_a_layer_with_its_backward_pass(shape, sequence_parallel):
    """Attention and MLP, forward and back: two activations reduced each way, and at most one score size for each."""
    found, state = compiled("layer", shape, sequence_parallel, backward=True)
    b = B // math.prod(shape[:3])
    exchanged = over_expert(found)
    activations = [kind for kind, size in exchanged if size == (b, L, D)]
    if sequence_parallel:
        assert (
            activations.count("reduce-scatter") == 4
        )  # leaving twice, and back into the tokens' parts twice
        assert activations.count("all-gather") == 4 and activations.count("all-reduce") == 0
    else:
        assert activations == ["all-reduce"] * 4
    others = [(kind, size) for kind, size in exchanged if size != (b, L, D)]
    scores = [size for _, size in others if size == (b, L, N)]
    assert len(scores) <= 2, others
    # With sequence_parallel the scales of the norms and the output biases see parts of the tokens: vectors of D.
    assert all(size == (b, L, N) or sequence_parallel and size == (D,) for _, size in others), (
        others
    )
    assert_nothing_else(found, state, shape)


@pytest.mark.parametrize("sequence_parallel", [False, slow(True)])
def test_the_whole_train_step(sequence_parallel):
    """Embedding, head and loss too: nothing all to all, no gather over replica or data; the vocabulary stays cut."""
    program, mesh = program_on(sized(1, 2, 2, 2, sequence_parallel), model=dict(vocab_size=48))
    # It knows its mesh: nobody need make that current.
    found = collectives(
        program.train_step.lower(program.abstract, program.abstract_batch).compile().as_text(),
        mesh.shape,
    )
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "reduce-scatter"}
    for c in found:
        assert not (c.kind == "all-gather" and {"replica", "data"} & set(c.axes)), c
        assert not any(
            len(a.shape) == 3 and a.shape[-1] in (48, 24) for a in (c.operand, c.result)
        ), c
    gradients = [
        c
        for c in found
        if c.kind == "all-reduce"
        and "transpose(" in c.op_name
        and "data" in c.axes
        and len(c.operand.shape) > 1
    ]
    assert gradients and all(set(c.axes) <= {"replica", "data"} for c in gradients), (
        gradients
    )  # after their fsdp scatter


@pytest.mark.parametrize("vocabulary", [32, 33])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_weights_cross_fsdp_in_the_compute_dtype_and_gradients_in_their_own(
    sequence_parallel, vocabulary
):
    """Read off the lowered program, as the CPU's compiler computes bfloat16 in float32. Only routers cross in float32."""
    model = {**MESH_MODEL, "dtype": "bfloat16", "bias": True, "vocab_size": vocabulary}
    sizes = sized(fsdp=2, expert=4, sequence_parallel=sequence_parallel)
    config = from_dict({"model": model, "train": {"batch_size": 8}, "mesh": sizes})
    with jax.sharding.use_abstract_mesh(mesh := mesh_lib.abstract_mesh(config.mesh, 8)):
        program = build(config, mesh)
        text = (
            program.train_step.trace(program.abstract, program.abstract_batch)
            .lower(lowering_platforms=("tpu",))
            .as_text()
        )

    def found(kind: str) -> set[tuple[str, str]]:
        return set(
            re.findall(rf'"stablehlo.{kind}".*?-> tensor<(?:(\S*)x)?(f32|bf16)>', text, re.DOTALL)
        )

    assert {shape for shape, dtype in found("all_gather") if dtype == "f32"} == {
        f"{MODEL['d_model']}x8"
    }  # D x N
    activations = {"4x8x32"} if sequence_parallel else {"4x32x32"}
    assert {
        shape for shape, dtype in found("reduce_scatter") | found("all_reduce") if dtype == "bf16"
    } == activations


@pytest.mark.parametrize(
    "changes",
    [
        dict(stem="image", context_length=16, image=dict(height=8, width=8, patch=2)),
        slow(dict(vocab_size=12)),
    ],
    ids=str,
)
def test_a_classifier_exchanges_nothing_all_to_all(changes):
    config = from_dict(
        {
            "model": {**MESH_MODEL, "task": "classify", "causal": False, **changes},
            "mesh": sized(1, 2, 2, 2),
        }
    ).model
    mesh = mesh_lib.make_mesh(MeshConfig(**sized(1, 2, 2, 2)))
    shape = (8, 8, 8, 3) if config.stem == "image" else (8, config.context_length)
    inputs = jax.ShapeDtypeStruct(
        shape,
        jnp.float32 if config.stem == "image" else jnp.int32,
        sharding=jax.NamedSharding(mesh, mesh_lib.ROWS),
    )
    with jax.set_mesh(mesh):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: Classifier(config, rngs=nnx.Rngs(0))))
        weights = jax.tree.map(
            lambda w: w.replace(
                jax.ShapeDtypeStruct(
                    w.shape,
                    jnp.float32,
                    sharding=mesh_lib.weight_sharding(mesh, w.logical_axes, w.shape),
                )
            ),
            state,
            is_leaf=lambda w: isinstance(w, nnx.Variable),
        )
        loss = jax.grad(
            lambda state, inputs: jnp.square(nnx.merge(graphdef, state)(inputs)[0]).sum()
        )
        found = collectives(jax.jit(loss).lower(weights, inputs).compile().as_text(), mesh.shape)
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "reduce-scatter"}, {
        c.kind for c in found
    }


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_no_token_sees_a_later_one_on_a_mesh(sequence_parallel):
    """Contract 2: another token changes no score before it, bit for bit."""
    tight = {**ROUTING, "capacity_factor": 0.5, "capacity_window": 2, "patch_size": 4}
    program, mesh = program_on(sized(1, 2, 2, 2), model=dict(smha=tight, uome=tight))
    rows = batch(rows=8)
    with jax.set_mesh(mesh), mesh_lib.sequence_parallel(sequence_parallel):
        params = program.init(jax.random.key(0)).params
        score = jax.jit(lambda params, tokens: program.model(params)(tokens)[0])
        tokens = mesh_lib.put_batch(mesh, {"tokens": rows["tokens"]})["tokens"]
        before = np.asarray(score(params, tokens))
        for t in (1, 13, 30):
            after = np.asarray(score(params, tokens.at[:, t].add(1) % MODEL["vocab_size"]))
            np.testing.assert_array_equal(after[:, :t], before[:, :t])
            assert (after[:, t:] != before[:, t:]).any()


# --- laying out and refusing ------------------------------------------------------------------------------------


def fake(i: int, per_group: int, by: str):
    """A device as the layout helpers see it."""
    group = i // per_group
    place = dict(platform="gpu", slice_index=group) if by == "slice" else dict(platform="cpu")
    return types.SimpleNamespace(id=i, process_index=group, device_kind="some", **place)


@pytest.mark.parametrize("by", ["slice", "process"])
def test_the_slow_network_is_crossed_by_the_outer_axis(by):
    devices = [fake(i, 4, by) for i in range(16)][::-1]  # in any order
    groups = np.vectorize(lambda d: d.process_index)
    laid = groups(mesh_lib.arrange(devices, dict(replica=4, data=1, fsdp=2, expert=2)))
    assert all(len(set(laid[r].ravel())) == 1 for r in range(4)) and len(set(laid.ravel())) == 4
    laid = groups(mesh_lib.arrange(devices, dict(replica=1, data=2, fsdp=4, expert=2)))
    assert all(
        len(set(laid[0, d, 2 * f : 2 * f + 2].ravel())) == 1 for d in range(2) for f in range(2)
    )
    with pytest.raises(ConfigError, match="replica=1: 3 .* cannot be spread over the mesh"):
        mesh_lib.arrange(
            [fake(i, 4, by) for i in range(12)], dict(replica=1, data=2, fsdp=2, expert=2)
        )


DENSE = dict(attention="dense", mlp="dense")


def test_a_slice_of_several_hosts_is_one_fast_network():
    """A TPU slice has many processes and one slice_index: its axes follow the torus, not the hosts."""
    chips = [
        types.SimpleNamespace(
            id=i,
            platform="tpu",
            device_kind="TPU v5p",
            coords=(i % 4, i // 4 % 4, i // 16),
            core_on_chip=0,
            process_index=i // 4,
            slice_index=0,
        )
        for i in range(64)
    ]
    laid = mesh_lib.arrange(chips, dict(replica=1, data=4, fsdp=4, expert=4))
    for axis in (1, 2, 3):  # neighbours along an axis of the mesh are neighbours in the torus
        for one, other in zip(
            np.moveaxis(laid, axis, 0)[0].ravel(), np.moveaxis(laid, axis, 0)[1].ravel()
        ):
            assert (
                sum(min(abs(a - b), 4 - abs(a - b)) for a, b in zip(one.coords, other.coords)) == 1
            )


REFUSED = [
    (dict(uome={**ROUTING, "n_experts": 6}, d_hidden=96), dict(expert=4), "model.uome.n_experts=6: 1, 2, 3, 6"),
    (DENSE, dict(expert=16), "model.n_heads=8: 1, 2, 4, 8"),
    ({**DENSE, "n_kv_heads": 4}, dict(expert=8), "model.n_kv_heads=4: 1, 2, 4"),
    ({**DENSE, "d_hidden": 60}, dict(expert=8), "model.d_hidden=60: 1, 2, 3, 4, 5, 6, 10"),
    (dict(d_model=24, n_heads=8, position="none"), dict(fsdp=16), "model.d_model=24: 1, 2, 3, 4, 6, 8, 12, 24"),
    (dict(context_length=36), dict(expert=8, sequence_parallel=True), "model.context_length=36: 1, 2, 3, 4, 6, 9"),
    (dict(), dict(data=64), "train.batch_size / train.accumulation=16: 1, 2, 4, 8, 16"),
]  # fmt: skip


@pytest.mark.parametrize(
    "model, sizes, sentence", REFUSED, ids=[sentence.split(":")[0] for *_, sentence in REFUSED]
)
def test_sizes_that_do_not_fit_are_refused_with_the_numbers(model, sizes, sentence):
    """Given as they are when the configuration is read; else once the devices are known."""
    values = {"model": {**MESH_MODEL, **model}, "train": {"batch_size": 16}}
    (axis,) = set(sizes) - {"sequence_parallel"}
    sentence = f"config.mesh.{axis}={sizes[axis]}: .*must divide {sentence}"
    with pytest.raises(ConfigError, match=sentence):
        from_dict({**values, "mesh": {**ONE, **sizes}})
    config = from_dict({**values, "mesh": {**ONE, **sizes, axis: -1}})
    with pytest.raises(ConfigError, match=sentence):
        build(config, mesh_lib.abstract_mesh(config.mesh, sizes[axis]))


def test_a_token_in_front_cannot_be_cut_with_the_others():
    model = {**MESH_MODEL, "task": "classify", "causal": False, "classifier": {"pooling": "cls"}}
    with pytest.raises(
        ConfigError, match="config.mesh.sequence_parallel=True: .*use classifier.pooling='mean'"
    ):
        from_dict({"model": model, "mesh": sized(expert=2, sequence_parallel=True)})


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(
        ConfigError, match="config.mesh.data=3: the mesh .* needs 3 devices and there are 8"
    ):
        mesh_lib.sizes(MeshConfig(data=3), 8)
    with pytest.raises(
        ConfigError,
        match="config.mesh.expert=3: the mesh .* needs a multiple of 3 devices and there are 8",
    ):
        mesh_lib.sizes(MeshConfig(expert=3), 8)
    assert mesh_lib.sizes(MeshConfig(expert=2, fsdp=2), 8) == dict(
        replica=1, data=2, fsdp=2, expert=2
    )


def test_a_weight_whose_axes_fall_on_one_of_the_mesh_is_refused():
    mesh = mesh_lib.abstract_mesh(MeshConfig(data=1, expert=2, fsdp=2), 4)
    with pytest.raises(ValueError, match="two axes of a weight"):
        mesh_lib.weight_spec(mesh, ("expert", "hidden"), (4, 4))
    with pytest.raises(ValueError, match="'heads' of size 3 cannot be cut in 2"):
        mesh_lib.weight_spec(mesh, ("heads",), (3,))
    assert mesh_lib.weight_spec(mesh, ("vocab", "embed"), (3, 4)) == jax.P(None, "fsdp")

"""The adaptive softmax against a dense reference of a few lines, on meshes, in memory, and in decoding."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import slow
from small_models import MODEL, ONE, assert_same_training, batch, program_on, sized

from uoe_jax import RoutingConfig
from uoe_jax.config import MeshConfig, ModelConfig, from_dict
from uoe_jax.config.validate import check_cutoffs
from uoe_jax.costs.flops import forward_flops, tail_shares, vocabulary_flops
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.errors import ConfigError
from uoe_jax.layers import tiles
from uoe_jax.layers.adaptive import AdaptiveHead, embed, make_vocabulary
from uoe_jax.layers.weights import scaled_normal, weight
from uoe_jax.models.decoder import Transformer
from uoe_jax.plan.hlo import collectives

V, D, CUTOFFS = 32, 16, (7, 12, 25)
BASE = ModelConfig(
    vocab_size=V,
    d_model=D,
    n_layers=1,
    n_heads=4,
    d_hidden=32,
    context_length=24,
    cutoffs="7,12,25",
)
R = RoutingConfig(n_experts=4, k=2, capacity_window=8)
BASE = dataclasses.replace(BASE, smha=R, uome=R)
KINDS = {
    f"div {div}, {'tied' if tied else 'untied'}": dataclasses.replace(BASE, cutoff_div=div, tie_embeddings=tied)
    for div in (1, 2) for tied in (True, False)
}  # fmt: skip
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Few tokens at once, so that small tests take several turns and end inside one."""
    monkeypatch.setattr(tiles, "LEAST_CHUNK", 16)
    monkeypatch.setattr(tiles, "CHUNK_SCORES", 1)


class Ends(nnx.Module):
    """An embedding, and the adaptive head on it."""

    def __init__(self, c: ModelConfig, rngs: nnx.Rngs) -> None:
        self.words, self.head = make_vocabulary(c, rngs=rngs), AdaptiveHead(c, rngs=rngs)


def ends(c: ModelConfig):
    return reference.build(lambda: Ends(c, nnx.Rngs(0)))


def dense_words(words, width: int) -> jax.Array:
    """The vectors of all entries, [V,D], narrow ones through their projections."""
    if not isinstance(words, dict):
        return words
    wide = [words[f"table_{i}"] @ words[f"projection_{i}"].T for i in range(1, len(CUTOFFS) + 1)]
    return jnp.concatenate([words["table_0"], *wide])


def dense_log_p(weights: dict, x: jax.Array) -> jax.Array:
    """log p(word) [...,V] of states x [...,D], word by word from the definition."""
    words = dense_words(weights["head"].get("words", weights["words"]), x.shape[-1])
    scores, tails = x @ words.T, x @ weights["head"]["tails"].T
    first = jax.nn.log_softmax(jnp.concatenate([scores[..., : CUTOFFS[0]], tails], -1))
    out = [first[..., : CUTOFFS[0]]]
    for i, (a, b) in enumerate(zip(CUTOFFS, (*CUTOFFS[1:], V))):
        out.append(jax.nn.log_softmax(scores[..., a:b]) + first[..., CUTOFFS[0] + i, None])
    return jnp.concatenate(out, -1)


def states(rows: int, length: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """(states [B,L,D], targets [B,L])."""
    targets = np.random.default_rng(seed).integers(0, V, (rows, length), np.int32)
    return reference.normal(seed, rows, length, D), jnp.asarray(targets)


# --- the function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, length", [*((kind, 19) for kind in KINDS), ("div 2, tied", 16), ("div 1, untied", 3)]
)
def test_losses_and_gradients_are_those_of_the_dense_reference(kind, length):
    """Chunks that end where the tokens do, that do not, and one that is longer than all tokens."""
    graphdef, state = ends(KINDS[kind])
    x, targets = states(3, length)
    weigh = reference.normal(9, 3, length)  # another weight for every token

    def found(state, x):
        module = nnx.merge(graphdef, state)
        nll = module.head.nll(x, targets, module.words)
        return (nll * weigh).sum(), nll

    def wanted(weights, x):
        nll = -jnp.take_along_axis(dense_log_p(weights, x), targets[..., None], -1)[..., 0]
        return (nll * weigh).sum(), nll

    (gradients, nll), (dense, dense_nll) = (
        reference.jit(jax.grad(f, argnums=(0, 1), has_aux=True))(w, x)
        for f, w in ((found, state), (wanted, reference.weights_of(state)))
    )
    assert reference.error(nll, dense_nll) < 1e-5
    assert reference.error((reference.weights_of(gradients[0]), gradients[1]), dense) < 1e-5


@kinds
def test_probabilities_are_those_of_the_dense_reference_and_sum_to_one(kind):
    graphdef, state = ends(KINDS[kind])
    x_BLD, _ = states(2, 5)
    for x in (x_BLD, x_BLD[:, 0]):
        log_p = reference.jit(lambda state, x: (m := nnx.merge(graphdef, state)).head(x, m.words))(
            state, x
        )
        np.testing.assert_allclose(jnp.exp(log_p).sum(-1), 1, rtol=1e-5)
        assert (
            log_p.dtype == jnp.float32
            and reference.error(log_p, dense_log_p(reference.weights_of(state), x)) < 1e-5
        )


@pytest.mark.parametrize("div", [1, 2])
def test_ids_are_looked_up_in_their_piece(div):
    c = dataclasses.replace(BASE, cutoff_div=div)
    graphdef, state = ends(c)
    every = jnp.arange(V, dtype=jnp.int32)[::-1]
    for ids in (every.reshape(2, -1), every):
        found = embed(nnx.merge(graphdef, state).words, ids, "float32")
        assert (
            reference.error(found, dense_words(reference.weights_of(state)["words"], D)[ids]) < 1e-6
        )


def test_a_tail_that_no_word_is_in_is_not_scored():
    """Weights that are not numbers would show, in losses or gradients, were the tail scored and then masked."""
    graphdef, state = ends(dataclasses.replace(BASE, cutoff_div=2))
    state["words"]["table_2"] = state["words"]["table_2"].replace(jnp.full((13, 4), jnp.nan))
    x, targets = states(2, 24)
    targets = jnp.where((targets >= 12) & (targets < 25), 3, targets)

    def loss(state, x, targets):
        module = nnx.merge(graphdef, state)
        return module.head.nll(x, targets, module.words).sum()

    f = reference.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (gradients, dx) = f(state, x, targets)
    assert (
        np.isfinite(value)
        and np.isfinite(dx).all()
        and all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    )
    assert not np.asarray(gradients["words"]["table_2"][...]).any()
    assert np.isnan(f(state, x, targets.at[0, 0].set(12))[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_short_dtype_is_close(dtype):
    """Gradients too, also where the mean is over so many tokens that a token's share is below what float16 can say."""
    graphdef, state = ends(dataclasses.replace(BASE, cutoff_div=2))
    x, targets = states(4, 32)

    def gradient(x):
        def loss(state, x):
            module = nnx.merge(graphdef, state)
            nll = module.head.nll(x, targets, module.words)
            assert nll.dtype == jnp.float32
            return nll.mean() * 1e-6

        value, (gradients, dx) = reference.jit(jax.value_and_grad(loss, argnums=(0, 1)))(state, x)
        return value, gradients, dx.dtype

    value, gradients, dx_dtype = gradient(x.astype(dtype))
    exact, exact_gradients, _ = gradient(x)
    assert float(value) == pytest.approx(float(exact), rel=5e-3) and dx_dtype == dtype
    assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    for name in ("table_0", "table_1", "table_2", "table_3"):
        assert (
            reference.error(gradients["words"][name][...], exact_gradients["words"][name][...])
            < 2e-2
        )


@pytest.mark.parametrize("kind", ["one table", "cut over expert", "pieces"])
def test_the_gradient_of_a_frequent_word_is_summed_in_float32(kind):
    """4096 tokens, nine of ten alike: in bfloat16 a sum stops growing after 256 of them."""
    c = dataclasses.replace(BASE, cutoff_div=2 if kind == "pieces" else 1)
    words = (
        make_vocabulary(c, rngs=nnx.Rngs(0))
        if kind != "cut over expert"
        else weight(nnx.Rngs(0), (V, D), ("vocab", "embed"), scaled_normal(D))
    )
    graphdef, state = nnx.split(words)
    ids = np.random.default_rng(0).integers(0, V, (8, 512)) * (
        np.random.default_rng(1).random((8, 512)) > 0.9
    )
    d = jnp.abs(reference.normal(2, 8, 512, D))

    def gradient(dtype):
        def loss(state):
            return (
                embed(nnx.merge(graphdef, state), jnp.asarray(ids), dtype).astype(jnp.float32) * d
            ).sum()

        with (
            jax.set_mesh(mesh_lib.make_mesh(MeshConfig(data=2, fsdp=2, expert=2)))
            if kind == "cut over expert"
            else contextlib.nullcontext()
        ):
            return jax.tree.leaves(reference.jit(jax.grad(loss))(state))

    assert all(
        reference.error(*pair) < 1e-2
        for pair in zip(gradient("bfloat16"), gradient("float32"), strict=True)
    )


def test_the_scores_of_all_tokens_never_exist_at_once(monkeypatch):
    """Temporary memory of a loss and its gradients: a quarter of the logits of 8192 tokens x 50,000."""
    monkeypatch.setattr(tiles, "LEAST_CHUNK", 512)
    c = dataclasses.replace(BASE, vocab_size=50_000, d_model=64, cutoffs="4000,20000")
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Ends(c, nnx.Rngs(0))))
    x, targets = (
        jax.ShapeDtypeStruct((16, 512, 64), jnp.float32),
        jax.ShapeDtypeStruct((16, 512), jnp.int32),
    )

    def loss(state, x, targets):
        module = nnx.merge(graphdef, state)
        return module.head.nll(x, targets, module.words).mean()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x, targets).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8192 * 50_000 * 4 / 4


# --- in the model -----------------------------------------------------------------------------------------------


@kinds
def test_the_loss_of_the_model_is_its_log_probability(kind):
    graphdef, state = reference.build(lambda: Transformer(KINDS[kind], rngs=nnx.Rngs(0)))
    _, tokens = states(3, 24)
    targets = jnp.roll(tokens, -1, 1)
    log_p, _ = reference.jit(lambda state: nnx.merge(graphdef, state)(tokens))(state)
    nll, stats = reference.jit(lambda state: nnx.merge(graphdef, state).nll(tokens, targets))(state)
    assert reference.error(nll, -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]) < 1e-5
    assert set(stats) == {"smha", "uome"}


def test_without_cutoffs_the_loss_is_the_softmax_of_the_logits():
    graphdef, state = reference.build(
        lambda: Transformer(dataclasses.replace(BASE, cutoffs=""), rngs=nnx.Rngs(0))
    )
    _, tokens = states(3, 24)
    logits, nll = reference.jit(
        lambda state: ((m := nnx.merge(graphdef, state))(tokens)[0], m.nll(tokens, tokens)[0])
    )(state)
    assert (
        reference.error(
            nll, -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]
        )
        < 1e-5
    )


@pytest.mark.parametrize("kind", ["div 1, tied", "div 2, untied"])
def test_decoding_gives_the_full_pass(kind):
    graphdef, state = reference.build(lambda: Transformer(KINDS[kind], rngs=nnx.Rngs(0)))

    def jitted(method, **kwargs):
        return functools.partial(
            jax.jit(lambda state, *args: method(nnx.merge(graphdef, state), *args, **kwargs)), state
        )

    full, prefill, step = (
        jitted(Transformer.__call__),
        jitted(Transformer.prefill, context=24),
        jitted(Transformer.decode_step),
    )
    rows, lengths, each = np.asarray(states(3, 24)[1]), np.array([8, 5, 1], np.int32), np.arange(3)
    wanted = np.asarray(full(rows)[0])
    got, cache = prefill(rows[:, :8], lengths)
    for offset in range(16):
        np.testing.assert_allclose(
            got, wanted[each, lengths + offset - 1], rtol=0, atol=1e-5 * np.abs(wanted).max()
        )
        got, cache = step(rows[each, lengths + offset], cache)


@kinds
def test_weights_are_decayed_and_start_at_the_size_of_one_table(kind):
    c = dataclasses.replace(KINDS[kind], vocab_size=3000, cutoffs="500,1000,2000", d_model=64)
    state = nnx.state(Transformer(c, rngs=nnx.Rngs(0)))
    words = {path: w for path, w in nnx.to_flat_state(state) if path[0] in ("embedding", "head")}
    assert (
        len(words)
        == {1: 2 if c.tie_embeddings else 3, 2: 8 if c.tie_embeddings else 15}[c.cutoff_div]
    )
    assert all(w.decay for w in words.values())
    model = Transformer(c, rngs=nnx.Rngs(0))
    x = np.asarray(embed(model.embedding, jnp.arange(3000, dtype=jnp.int32), "float32"))
    for a, b in ((0, 500), (500, 1000), (1000, 2000), (2000, 3000)):
        assert x[a:b].std() == pytest.approx(64**-0.5, rel=0.2)


# --- on a mesh --------------------------------------------------------------------------------------------------

MESHED = {
    "tied": dict(cutoffs="8,20"),
    "narrow, untied": dict(cutoffs="8,20", cutoff_div=2, tie_embeddings=False),
    "rows that the axis does not divide": dict(
        cutoffs="5", cutoff_div=2, context_length=30, vocab_size=33
    ),
}
MESHES = [
    ("rows that the axis does not divide", sized(1, 1, 2, 4)),
    ("tied", sized(1, 1, 1, 8)),
    ("tied", sized(2, 2, 1, 2, True)),
    ("narrow, untied", sized(1, 1, 2, 4, True)),
    ("narrow, untied", sized(2, 1, 2, 2)),
]


def train(name: str, sizes: dict):
    """(initial parameters, losses and gradient norms) of 3 steps."""
    model = MESHED[name]
    program, mesh = program_on(sizes, model=dict(model))
    with jax.set_mesh(mesh):
        state, found = program.init(jax.random.key(0)), []
        rows = mesh_lib.put_batch(mesh, batch(rows=8, length=model.get("context_length", 32)))
        first = jax.device_get(state.params)
        for _ in range(3):
            state, metrics = program.train_step(state, rows)
            found += [float(metrics["sums"].nll), float(metrics["grad_norm"])]
    return first, np.array(found)


on_one_device = functools.cache(lambda name: train(name, ONE))


@pytest.mark.slow
@pytest.mark.parametrize("name, sizes", MESHES, ids=str)
def test_every_mesh_gives_the_same_run(name, sizes):
    """The same initial parameters bit for bit, losses and gradient norms to 1e-5."""
    assert_same_training(on_one_device(name), train(name, sizes))


@pytest.mark.parametrize("sequence_parallel", [False, slow(True)])
@pytest.mark.parametrize("name", ["tied", slow("narrow, untied")])
def test_only_weights_and_states_cross_devices(name, sequence_parallel):
    """Outside the layers: over the batch axes weights only; over `expert` at most the gradient of the last states [b,L,D]."""
    program, mesh = program_on(
        sized(1, 2, 2, 2, sequence_parallel), model={**MESHED[name], "vocab_size": 48}
    )
    found = collectives(
        program.train_step.lower(program.abstract, program.abstract_batch).compile().as_text(),
        mesh.shape,
    )
    assert {c.kind for c in found} <= {"all-reduce", "all-gather", "reduce-scatter"}
    ends = [c for c in found if c.times == 1]  # the two layers run twice
    exchanged = [(c.kind, c.axes, c.result.shape) for c in ends if len(c.result.shape) == 3]
    assert exchanged == ([] if sequence_parallel else [("all-gather", ("expert",), (2, 32, 32))])
    assert all(
        c.axes == ("fsdp",) for c in ends if c.kind != "all-reduce" and len(c.result.shape) == 2
    ), ends
    scored = (8 + 2, 12, 28)  # scores of a chunk have these widths, and no weight has
    assert not any(
        a.shape[-1:] and a.shape[-1] in scored for c in found for a in (c.operand, c.result)
    ), found
    inside = [c for c in found if c.times > 1 and c.axes == ("expert",) and c.kind == "all-gather"]
    assert (
        bool(inside) == sequence_parallel
    )  # the layers exchange what they do without an adaptive softmax


# --- counting and refusing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("div", [1, 4])
def test_operations_of_all_scores_are_the_compilers(div):
    c = dataclasses.replace(BASE, vocab_size=4096, d_model=512, cutoffs="256,1024", cutoff_div=div)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Ends(c, nnx.Rngs(0))))
    x, ids = (
        jax.ShapeDtypeStruct((1, 128, 512), jnp.float32),
        jax.ShapeDtypeStruct((1, 128), jnp.int32),
    )

    def scores(state, x, ids):
        module = nnx.merge(graphdef, state)
        return module.head(x, module.words), embed(module.words, ids, "float32")

    counted = jax.jit(scores).lower(state, x, ids).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(vocabulary_flops(c, 128, shares=(1, 1)), rel=0.05)


def test_tails_have_the_shares_of_zipfs_law():
    c = dataclasses.replace(BASE, vocab_size=267_735, cutoffs="20000,40000,200000", n_layers=2)
    share = 1 / np.arange(1, c.vocab_size + 1)
    share /= share.sum()
    wanted = [
        share[a:b].sum() for a, b in ((20_000, 40_000), (40_000, 200_000), (200_000, 267_735))
    ]
    np.testing.assert_allclose(tail_shares(c), wanted, rtol=1e-3)
    more = vocabulary_flops(c, 24) - 2 * 24 * D * 20_003
    assert more == pytest.approx(2 * 24 * D * np.dot(wanted, (20_000, 160_000, 67_735)), rel=1e-3)
    plain = dataclasses.replace(c, cutoffs="")
    assert forward_flops(plain) - forward_flops(c) == pytest.approx(
        2 * 24 * D * c.vocab_size - vocabulary_flops(c, 24)
    )


REFUSED = [
    (dict(cutoffs="a"), "cutoffs='a': .*whole numbers with commas"),
    (dict(cutoffs="10,,20"), "cutoffs='10,,20': .*whole numbers"),
    (dict(cutoffs="10,-20"), "cutoffs='10,-20': .*whole numbers"),
    (dict(cutoffs="1e3"), "cutoffs='1e3': .*whole numbers"),
    (dict(cutoffs="9" * 5000), "whole numbers"),
    (dict(cutoffs="²"), "cutoffs='²': .*whole numbers"),
    (dict(cutoffs="10,10"), "cutoffs='10,10': .*larger than the one before"),
    (dict(cutoffs="20,10"), "cutoffs='20,10': .*larger than the one before"),
    (dict(cutoffs="0,10"), "cutoffs='0,10': .*the first at least 1"),
    (dict(cutoffs="10,32", vocab_size=32), "cutoffs='10,32': the vocabulary has 32 entries"),
    (dict(cutoffs="10", task="classify"), "cutoffs='10': a classifier has no vocabulary"),
    (dict(cutoff_div=2), "cutoff_div=2: is for model.cutoffs; give those, or use 1"),
    (dict(cutoffs="4,8,16", cutoff_div=4), "cutoff_div=4: cutoff_div to the power of 3, .*d_model=32: 1, 2, 4"),
    (dict(cutoffs="4,8", cutoff_div=2**31 - 1), "cutoff_div=2147483647"),
]  # fmt: skip


@pytest.mark.parametrize(
    "changes, sentence", REFUSED, ids=[sentence[:30] for _, sentence in REFUSED]
)
def test_what_makes_no_pieces_is_refused(changes, sentence):
    with pytest.raises(ConfigError, match=f"config.model.*{sentence}"):
        from_dict({"model": {**MODEL, "vocab_size": 0, **changes}, "mesh": ONE})


def test_a_vocabulary_that_is_known_later_is_checked_then():
    """With model.vocab_size=0 the vocabulary is counted first; spaces between the numbers are allowed."""
    c = from_dict({"model": {**MODEL, "vocab_size": 0, "cutoffs": "10, 40"}, "mesh": ONE}).model
    assert c.cutoff_list == (10, 40)
    check_cutoffs(c, 41)
    for refuse in (
        check_cutoffs,
        lambda c, n: Transformer(dataclasses.replace(c, vocab_size=n), rngs=nnx.Rngs(0)),
    ):
        with pytest.raises(
            ConfigError, match="config.model.cutoffs='10, 40': the vocabulary has 40 entries"
        ):
            refuse(c, 40)


def test_pieces_too_narrow_for_the_mesh_are_refused():
    model = {**MODEL, "cutoffs": "4,8,16", "cutoff_div": 2}
    with pytest.raises(
        ConfigError,
        match=r"config.mesh.fsdp=8: must divide model.d_model / model.cutoff_div\*\*3=4: 1, 2, 4",
    ):
        from_dict({"model": model, "train": {"batch_size": 8}, "mesh": {"data": 1, "fsdp": 8}})

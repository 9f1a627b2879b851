"""Our language models in PyTorch (uoe_jax/exchange/hf-code/modeling_uoe.py) give the logits and the text that they give in JAX."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from uoe_jax import config as config_lib
from uoe_jax.errors import ConfigError
from uoe_jax.exchange.exporting import Export, export_routed
from uoe_jax.train.step import functional

pytestmark = pytest.mark.parity

LENGTH = 45  # three quarters of a patch beyond the last whole one, where P = 4
MODEL = dict(
    vocab_size=67,
    d_model=32,
    n_layers=2,
    n_heads=8,
    d_hidden=48,
    context_length=48,
    tie_embeddings=False,
)
ROUTING = dict(n_experts=4, k=2, capacity_window=16)
SMALL_PATCH = dict(
    ROUTING, capacity_factor=0.8, capacity_window=10
)  # the last window is not a whole one
LARGE_PATCH = dict(ROUTING, patch_size=4, capacity_window=5)

# name: (keys of the model, routing of its unions)
CASES = {
    "default": ({}, ROUTING),
    "one window": ({}, dict(ROUTING, capacity_window=64, capacity_factor=0.7)),
    "windows of one": ({}, dict(ROUTING, capacity_window=1, k=3)),
    "patches": (dict(n_kv_heads=4, activation="swiglu"), LARGE_PATCH),
    "patches, everything": (
        dict(
            n_kv_heads=4,
            activation="geglu",
            norm="layernorm",
            bias=True,
            qk_norm=True,
            position="learned",
            tie_embeddings=True,
        ),
        dict(LARGE_PATCH, router_bias=True, bias_rate=0.01, gate="normalized"),
    ),
    "everything": (
        dict(n_kv_heads=4, activation="swiglu", norm="layernorm", bias=True, qk_norm=True),
        dict(SMALL_PATCH, router_bias=True, bias_rate=0.01, order="project"),
    ),
    "normalized": (
        dict(activation="geglu", tie_embeddings=True),
        dict(SMALL_PATCH, gate="normalized", k=3),
    ),
    "score": (
        dict(activation="relu", position="learned", bias=True),
        dict(SMALL_PATCH, gate="score", k=1),
    ),
    "straight through": (
        dict(activation="gelu_tanh", norm="layernorm"),
        dict(SMALL_PATCH, gate="straight_through"),
    ),
    # 0.56 * 25 is 14 as decimals and more than 14 as binary numbers: one slot too many in every window.
    "no gate": (
        dict(position="none"),
        dict(ROUTING, capacity_factor=0.56, capacity_window=25, gate="none", bias_rate=0.1),
    ),
    "all experts": (dict(rope_theta=100.0), dict(SMALL_PATCH, k=4)),
    "eight experts": (dict(bias=True), dict(SMALL_PATCH, n_experts=8, k=3, router_bias=True)),
    "as qwen2 and llama 3": (
        dict(qkv_bias=True, n_kv_heads=4, activation="swiglu", rope_scaling="8,1,4,16"),
        SMALL_PATCH,
    ),
    "smha": (dict(mlp="dense", activation="swiglu", bias=True), SMALL_PATCH),
    "uome": (dict(attention="dense", n_kv_heads=2, bias=True, qk_norm=True), LARGE_PATCH),
    "dense": (dict(attention="dense", mlp="dense", n_kv_heads=1), ROUTING),
}


def configure(case: str) -> config_lib.Config:
    model, routing = CASES[case]
    return config_lib.from_dict({"model": {**MODEL, **model, "smha": routing, "uome": routing}})


def draw(config: config_lib.Config, seed: int = 0) -> dict:
    """Parameters of which none is 0 or 1, and routers that choose differently from patch to patch."""
    rng = np.random.default_rng(seed)

    def leaf(path, a):
        name = path[-1].key
        spread = {"load_bias": 0.1, "kernel": 0.5}.get(name, 0.3)
        return np.asarray(name.endswith("scale") + spread * rng.normal(size=a.shape), a.dtype)

    init, _, _ = functional(config.model)
    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(init, jax.random.key(0)))


def named(params: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(a) for path, a in leaves
    }


def write(folder: pathlib.Path, config: config_lib.Config, params: dict) -> pathlib.Path:
    """A directory that transformers loads."""
    folder.mkdir()
    how = epath.Path(folder), "float32", False, epath.Path("none")
    export_routed(Export(config, params, None, *how))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(written | {"bos_token_id": 0, "eos_token_id": 0})
    )  # those of a tokenizer
    return folder


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """(folder, options) -> the model as transformers loads it; its copies of our code stay in the test's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import transformers

        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
        yield lambda folder, **options: transformers.AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, **options
        ).eval()


def tokens(rows: int, length: int, seed: int = 1) -> np.ndarray:
    return (
        np.random.default_rng(seed)
        .integers(1, MODEL["vocab_size"], (rows, length))
        .astype(np.int32)
    )


def jax_logits(
    config: config_lib.Config, params: dict, ids: np.ndarray, segments: np.ndarray | None = None
):
    """(logits, statistics of the routed blocks)."""
    _, rebuild, _ = functional(config.model)
    return jax.jit(lambda p, t, s: rebuild(p)(t, s))(params, ids, segments)


def torch_logits(model, ids: np.ndarray, **more) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids).long(), **more).logits.numpy()


def difference(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


@pytest.mark.parametrize("case", CASES)
def test_logits(case, load, tmp_path):
    config = configure(case)
    params, ids = draw(config), tokens(3, LENGTH)
    logits, stats = jax_logits(config, params, ids)
    assert set(stats) == set(config.model.unions())
    for (
        name,
        routing,
    ) in config.model.unions().items():  # otherwise the case would not tell what it is for
        drops = stats[name].chosen_N.sum() - stats[name].kept_N.sum()
        assert (drops > 0) == (routing.window_capacity() < routing.capacity_window), name
        assert np.ptp(stats[name].chosen_N) > 0 or routing.k == routing.n_experts
    model = load(write(tmp_path / "model", config, params))
    assert {name: tuple(a.shape) for name, a in model.state_dict().items()} == {
        k: a.shape for k, a in named(params).items()
    }
    assert difference(torch_logits(model, ids), logits) < 1e-4


@pytest.mark.parametrize("case", ["default", "patches"])
def test_every_length(case, load, tmp_path):
    """A prefix has the logits it has in the whole row, as in JAX."""
    config = configure(case)
    params, ids = draw(config), tokens(2, LENGTH)
    logits, _ = jax_logits(config, params, ids)
    model = load(write(tmp_path / "model", config, params))
    for length in (1, 2, 3, 4, 5, 16, 17, 21, 44):
        assert difference(torch_logits(model, ids[:, :length]), logits[:, :length]) < 1e-4, length


def test_ties_go_to_the_lower_index(load, tmp_path):
    """Routers of zeros, and one with two equal columns: the choice is among equals."""
    config = configure("eight experts")
    params, ids = draw(config), tokens(2, LENGTH)
    for block in ("attention", "mlp"):
        router = params["layers"][block]["router"]
        router["kernel"][0], router["bias"][0] = 0, 0
        router["kernel"][1, :, 5] = router["kernel"][1, :, 2]
        router["bias"][1, 5] = router["bias"][1, 2]
    logits, stats = jax_logits(config, params, ids)
    assert (stats["uome"].chosen_N[0, 3:] == 0).all() and stats["uome"].chosen_N[1, 5] < stats[
        "uome"
    ].chosen_N[1, 2]
    assert (
        difference(torch_logits(load(write(tmp_path / "model", config, params)), ids), logits)
        < 1e-4
    )


@pytest.mark.parametrize("case", ["default", "patches, everything"])
def test_padding(case, load, tmp_path):
    """On the right it changes nothing before it; elsewhere it is refused, as are more tokens than the context."""
    import torch

    config = configure(case)
    params, ids = draw(config), tokens(3, LENGTH)
    model = load(write(tmp_path / "model", config, params))
    lengths = np.array([LENGTH, 30, 7])
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    logits = torch_logits(model, ids * mask, attention_mask=torch.from_numpy(mask))
    expected, _ = jax_logits(config, params, ids * mask, mask)
    for row, n in enumerate(lengths):
        assert difference(logits[row, :n], expected[row, :n]) < 1e-4
        assert difference(logits[row, :n], torch_logits(model, ids[row : row + 1, :n])[0]) < 1e-5
    with pytest.raises(ValueError, match="pad on the right"):
        torch_logits(model, ids, attention_mask=torch.from_numpy(mask[:, ::-1].copy()))
    with pytest.raises(ValueError, match="the context holds 48"):
        torch_logits(model, tokens(1, 49))


@pytest.mark.parametrize("case", ["default", "patches"])
def test_generate(case, load, tmp_path):
    """Greedy text is that of JAX's argmax over the whole row again and again, past capacity windows."""
    import torch

    config = configure(case)
    params, prompt, more = draw(config), tokens(2, 9), 22
    _, rebuild, _ = functional(config.model)
    forward = jax.jit(lambda p, row: rebuild(p)(row)[0])
    row = (
        jnp.zeros((2, 31), jnp.int32).at[:, :9].set(prompt)
    )  # what follows changes nothing: the model is causal
    for t in range(9, 9 + more):
        row = row.at[:, t].set(forward(params, row)[:, t - 1].argmax(axis=-1))
    model = load(write(tmp_path / "model", config, params))
    assert model.generation_config.eos_token_id == 0
    options = dict(max_new_tokens=more, do_sample=False, eos_token_id=None, pad_token_id=0)
    out = model.generate(torch.from_numpy(prompt).long(), **options)
    assert len(np.unique(row)) > 10  # and no text of one token over and over
    np.testing.assert_array_equal(out.numpy(), row)
    beams = model.generate(
        torch.from_numpy(prompt).long(), **options | dict(num_beams=3, max_new_tokens=4)
    )
    assert beams.shape == (2, 13)


def test_round_trip(load, tmp_path):
    """save_pretrained writes what we wrote: names, values, configuration, code."""
    from safetensors.numpy import load_file

    config = configure("everything")
    params, ids = draw(config), tokens(2, LENGTH)
    first = load(write(tmp_path / "first", config, params))
    first.save_pretrained(tmp_path / "second")
    saved, expected = load_file(tmp_path / "second" / "model.safetensors"), named(params)
    assert set(saved) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(saved[name], value)
    written = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config_lib.from_dict({"model": written["model"]}).model == config.model
    second = load(tmp_path / "second")
    np.testing.assert_array_equal(torch_logits(second, ids), torch_logits(first, ids))


def test_labels(load, tmp_path):
    """The loss is the mean cross entropy of the next token where labels count, and every weight but load_bias has a gradient."""
    import torch

    config = configure("everything")
    params, ids = draw(config), tokens(2, LENGTH)
    model = load(write(tmp_path / "model", config, params))
    labels = torch.from_numpy(ids).long()
    labels[:, 40:] = -100
    loss = model(torch.from_numpy(ids).long(), labels=labels).loss
    loss.backward()
    _, rebuild, _ = functional(config.model)
    nll, _ = jax.jit(lambda p: rebuild(p).nll(ids[:, :39], ids[:, 1:40]))(params)
    assert difference(loss.item(), nll.mean()) < 1e-4
    gradients = {name: w.grad for name, w in model.named_parameters()}
    assert set(gradients) == {name for name in named(params) if not name.endswith("load_bias")}
    assert all(g is not None and bool(g.abs().max() > 0) for g in gradients.values())


def test_low_precision(load, tmp_path):
    """Routers and norms stay float32 in a bfloat16 model, and routing is in float32 under autocast too."""
    import torch

    config = configure("default")
    params, ids = draw(config), tokens(2, LENGTH)
    folder = write(tmp_path / "model", config, params)
    exact, model = load(folder), load(folder, dtype=torch.bfloat16)
    whole = {name for name, w in model.named_parameters() if w.dtype == torch.float32}
    assert whole == {name for name in named(params) if "router" in name or "norm" in name}
    assert model.layers.attention.w_q.dtype == torch.bfloat16
    expected = torch_logits(exact, ids)
    error = np.abs(torch_logits(model, ids) - expected).max(axis=-1) / np.abs(expected).max()
    assert (
        np.median(error) < 0.05
    )  # rounding of the states turns near ties: not all tokens are close
    route = sys.modules[type(exact).__module__].route
    w, x_BLD = exact.layers.attention.router.weights(0), torch.randn(2, LENGTH, 32)
    routing = exact.config.model["smha"]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = route(w, x_BLD, routing)
    assert all(map(torch.equal, under_autocast, route(w, x_BLD, routing)))


@pytest.mark.parametrize(
    "change, name",
    [
        (dict(causal=False), "causal"),
        (dict(attention="mla"), "attention"),
        (dict(cutoffs="10"), "cutoffs"),
        (dict(vocab_size=0), "vocab_size"),
    ],
)
def test_what_it_does_not_have_is_refused(change, name, load, tmp_path):
    config = configure("default")
    file = write(tmp_path / "model", config, draw(config)) / "config.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | {"model": written["model"] | change}))
    with pytest.raises(ValueError, match=rf"config\.model\.{name}="):
        load(file.parent)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    if name != "vocab_size":  # nor does the export write it
        with pytest.raises(ConfigError, match=rf"config\.model\.{name}="):
            write(tmp_path / "other", other, {})

"""Dense models in and out: what `transformers` makes, imported with all experts, gives the same logits, and exported the same weights."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
import reference
from test_exchange import config_of, run_of

from uoe_jax import cli
from uoe_jax.data.tokenizer import ByteTokenizer
from uoe_jax.infer.sample import Sampler
from uoe_jax.train.restore import restored
from uoe_jax.workdir import read_config

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# {name: (config class, model class, config)}; small, and unlike each other in what families allow.
COMMON = dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
MODELS = {
    "llama": ("Llama", "ForCausalLM", dict(COMMON, num_key_value_heads=2)),
    "llama, tied, one head each": ("Llama", "ForCausalLM", dict(COMMON, tie_word_embeddings=True, hidden_act="gelu", rms_norm_eps=1e-5)),
    "llama 3": ("Llama", "ForCausalLM", dict(COMMON, num_key_value_heads=2, rope_parameters=LLAMA3)),
    "mistral": ("Mistral", "ForCausalLM", dict(COMMON, num_key_value_heads=2, sliding_window=None)),
    "qwen2": ("Qwen2", "ForCausalLM", dict(COMMON, num_key_value_heads=2, tie_word_embeddings=False)),
    "qwen2, tied": ("Qwen2", "ForCausalLM", dict(COMMON, num_key_value_heads=4, tie_word_embeddings=True)),
    "gpt2": ("GPT2", "LMHeadModel", dict(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)),
    "gpt2, narrow": ("GPT2", "LMHeadModel", dict(vocab_size=96, n_embd=32, n_layer=3, n_head=4, n_positions=64, n_inner=48, activation_function="relu", bos_token_id=0, eos_token_id=0)),
    "vit": ("ViT", "ForImageClassification", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4, num_labels=7)),
    "vit of grey images": ("ViT", "ForImageClassification", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=12, patch_size=6, num_channels=1, num_labels=3)),
}  # fmt: skip


def make(name: str, place, shards: str = "5GB"):
    """A model of `transformers` with every weight drawn, saved."""
    import torch
    import transformers

    kind, tail, values = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind + tail)(getattr(transformers, kind + "Config")(**values)).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():  # norms and biases are ones and zeros at first
            weight.copy_(torch.randn(weight.shape) * (0.3 if weight.ndim > 1 else 0.1) + ("norm" in key or "ln_" in key) * (weight.ndim == 1))
    model.save_pretrained(place, max_shard_size=shards)
    return model


def given(name: str):
    rng = np.random.default_rng(0)
    values = MODELS[name][2]
    if "image_size" in values:
        size = values["image_size"]
        return rng.normal(size=(8, values.get("num_channels", 3), size, size)).astype(np.float32)
    return rng.integers(0, 96, (8, 40))


def theirs(model, x) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(x)).logits.numpy()


def ours(workdir, x) -> np.ndarray:
    config = read_config(str(workdir))
    with restored(config, str(workdir)) as run:
        x = x.transpose(0, 2, 3, 1) if x.ndim == 4 else x.astype(np.int32)
        return np.asarray(jax.jit(lambda p, x: run.program.model(p)(x)[0])(run.params, x))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_in_and_goes_out(name, tmp_path):
    import transformers

    model = make(name, tmp_path / "hf", "20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    assert cli.main(["import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/run", "--experts=2", "--k=2"]) == 0
    x = given(name)
    wanted = theirs(model, x)
    assert reference.error(ours(tmp_path / "run", x), wanted) < 1e-4
    assert cli.main(["export", f"--workdir={tmp_path}/run", "--format=hf", f"--out={tmp_path}/out"]) == 0
    again = getattr(transformers, "AutoModel" + ("ForImageClassification" if x.ndim == 4 else "ForCausalLM")).from_pretrained(tmp_path / "out").eval()
    assert type(again) is type(model)
    assert reference.error(theirs(again, x), wanted) < 1e-5
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all((old[key] == new[key]).all() for key in old)  # bit for bit


def test_text_with_a_tokenizer_out_of_the_command_line(tmp_path, monkeypatch):
    """A byte-level run exported routed: `generate` of transformers continues a prompt as the JAX model does, through its tokenizer."""
    import torch
    import transformers

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    cut = dict(n_experts=4, k=2, capacity_window=16, capacity_factor=0.75)
    config = config_of(d_model=32, n_layers=2, n_heads=4, d_hidden=64, context_length=64, vocab_size=257, smha=cut, uome=cut)
    run_of(config, tmp_path / "run")
    assert cli.main(["export", f"--workdir={tmp_path}/run", "--format=hf", "--routed", f"--out={tmp_path}/out"]) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    text = "def f\u00e9(x):\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    prompt = torch.tensor([[tokenizer.bos_token_id, *ids]])
    found = model.generate(prompt, max_new_tokens=20, do_sample=False)[0, prompt.shape[1] :].tolist()
    with restored(config, str(tmp_path / "run")) as run:
        sampler = Sampler(dataclasses.replace(config, generate=dataclasses.replace(config.generate, max_tokens=20, temperature=0.0)),
                          run.program.model, run.params, ByteTokenizer())  # fmt: skip
        wanted = sampler.complete([text])[0]
    found = found[: found.index(256)] if 256 in found else found
    assert len(found) == wanted.n_tokens and tokenizer.decode(found) == wanted.text[len(text) :]

"""Dense models in and out: what `transformers` makes, imported with all experts, gives the same logits, and exported the same weights.

Exports are read by both majors of `transformers`: by 5 of this environment, and by 4 in a virtual environment of its own.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv

import jax
import numpy as np
import pytest
import reference
from conftest import CACHE
from exchange_runs import CUT, config_of, run_of
from filelock import FileLock
from helpers import ROOT, environment, write_source

from uoe_jax import cli
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.data.tokenizers.hf import HFTokenizer
from uoe_jax.infer.sample import Sampler
from uoe_jax.train.restore import restored
from uoe_jax.workdir import read_config

pytestmark = pytest.mark.parity


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# {name: (config class, model class, config)}; small, and unlike each other in what families allow.
COMMON = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
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
    model = getattr(transformers, kind + tail)(
        getattr(transformers, kind + "Config")(**values)
    ).eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():  # norms and biases are ones and zeros at first
            weight.copy_(
                torch.randn(weight.shape) * (0.3 if weight.ndim > 1 else 0.1)
                + ("norm" in key or "ln_" in key) * (weight.ndim == 1)
            )
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
    assert (
        cli.main(
            ["import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/run", "--experts=2", "--k=2"]
        )
        == 0
    )
    x = given(name)
    wanted = theirs(model, x)
    assert reference.error(ours(tmp_path / "run", x), wanted) < 1e-4
    assert (
        cli.main(["export", f"--workdir={tmp_path}/run", "--format=hf", f"--out={tmp_path}/out"])
        == 0
    )
    again = (
        getattr(
            transformers, "AutoModel" + ("ForImageClassification" if x.ndim == 4 else "ForCausalLM")
        )
        .from_pretrained(tmp_path / "out")
        .eval()
    )
    assert type(again) is type(model)
    assert reference.error(theirs(again, x), wanted) < 1e-5
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(
        (old[key] == new[key]).all() for key in old
    )  # bit for bit


def test_text_with_a_tokenizer_out_of_the_command_line(tmp_path, monkeypatch):
    """A byte-level run exported routed: `generate` of transformers continues a prompt as the JAX model does, through its tokenizer."""
    import torch
    import transformers

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(
        transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    cut = dict(n_experts=4, k=2, capacity_window=16, capacity_factor=0.75)
    config = config_of(
        d_model=32,
        n_layers=2,
        n_heads=4,
        d_hidden=64,
        context_length=64,
        vocab_size=257,
        smha=cut,
        uome=cut,
    )
    run_of(config, tmp_path / "run")
    assert (
        cli.main(
            [
                "export",
                f"--workdir={tmp_path}/run",
                "--format=hf",
                "--routed",
                f"--out={tmp_path}/out",
            ]
        )
        == 0
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    ).eval()
    text = "def f\u00e9(x):\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == [256, *text.encode()] and tokenizer.decode(ids, skip_special_tokens=True) == text
    prompt = torch.tensor([ids])
    found = model.generate(prompt, max_new_tokens=20, do_sample=False)[
        0, prompt.shape[1] :
    ].tolist()
    with restored(config, str(tmp_path / "run")) as run:
        sampler = Sampler(dataclasses.replace(config, generate=dataclasses.replace(config.generate, max_tokens=20, temperature=0.0)),
                          run.program.model, run.params, ByteTokenizer())  # fmt: skip
        wanted = sampler.complete([text])[0]
    found = found[: found.index(256)] if 256 in found else found
    assert len(found) == wanted.n_tokens and tokenizer.decode(found) == wanted.text[len(text) :]


OLDER = "4.57.6"  # the last of transformers 4


def make_environment(place) -> None:
    """A virtual environment with the older transformers; torch and the rest come from this environment."""
    venv.create(place, clear=True, symlinks=True)
    python = str(place / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*pip, f"transformers=={OLDER}"], check=True, timeout=600)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    own = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    with open(os.path.join(own, "shared.pth"), "w") as file:  # after its own packages
        file.write(sysconfig.get_path("purelib") + "\n")
    (place / "done").touch()


@pytest.fixture(scope="module")
def majors():
    """{major: interpreter} of transformers 5, which this runs with, and of 4."""
    place = CACHE / f"transformers-{OLDER}"
    with FileLock(f"{place}.lock"):  # two workers run this file's tests
        if not (place / "done").exists():
            make_environment(place)
    return {"4": str(place / "bin" / "python"), "5": sys.executable}


def ran(python: str, place, *args: str) -> str:
    env = environment(
        HF_HUB_OFFLINE="1", HF_MODULES_CACHE=str(place / f"modules_{python.count('4.57')}")
    )
    env.pop("PYTHONPATH")
    done = subprocess.run(
        [python, *args], cwd=place, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["llama 3", "mistral", "qwen2, tied", "gpt2", "vit"])
def test_both_majors_of_transformers_compute_the_same(name, majors, tmp_path):
    wanted = theirs(make(name, tmp_path / "hf"), given(name))
    assert cli.main(["import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/run", *CUT]) == 0
    assert (
        cli.main(["export", f"--workdir={tmp_path}/run", "--format=hf", f"--out={tmp_path}/out"])
        == 0
    )
    np.save(tmp_path / "in.npy", given(name))
    for major, python in majors.items():
        version = ran(
            python, tmp_path, str(ROOT / "tests" / "hf_logits.py"), "out", "in.npy", "logits.npy"
        )
        assert version.startswith(f"{major}.")
        assert reference.error(np.load(tmp_path / "logits.npy"), wanted) < 1e-5


def test_frequencies_stay_with_a_llama_that_was_tuned(majors, tmp_path):
    """Llama 3's: import, two steps from it, export; both majors compute what the tuned run does."""
    write_source(tmp_path / "text")
    MODELS["wide"] = (
        "Llama",
        "ForCausalLM",
        dict(COMMON, vocab_size=300, num_key_value_heads=2, rope_parameters=LLAMA3),
    )
    make("wide", tmp_path / "hf")
    text = [
        "--config.data.source=text",
        f"--config.data.path={tmp_path}/text/*.py",
        "--config.train.batch_size=8",
    ]
    assert (
        cli.main(["import", f"--from={tmp_path}/hf", f"--workdir={tmp_path}/run", *CUT, *text]) == 0
    )
    steps = [
        "--config.train.steps=2",
        "--config.eval.every=0",
        "--config.eval.batches=1",
        f"--config.train.init_from={tmp_path}/run",
    ]
    assert (
        cli.main(
            ["train", f"--config={tmp_path}/run/config.json", f"--workdir={tmp_path}/tuned", *steps]
        )
        == 0
    )
    assert (
        cli.main(["export", f"--workdir={tmp_path}/tuned", "--format=hf", f"--out={tmp_path}/out"])
        == 0
    )
    tokens = np.random.default_rng(0).integers(0, 300, (8, 40))
    np.save(tmp_path / "in.npy", tokens)
    wanted = ours(tmp_path / "tuned", tokens)
    for python in majors.values():
        ran(python, tmp_path, str(ROOT / "tests" / "hf_logits.py"), "out", "in.npy", "logits.npy")
        assert reference.error(np.load(tmp_path / "logits.npy"), wanted) < 1e-4


@pytest.mark.parametrize("start", ["", "<s>"])
def test_the_documented_example_gives_the_text_of_uoe_generate(start, majors, tmp_path, capsys):
    """The commands and the program of docs/exchange.md, with a tokenizer that puts nothing or <s> in front of a text."""
    import transformers

    page = (
        (ROOT / "docs" / "exchange.md")
        .read_text()
        .split("## A model tuned on text of your own")[1]
        .split("\n## ")[0]
    )
    commands = [shlex.split(line)[1:] for line in page.splitlines() if line.startswith("    uoe ")]
    program = re.search("```python\n(.*?)```", page, re.DOTALL)[1]
    write_source(tmp_path / "src")
    bpe = HFTokenizer.train([p.read_bytes() for p in (tmp_path / "src").iterdir()], 280)
    MODELS["small"] = (
        "Llama",
        "ForCausalLM",
        dict(COMMON, vocab_size=300, bos_token_id=bpe.separator, eos_token_id=bpe.separator),
    )
    make("small", tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").write_text(bpe.to_json())
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_file=f"{tmp_path}/hf/tokenizer.json", eos_token="<|endoftext|>"
    )
    if start:
        from tokenizers.processors import TemplateProcessing

        fast.add_special_tokens({"bos_token": start})
        fast.backend_tokenizer.post_processor = TemplateProcessing(
            f"{start} $A", special_tokens=[(start, fast.bos_token_id)]
        )
    fast.save_pretrained(tmp_path / "hf")

    def place(option):
        return re.sub(
            r"(?<==)(DIR|imported|tuned_hf|tuned)",
            lambda m: f"{tmp_path}/{m[0].replace('DIR', 'hf')}",
            option,
        )

    small = ["--config.train.batch_size=8", "--config.train.steps=20", "--config.eval.every=0", "--config.optimizer.warmup_steps=2",
             "--config.optimizer.learning_rate=3e-3", "--config.eval.batches=1"]  # fmt: skip
    for command in commands:
        args = [place(option).replace("notes/*.txt", f"{tmp_path}/src/*.py") for option in command]
        given = {option.partition("=")[0] for option in small}
        args = [option for option in args if option.partition("=")[0] not in given]
        more = {"import": small[:1], "train": small}.get(command[0], [])
        assert cli.main([*args, *more]) == 0, args
    capsys.readouterr()
    assert (
        cli.main(
            [
                "generate",
                f"--workdir={tmp_path}/tuned",
                "--prompt=Once",
                "--temperature=0",
                "--max_tokens=40",
            ]
        )
        == 0
    )
    wanted = capsys.readouterr().out
    (tmp_path / "example.py").write_text(program)
    for python in majors.values():
        assert ran(python, tmp_path, "example.py") == wanted


def test_the_documented_example_with_a_model_trained_here(majors, tmp_path, capsys):
    write_source(tmp_path / "src")
    train = [
        "train",
        f"--config={ROOT}/tests/tiny.py",
        f"--config.data.path={tmp_path}/src",
        "--config.eval.batches=1",
    ]
    assert cli.main([*train, f"--workdir={tmp_path}/run"]) == 0
    assert (
        cli.main(
            [
                "export",
                f"--workdir={tmp_path}/run",
                "--format=hf",
                "--routed",
                f"--out={tmp_path}/tuned_hf",
            ]
        )
        == 0
    )
    capsys.readouterr()
    assert (
        cli.main(
            [
                "generate",
                f"--workdir={tmp_path}/run",
                "--prompt=Once",
                "--temperature=0",
                "--max_tokens=40",
            ]
        )
        == 0
    )
    wanted = capsys.readouterr().out
    (tmp_path / "example.py").write_text(
        re.search("```python\n(.*?)```", (ROOT / "docs" / "exchange.md").read_text(), re.DOTALL)[1]
    )
    for python in majors.values():
        assert ran(python, tmp_path, "example.py") == wanted

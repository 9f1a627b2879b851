"""Every shipped config, made tiny, trains and evaluates on miniature data with the true schema; nothing is downloaded."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jax
import lra_data
import named_data
import numpy as np
import pytest
import tensorflow_datasets as tfds
from helpers import ROOT, metric_lines, uoe, write_source

from uoe_jax import cli
from uoe_jax.data.tokenizers.hf import HFTokenizer
from uoe_jax.data.tokenizers.load import load_tokenizer, stored
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.errors import RunError, UserError
from uoe_jax.infer.sample import sample
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.main import train

PROSE = [
    f"the {a} {b} of {n} {c} in a book"
    for n in range(9)
    for a in ("old", "new")
    for b in ("game", "day")
    for c in "xyz"
]


def write_prose(root: Path, dataset: str, config: str = "") -> Path:
    rows = {
        split: [{"text": " . ".join(PROSE[i % 50 : i % 50 + 4]).encode()} for i in range(60)]
        for split in ("train", "test")
    }
    version = "1.1.0" if dataset == "lm1b" else "3.1.0"
    named_data.write(root, dataset, version, {"text": tfds.features.Text()}, rows, config)
    return root


def with_bpe(root: Path) -> dict[str, str]:
    root.mkdir()
    file = root / "bpe.json"
    file.write_text(HFTokenizer.train((text.encode() for text in PROSE), 280).to_json())
    return {
        "data.path": str(write_prose(root / "data", "c4", "en")),
        "data.tokenizer_file": str(file),
    }


def write_imagenet(root: Path) -> Path:
    """A few pictures of sizes that are not the model's."""
    rng = np.random.default_rng(0)
    sizes = [(40, 50), (32, 32), (70, 33), (33, 64)]
    rows = {
        split: [
            {
                "file_name": f"{i}.png",
                "image": named_data.png(rng.integers(0, 256, (*sizes[i % 4], 3), dtype=np.uint8)),
                "label": i % 1000,
            }
            for i in range(n)
        ]
        for split, n in (("train", 200), ("validation", 12))
    }
    features = tfds.features
    schema = {
        "file_name": features.Text(),
        "image": features.Image(encoding_format="png"),
        "label": features.ClassLabel(num_classes=1000),
    }
    named_data.write(root, "imagenet2012", "5.1.0", schema, rows)
    return root


def reviews(root: Path) -> Path:
    named_data.write_imdb(root, named_data.reviews(train=60, test=11))
    return root


def wikitext(root: Path) -> Path:
    return lra_data.write_zip(root)


def pairs(root: Path) -> Path:
    return lra_data.write(
        root / "lra_release",
        {f"lra_release/tsv_data/{name}": text for name, text in lra_data.TSV.items()},
    )


def cifar(root: Path) -> Path:
    named_data.write_cifar(root, 60, 11)
    return root


# What each config asks of its source, made in an empty directory.
NEEDS = {
    "quickstart": lambda root: {"data.path": str(write_source(root / "files", 90))},
    "wikitext103": lambda root: {"data.path": str(wikitext(root / "raw"))},
    "lm1b": lambda root: {"data.path": str(write_prose(root, "lm1b"))},
    "uoe_1b": with_bpe,
    "uoe_7b": with_bpe,
    "lra_listops": lambda root: {},
    "lra_text": lambda root: {"data.path": str(reviews(root))},
    "lra_retrieval": lambda root: {"data.path": str(pairs(root))},
    "lra_image": lambda root: {"data.path": str(cifar(root))},
    "lra_pathfinder": lambda root: {},
    "cifar10": lambda root: {"data.path": str(cifar(root))},
    "imagenet": lambda root: {"data.path": str(write_imagenet(root))},
    "digits": lambda root: {},
}


@pytest.fixture
def as_commands_run():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_every_config_is_here():
    assert sorted(NEEDS) == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


ALIKE = (
    "quickstart",
    "lm1b",
    "uoe_7b",
    "lra_image",
    "lra_text",
    "digits",
)  # other tests or other names train these


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NEEDS if n not in ALIKE])
def test_tiny_trains_five_steps_and_evaluates(name, tmp_path, capsys, as_commands_run):
    overrides = NEEDS[name](tmp_path / "data")
    workdir = tmp_path / "run"
    assert train(cli.load_config(f"{name}:tiny", overrides), str(workdir), sample) == 0
    lines = metric_lines(workdir)
    trained = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in trained] == [1, 2, 3, 4, 5] and np.isfinite(
        [line["train/loss"] for line in trained]
    ).all()
    (evaluated,) = [line for line in lines if "eval/loss" in line]
    assert math.isfinite(evaluated["eval/loss"])
    config = json.loads((workdir / "config.json").read_text())
    measure = "bits_per_byte" if config["model"]["task"] == "language" else "accuracy"
    assert math.isfinite(evaluated[f"eval/{measure}"])
    record = json.loads((workdir / "record.json").read_text())["data"]
    if measure == "accuracy":  # every example counted once
        assert evaluated["eval/rows"] == record["n_rows"]["validation"]
    if config["data"]["tokenizer"] == "words":
        assert evaluated["eval/word_perplexity"] == pytest.approx(math.exp(evaluated["eval/loss"]))
    tested = [line for line in lines if "test/loss" in line]
    assert len(tested) == config["eval"]["test"]
    assert (
        train(cli.load_config(f"{name}:tiny", overrides), str(workdir), sample) == 0
    )  # nothing left, and not tested again
    assert metric_lines(workdir) == lines


@pytest.mark.slow
def test_a_run_keeps_its_tokenizer(tmp_path):
    """The file it came from may go, and another one in its place is refused."""
    overrides = with_bpe(tmp_path / "data")
    file, workdir = Path(overrides["data.tokenizer_file"]), tmp_path / "run"
    args = [
        "train",
        "--config=uoe_1b:tiny",
        f"--workdir={workdir}",
        *(f"--config.{k}={v}" for k, v in overrides.items()),
    ]
    code, _, err = uoe(*args, "--config.train.stop_after=2")
    assert code == 0, err
    assert (
        stored((workdir / "tokenizer.json").read_text()).fingerprint
        == load_tokenizer("bpe", str(file)).fingerprint
    )
    file.write_text(HFTokenizer.train([b"something else entirely"], 260).to_json())
    code, _, err = uoe(*args)
    assert (
        code == 2
        and "config.data.tokenizer_file" in err
        and "is not the tokenizer of the run" in err
        and err.count("\n") == 1
    )
    file.unlink()
    code, out, err = uoe(*args)
    assert code == 0 and "a sample:" in out, err
    assert metric_lines(workdir)[-1]["step"] == 5
    code, out, err = uoe("generate", f"--workdir={workdir}", "--prompt=the old", "--max_tokens=3")
    assert code == 0 and out.startswith("the old"), err
    code, _, err = uoe(*args, f"--workdir={tmp_path / 'other'}")
    assert code == 2 and "config.data.tokenizer_file" in err and "uoe tokenizer train" in err


def test_every_variant_that_a_config_names_is_there():
    for path in (ROOT / "configs").glob("*.py"):
        names = set(re.findall(rf"{path.stem}:([\w-]+)", path.read_text()))
        for variant in {*names, "tiny"}:
            cli.load_config(f"{path.stem}:{variant}", {})


@pytest.mark.slow
def test_a_classifier_gives_no_text(tmp_path, as_commands_run):
    assert train(cli.load_config("digits:tiny", {}), str(tmp_path / "run"), sample) == 0
    code, out, err = uoe("generate", f"--workdir={tmp_path / 'run'}", "--prompt=x")
    assert (
        (code, out) == (2, "")
        and "config.model.task='classify'" in err
        and "uoe eval" in err
        and err.count("\n") == 1
    )


@pytest.mark.slow
def test_prepared_data_may_move(tmp_path, as_commands_run):
    first, second = cifar(tmp_path / "first"), tmp_path / "second"
    args = (str(tmp_path / "run"), sample)
    assert (
        train(
            cli.load_config("cifar10:tiny", {"data.path": str(first), "train.stop_after": "2"}),
            *args,
        )
        == 0
    )
    first.rename(second)
    assert train(cli.load_config("cifar10:tiny", {"data.path": str(second)}), *args) == 0
    named_data.write_cifar(tmp_path / "other", 61, 11)
    with pytest.raises(UserError, match="data.sha256"):
        train(cli.load_config("cifar10:tiny", {"data.path": str(tmp_path / "other")}), *args)


@pytest.mark.slow
def test_a_lost_tokenizer_is_not_replaced_by_another(tmp_path, as_commands_run):
    overrides = NEEDS["wikitext103"](tmp_path / "data")
    workdir = tmp_path / "run"
    assert train(cli.load_config("wikitext103:tiny", overrides), str(workdir), sample) == 0
    (workdir / "tokenizer.json").unlink()
    code, out, err = uoe("generate", f"--workdir={workdir}", "--prompt=x")
    assert (code, out) == (2, "") and "tokenizer.json: is gone" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_damaged_best_checkpoint_is_named_and_not_passed_over(tmp_path, capsys, as_commands_run):
    overrides = {"eval.every": "1", "checkpoint.every": "1", "checkpoint.keep_best": "5"}
    workdir = tmp_path / "run"
    load = lambda **more: cli.load_config("digits:tiny", overrides | more)  # noqa: E731
    assert train(load(**{"eval.test": "false"}), str(workdir), sample) == 0
    best = 3
    with (
        jax.set_mesh(mesh_lib.make_mesh(load().mesh)),
        CheckpointStore(workdir, keep_latest=9, keep_best=9) as store,
    ):
        store.rank(best, 0.0)
    for file in (workdir / f"checkpoints/{best}").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(RunError, match=f"checkpoints/{best}.*best on validation.*eval.test=false"):
        train(load(), str(workdir), sample)
    assert train(load(**{"eval.test": "false"}), str(workdir), sample) == 0


def test_words_are_counted_once_for_all_runs(tmp_path, monkeypatch):
    from uoe_jax.data import pipeline
    from uoe_jax.data.tokenizers.words import WordTokenizer

    config = cli.load_config("wikitext103:tiny", NEEDS["wikitext103"](tmp_path / "data"))
    first = pipeline.load(config, tmp_path / "cache").tokenizer
    monkeypatch.setattr(WordTokenizer, "train", pytest.fail)
    assert pipeline.load(config, tmp_path / "cache").tokenizer.fingerprint == first.fingerprint
    (cached,) = (tmp_path / "cache/words").iterdir()
    cached.write_text(cached.read_text()[:-20])
    monkeypatch.undo()
    assert (
        pipeline.load(config, tmp_path / "cache").tokenizer.fingerprint == first.fingerprint
    )  # counted again

"""`uoe generate` and `uoe eval` as people use them: cached decoding is the full pass, whatever is beside a prompt; stops, files, chat, experts."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import jax
import numpy as np
import pytest
from exchange_runs import run_of
from helpers import slow, write_source

from uoe_jax import cli
from uoe_jax.config import Config, from_dict
from uoe_jax.data.tokenizers.base import ByteTokenizer
from uoe_jax.errors import UserError
from uoe_jax.infer import command
from uoe_jax.infer.experts import all_experts, choices
from uoe_jax.infer.sample import GrowingText, Sampler, pick
from uoe_jax.train.restore import restored

CUT = dict(n_experts=4, k=2, capacity_window=32, capacity_factor=0.75)


def config_of(source: str = "", **generate) -> Config:
    model = dict(
        d_model=32,
        n_layers=2,
        n_heads=4,
        d_hidden=64,
        context_length=256,
        vocab_size=257,
        smha=CUT,
        uome={**CUT, "patch_size": 4},
    )
    data = {"source": "text", "path": source} if source else {}
    return from_dict(
        {"model": model, "data": data, "train": {"batch_size": 8}, "generate": generate}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir whose model has random weights, and text to measure it on."""
    place = tmp_path_factory.mktemp("generate")
    write_source(place / "text")
    run_of(config_of(str(place / "text" / "*.py")), place / "run")
    return place / "run"


def sampler(run, **generate) -> Sampler:
    config = config_of(**generate)
    with restored(
        dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=8)), str(run)
    ) as found:
        params = jax.device_get(found.params)
        model = found.program.model
    return Sampler(config, model, params, ByteTokenizer())


def uoe(*args: str) -> int:
    return cli.main(["generate", *args])


@pytest.mark.parametrize("temperature", [slow(0.0), 0.9], ids=["greedy", "sampled"])
def test_two_hundred_tokens_by_cache_are_those_of_the_full_pass(temperature, run):
    """The draw is the same; the logits come from the whole row every time. Seven capacity windows are crossed."""
    found = sampler(run, temperature=temperature, max_tokens=200, seed=3, top_p=0.9)
    prompt = "def f(x):"
    tokenizer = _Endless()
    found.tokenizer = tokenizer
    ids = list(found.encoded(prompt))
    completion = found.complete([prompt], first=5)[0]
    assert completion.n_tokens == 200 and completion.ended == "limit"
    settings = (np.float32(temperature), np.int32(0), np.float32(0.9))

    @jax.jit
    def following(params, row_1L, length):
        logits = found._model(params)(row_1L)[0][0, length - 1][None, :257]
        key = jax.random.fold_in(
            jax.random.fold_in(jax.random.key(np.uint32(3)), np.uint32(5)), length
        )
        return pick(logits, key[None], *settings)[0]

    for _ in range(200):
        row = np.zeros((1, 256), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(following(found._params, row, np.int32(len(ids)))))
    assert tokenizer.decode(ids[-200:]) == completion.followed


class _Endless(ByteTokenizer):
    """Takes the separator for a token like any other, so that no text ends early."""

    separator = -1
    start = 256

    def decode(self, ids):
        return "".join(chr(0x100 + i) for i in ids)


@pytest.mark.slow
def test_a_text_does_not_depend_on_what_is_beside_it(run):
    found = sampler(run, max_tokens=24, temperature=1.0)
    prompts = ["a", "def f(x):\n    return x", "x" * 100, "é", "class A:"]
    alone = [found.complete([prompt], first=i)[0] for i, prompt in enumerate(prompts)]
    assert len({c.followed for c in alone}) > 1
    for batch in (0, 2, 3):
        assert found.complete(prompts, batch=batch) == alone


def test_a_row_ends_at_its_own_limit(run):
    found = sampler(run, max_tokens=1000, temperature=1.0)
    found.tokenizer = _Endless()
    long, short = found.complete(["x" * 240, "x"])
    assert (long.n_tokens, short.n_tokens) == (256 - 241, 256 - 2)
    with pytest.raises(UserError, match=r"--prompt='x{36}…': 257 tokens leave no room"):
        found.complete(["x" * 256])


# --- text that grows --------------------------------------------------------------------------------------------------


def grown(text: bytes, stops=(), limit: int = 10_000) -> tuple[list[str], GrowingText]:
    growing, shown = GrowingText(ByteTokenizer(), limit, stops), []
    for token in text:
        if growing.ended is None:
            shown.append(growing.push(token))
    return shown, growing


def test_characters_are_shown_whole():
    shown, growing = grown("aé€𝄞b".encode())
    assert [s for s in shown if s] == [
        "a",
        "é",
        "€",
        "𝄞",
        "b",
    ] and growing.text == "aé€𝄞b" == growing.shown
    shown, growing = grown(b"a\xffb\xe2")
    assert growing.text == "a\ufffdb\ufffd" and growing.shown == "a\ufffdb"
    assert growing.push(256) == "\ufffd" and growing.ended == "document"


@pytest.mark.parametrize(
    "text, stops, said",
    [
        ("hello END of", ["END"], "hello "),
        ("a\n\nb", ["\n\n", "b"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("aab", ["ab"], "a"),
        ("EN", ["END"], "EN"),
    ],
)
def test_text_ends_before_the_first_stop_and_nothing_of_it_is_shown(text, stops, said):
    shown, growing = grown(text.encode(), stops)
    assert growing.text == said and (growing.ended == "stop") == (text != "EN")
    for i in range(len(shown)):
        assert said.startswith("".join(shown[: i + 1]))
    if growing.ended is None:
        assert growing.shown == "" and growing.push(256) == "EN"


def test_a_limit():
    shown, growing = grown(b"abcdef", limit=3)
    assert growing.ended == "limit" and growing.text == "abc" == "".join(shown)
    assert GrowingText(ByteTokenizer(), 0).ended == "limit"


# --- the command ------------------------------------------------------------------------------------------------------


def test_prompts_of_a_file_and_where_they_go(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("def f\n\nclass A\nx\n")
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": "def f"}\n{"prompt": "class A"}\n{"prompt": "x"}\n'
    )
    options = [f"--workdir={run}", "--max_tokens=12", "--batch=2"]
    assert uoe(*options, f"--prompts={tmp_path}/p.txt") == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["prompt"] for line in lines] == ["def f", "class A", "x"]
    assert all(
        set(line) == {"prompt", "text", "tokens", "ended"}
        and line["ended"] in ("limit", "document")
        for line in lines
    )
    assert "2 of 4 experts in smha" in err and "cache of 256 tokens" in err
    assert uoe(*options, f"--prompts={tmp_path}/p.jsonl", f"--out={tmp_path}/out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_text() == out


def test_what_is_streamed_is_the_text(run, capsys):
    options = [
        f"--workdir={run}",
        "--prompt=def f(",
        "--max_tokens=30",
        "--temperature=1",
        "--stop=\x00\x00",
    ]
    texts = []
    for more in ([], ["--no-stream"]):
        assert uoe(*options, *more) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("def f(") and len(texts[0]) > 10
    assert uoe(*options[:-1], f"--stop={texts[0][12:14]}") == 0
    out, err = capsys.readouterr()
    assert out == texts[0][: texts[0].index(texts[0][12:14], 6)] + "\n" and "[stop string]" in err


def test_a_text_cut_by_the_context_is_reported(run, tmp_path, capsys):
    options = [f"--workdir={run}", "--max_tokens=400", "--temperature=1"]
    assert uoe(*options, "--prompt=" + "x" * 251) == 0
    full = "the context of 256 tokens was full before --max_tokens=400]"
    assert f"[limit of 4 tokens: {full}" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("x" * 251 + "\n")
    assert uoe(*options, f"--prompts={tmp_path}/p.txt") == 0
    assert f"[1 of 1 texts: {full}" in capsys.readouterr().err


def test_chat_goes_on_with_all_that_was_said(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("import os\nclass A:\n\nnever read\n"))
    seen = []
    complete = Sampler.complete
    monkeypatch.setattr(
        Sampler,
        "complete",
        lambda self, prompts, *a, **k: (seen.append(prompts[0]), complete(self, prompts, *a, **k))[
            1
        ],
    )
    assert uoe(f"--workdir={run}", "--chat", "--max_tokens=10") == 0
    out, _ = capsys.readouterr()
    assert (
        seen[0] == "import os\n"
        and seen[1].startswith("import os\n")
        and seen[1].endswith("\nclass A:\n")
    )
    answer = seen[1].removeprefix("import os\n").removesuffix("class A:\n")
    assert out.startswith(answer) and len(seen) == 2


def test_chat_forgets_the_oldest_when_the_context_is_full(run, capsys):
    found = sampler(run, max_tokens=20, temperature=1.0)
    command.chat(found, [], io.StringIO("a" * 300 + "\n" + "b" * 40 + "\n"))
    err = capsys.readouterr().err
    assert err.count("the context is full") == 2
    kept = command.fitting(found, "x" * 1000)
    assert len(kept) == 256 - 1 - 20 and command.fitting(found, "short") == "short"


@pytest.mark.parametrize(
    "options, said",
    [
        (["--experts=5"], "--experts=5: smha has 4 experts; give a number from 1 to that"),
        (["--experts=0"], "--experts=0: smha has 4 experts"),
        (
            ["--experts=many"],
            "--experts=many: give a number, a range such as 1..4, or smha=3,uome=4",
        ),
        (["--experts=1..2"], "--experts=1..2: a text is written with one K"),
        (["--experts=moe=2"], "--experts=moe=2: give a number"),
        (["--prompt=x", "--chat"], "--prompt and --chat: prompts come from one place"),
        (["--prompts=/proc/never.txt"], "--prompts=/proc/never.txt: cannot be read"),
        (["--out=/proc/never"], "--out=/proc/never: is for --prompts=FILE"),
        (["--stop="], "--stop: an empty string"),
        (["--batch=0"], "--batch=0: give a whole number from 1 on"),
        (["--prompt=" + "x" * 300], "301 tokens leave no room"),
        (["--temperature=-1"], "config.generate.temperature=-1.0"),
    ],
)
def test_what_cannot_be_done_is_refused(options, said, run, capsys):
    assert uoe(f"--workdir={run}", *options) == 2
    out, err = capsys.readouterr()
    assert said in err and err.count("\n") == 1 and err.startswith("uoe: ") and out == "", err


def test_prompts_that_are_none(run, tmp_path, capsys):
    for name, text in {
        "empty.txt": "\n \n",
        "broken.jsonl": "{",
        "other.jsonl": '{"text": "x"}\n',
        "number.jsonl": '{"prompt": 3}\n',
        "list.jsonl": "[1]\n",
    }.items():
        (tmp_path / name).write_text(text)
        assert uoe(f"--workdir={run}", f"--prompts={tmp_path / name}") == 2
        err = capsys.readouterr().err
        assert f"--prompts={tmp_path / name}: " in err and err.count("\n") == 1
    (tmp_path / "long.txt").write_text(f"x\n\n{'x' * 300}\n")
    assert uoe(f"--workdir={run}", f"--prompts={tmp_path}/long.txt", f"--out={tmp_path}/out") == 2
    err = capsys.readouterr().err
    assert err.startswith(f"uoe: --prompts={tmp_path}/long.txt: line 3: 301 tokens leave no room")
    assert err.count("\n") == 1 and not (tmp_path / "out").exists()


# --- another number of experts ----------------------------------------------------------------------------------------


def test_slots_follow_the_number_of_experts():
    config = config_of()
    assert [c.model.smha.window_capacity() for c in choices(config, "1..4")] == [6, 12, 18, 24]
    (both,) = choices(config, "smha=1,uome=4")
    assert (both.model.smha.k, both.model.uome.k) == (1, 4)
    assert all_experts(config).model.uome.window_capacity() == 32
    dense = from_dict({"model": {"attention": "dense", "mlp": "dense"}})
    with pytest.raises(UserError, match="--experts=2: this model has no unions of experts"):
        choices(dense, "2")
    half = from_dict({"model": {"attention": "dense"}})
    with pytest.raises(
        UserError, match="--experts=smha=2: the routed blocks of this model are uome"
    ):
        choices(half, "smha=2")


@pytest.mark.slow
def test_the_curve_over_experts(run, capsys):
    """More experts cost more; K as trained gives what plain evaluation gives; perplexities are those of the loss."""
    assert cli.main(["eval", f"--workdir={run}", "--split=validation"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert cli.main(["eval", f"--workdir={run}", "--experts=1..4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["experts"] for line in lines] == [{"smha": k, "uome": k} for k in (1, 2, 3, 4)]
    costs = [line["forward_flops_per_token"] for line in lines]
    assert costs == sorted(set(costs)) and len({line["eval/loss"] for line in lines}) == 4
    assert {key: lines[1][key] for key in plain} == plain
    assert plain["eval/perplexity"] == pytest.approx(math.exp(plain["eval/loss"]))
    source = json.loads((run / "config.json").read_text())["data"]["path"]
    from uoe_jax.data.pipeline import default_cache_dir
    from uoe_jax.data.registry import text_source

    config = config_of(source)
    documents = list(text_source(config.data, default_cache_dir()).documents("validation"))
    words, targets = sum(len(d.split()) for d in documents), sum(len(d) + 1 for d in documents)
    assert math.log(plain["eval/perplexity_per_word"]) == pytest.approx(
        plain["eval/loss"] * targets / words
    )

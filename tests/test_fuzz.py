"""Configuration fuzzing: hundreds of wrong overrides each get their sentence, and random valid ones train.

What is wrong is known from the table of rules below, written from the documentation and not read from the library.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import subprocess
import sys
import time
from typing import Any, Iterator

import jax
import numpy as np
import pytest
from helpers import TINY, environment, metric_lines, write_source

from uoe_jax import cli, config
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.infer.sample import sample
from uoe_jax.moe.routing import keep_by_position
from uoe_jax.train.main import train
from uoe_jax.train.step import build

HUGE = 2**31 - 1
# NAME=LOW.. or LOW..HIGH: whole numbers; with a decimal point: numbers; `>`: LOW itself is out; a|b: choices; numbers: several
# ascending ones.
ROUTED = """
    n_experts=1.. k=1.. capacity_factor=>0.0..1e6 capacity_window=1.. sequence_capacity_factor=0.0..1e6 sequence_group=1..
    patch_size=1.. unit=patch|sequence|hierarchical priority=position|score router_noise=0.0..1e3 balance_weight=0.0..1e3
    gate=sigmoid|normalized|score|straight_through|none order=gather|project router_bias=bool bias_rate=0.0..1
    z_weight=0.0..1e3 dispatch=auto|inverse|scatter|onehot"""
RULES = {
    "model": """
        task=language|classify stem=tokens|image vocab_size=0.. d_model=1.. n_layers=1.. n_heads=1.. n_kv_heads=0.. d_hidden=1..
        context_length=1.. causal=bool activation=gelu|gelu_tanh|relu|swiglu|geglu
        norm=rmsnorm|layernorm norm_eps=>0.0..1 qk_norm=bool position=rope|learned|none rope_theta=1.0..1e12 rope_scaling=text bias=bool qkv_bias=bool
        tie_embeddings=bool dropout=0.0..0.99 attention_dropout=0.0..0.99 dtype=float32|bfloat16|float16
        attention=smha|dense|mla|moh|mosa|linformer|nystromformer|performer|reformer|long_short
        mlp=uome|dense|token_choice|expert_choice|deepseek_moe|xmoe|skywork_moe
        remat=none|slots|dots|block cutoffs=numbers cutoff_div=1..""",
    "model.smha": ROUTED,
    "model.uome": ROUTED,
    "model.moe": """
        n_experts=1.. k=1.. n_shared=0.. d_expert=0.. capacity_factor=>0.0..1e6 capacity_window=1.. score=softmax|sigmoid scale=>0.0..1e3
        threshold=>0.0..1 logit_scale=>0.0..1e3 balance_weight=0.0..1e3 adaptive_rate=0.0..1e3 adaptive_decay=0.0..1 adaptive_most=0.0..1e3
        bias_rate=0.0..1 z_weight=0.0..1e3""",
    "model.mla": "q_rank=0.. kv_rank=1.. d_rope=0..",
    "model.mosa": "capacity_factor=>0.0..1",
    "model.moh": "n_shared=0.. k=1.. balance_weight=0.0..1e3",
    "model.linformer": "rank=1..",
    "model.nystromformer": "landmarks=1.. iterations=1..100 kernel=0..",
    "model.performer": "features=1..",
    "model.reformer": "n_hashes=1.. chunk=1..",
    "model.long_short": "window=2.. rank=1..",
    "model.classifier": "n_classes=2.. pooling=mean|cls n_inputs=1..2 d_head=0..",
    "model.image": "height=1.. width=1.. channels=1.. patch=1.. bound=>0.0..1e3",
    "data": """
        source=stdlib|text|wikitext103|tfds_text|listops|imdb|aan|pathfinder|digits|cifar10|cifar100|imagenet2012 path=text name=text
        tokenizer=bytes|bpe|words|library tokenizer_file=text separator=text start=text min_count=1.. buckets=1.. sort_window=1.. held_out=1..40""",
    "data.listops": "min_length=1.. max_length=1.. max_depth=1..100 max_args=2..100 n_train=1.. n_eval=1.. seed=0..",
    "data.pathfinder": "size=16..512 length=2..30 distractors=0..100 n_train=1.. n_eval=1.. seed=0..",
    "augment": """
        crop_padding=0..512 crop_area=>0.0..1 flip=bool rand_layers=0..16 rand_magnitude=0..30 mixup=0.0..100 cutmix=0.0..100""",
    "optimizer": """
        schedule=cosine|linear learning_rate=>0.0..1e3 warmup_steps=0.. decay_steps=0.. final_fraction=0.0..1 weight_decay=0.0..1e3 b1=0.0..0.999999
        b2=0.0..0.999999 eps=>0.0..1 clip_norm=0.0..1e9 moment_dtype=float32|bfloat16""",
    "train": "steps=1.. batch_size=1.. accumulation=1.. seed=0.. log_every=1.. stop_after=0.. init_from=text init_from_any=bool deterministic=bool report=bool label_smoothing=0.0..0.99",
    "eval": "every=0.. batches=0.. batch_size=0.. test=bool",
    "checkpoint": "every=0.. keep_latest=1.. keep_best=0..",
    "mesh": "replica=-1.. data=-1.. fsdp=-1.. expert=-1.. sequence_parallel=bool",
    "guard": """
        spike_sigmas=0.0..1e6 max_bad_steps=1.. rollbacks=0..1000 peer_timeout_s=1.0..1e5 hang_timeout_s=0.0..1e6
        compile_timeout_s=0.0..1e6""",
    "generate": "prompt=text max_tokens=1.. temperature=0.0..1e3 top_k=0.. top_p=>0.0..1 seed=0..",
}
TABLE = {
    f"{s}.{name}": rule
    for s, text in RULES.items()
    for name, rule in (word.split("=", 1) for word in text.split())
}

NO_NUMBERS = (
    "",
    " ",
    "abc",
    "None",
    "true",
    "0x10",
    "1,000",
    "5 6",
    "1/2",
    "٣",
    "５",
    "--5",
    "[5]",
    "1__0",
    "_1",
    "'5'",
    "5\n6",
)
NO_WHOLE = (
    "1.5",
    "5.0",
    "1e3",
    "nan",
    "inf",
    "9" * 5000,
    str(HUGE + 1),
    str(10**18),
    str(-(10**30)),
)
NO_BOOL = ("", "2", "yes", "on", "None", "-1", "1.0", "truth", "[true]", "0x1", "tru e", "ｔｒｕｅ")


def wrong_values(name: str) -> list[str]:
    """Texts that the rule of a key forbids, whatever the other keys are."""
    rule = TABLE[name]
    if rule == "text":
        return []
    if rule == "bool":
        return list(NO_BOOL)
    if rule == "numbers":
        return [*NO_NUMBERS[1:], "1.5", "0", "-1", "3,2", "1,,2", "1,1", "5;9", str(HUGE)]
    if "|" in rule:
        choices = [c for c in rule.split("|") if c]
        near = [
            v
            for c in choices
            for v in (c.upper(), c + " ", c[:-1], "x" + c, f"{c}\u200b")
            if v not in choices
        ]
        return ["", "None", "0", ",".join([*choices, *choices]), *near]
    low, high = rule.lstrip(">").split("..")
    if "." not in low:
        beyond = (
            [str(int(low) - 1)] + [str(int(high or HUGE) + 1)] + ["0"] * name.startswith("mesh.")
        )
        return [*NO_NUMBERS, *NO_WHOLE, *beyond]
    beyond = [repr(float(low) - 1e-6), repr(float(high) * 1.001), "-1e300", "1e300"]
    beyond += ["0", "-0.0", "1e-50"] * rule.startswith(">")
    return [*NO_NUMBERS, "nan", "-NaN", "inf", "-Infinity", "1e400", *beyond, "1e-320"]


def typo(name: str, rng: random.Random) -> str:
    """The name with one slip of the hand, no other key."""
    while True:
        i = rng.randrange(len(name))
        before, here, after = name[:i], name[i], name[i + 1 :]
        letters = (
            before + after,
            before + here + name[i:],
            before + after[:1] + here + after[1:],
            before + "é" + name[i:],
        )
        slip = rng.choice(
            (*letters, name.upper(), name.replace("_", "-"), name + " ", before + "\n" + name[i:])
        )
        if slip not in TABLE and "=" not in slip:
            return slip


# What does not go together, given tests/tiny.py: D=32, H=4, F=64, L=64, N=4, K=2, batch 8. The first key is named.
PAIRS: list[dict[str, Any]] = [
    *({"model.n_heads": n} for n in (3, 5, 7, 33, 64, HUGE)),
    *({"model.d_model": d} for d in (1, 2, 30, 33, 2**31 - 1)),
    {"model.n_heads": 32, "model.smha.n_experts": 4},  # heads of width 1 cannot be rotated
    {"model.d_model": 12},
    *({"model.n_kv_heads": n} for n in (3, 8, HUGE)),
    *({"model.smha.n_experts": n} for n in (3, 8, 16, HUGE)),
    {"model.smha.n_experts": 4, "model.n_kv_heads": 2},
    {"model.smha.n_experts": 1},
    *({"model.uome.n_experts": n} for n in (3, 5, 128, HUGE)),
    *({"model.d_hidden": n} for n in (1, 63, 66)),
    *({f"model.{b}.k": k} for b in ("smha", "uome") for k in (5, 100, HUGE)),
    {"model.uome.k": 9, "model.uome.n_experts": 8},
    *({f"model.{b}.gate": "normalized", f"model.{b}.k": 1} for b in ("smha", "uome")),
    *({f"model.{b}.patch_size": p} for b in ("smha", "uome") for p in (3, 5, 65, 128, HUGE)),
    {"model.context_length": 63, "model.uome.patch_size": 2},
    *({f"model.{b}.priority": "score"} for b in ("smha", "uome")),
    *({f"model.{b}.unit": u} for b in ("smha", "uome") for u in ("sequence", "hierarchical")),
    *({f"model.{b}.sequence_capacity_factor": 1.5} for b in ("smha", "uome")),
    {
        "model.smha.sequence_group": 3,
        "model.smha.sequence_capacity_factor": 1,
        "model.smha.unit": "sequence",
    },
    {"model.causal": "false"},
    {"model.task": "classify"},
    {"model.stem": "image"},
    {"model.task": "classify", "model.stem": "image", "model.context_length": 63},
    {"model.image.patch": 5, "model.task": "classify", "model.stem": "image"},
    {"model.classifier.pooling": "cls", "model.task": "classify"},
    *({"model.vocab_size": n} for n in (1, 256)),
    *({"model.cutoffs": "100", "model.cutoff_div": n} for n in (3, 64, HUGE)),
    {"model.cutoff_div": 2},
    {"model.cutoffs": "100,257"},
    *({"data.source": name} for name in ("digits", "listops", "imdb", "tfds_text")),
    *(
        {"data.tokenizer_file": "bpe.json", "data.tokenizer": name}
        for name in ("bytes", "bpe", "words")
    ),
    {"train.label_smoothing": 0.1},
    {"augment.flip": "true"},
    *(
        {name: value}
        for name, value in (
            ("data.listops.seed", 1),
            ("data.pathfinder.size", 64),
            ("data.name", "lm1b"),
            ("data.min_count", 2),
            ("model.image.width", 8),
            ("model.classifier.pooling", "cls"),
        )
    ),
    {"eval.test": "true", "checkpoint.keep_best": 0},
    {"data.sort_window": 4},
    {"data.held_out": 10},
    *(
        {"model.rope_scaling": text}
        for text in ("8", "8,1,4", "8,4,1,64", "0.5,1,4,64", "a,b,c,d", "8,1,4,nan", "8,1,4,64,2")
    ),
    {"model.rope_scaling": "8,1,4,64", "model.position": "learned"},
    {"model.qkv_bias": "true", "model.bias": "true"},
    {"model.qkv_bias": "true", "model.attention": "mla"},
    {"data.buckets": 2, "mesh.expert": 4, "mesh.sequence_parallel": "true"},
    *({"model.context_length": n} for n in (1, 2, 4, 5)),  # no room for the sample's prompt
    {"generate.prompt": "x" * 64},
    {"generate.prompt": "é" * 32},
    *({"train.accumulation": n} for n in (3, 5, 16, HUGE)),
    *({"train.batch_size": n, "train.accumulation": 4} for n in (1, 2, 6)),
    *({f"mesh.{a}": n} for a in ("replica", "data", "fsdp") for n in (3, 16, HUGE)),
    *({"mesh.expert": n} for n in (3, 8, HUGE)),
    {"mesh.data": 4, "mesh.fsdp": 4},
    {"mesh.data": 8, "train.accumulation": 2},
    {"mesh.fsdp": -1},
    {"mesh.expert": -1, "mesh.data": -1},
    {"mesh.data": 8, "eval.batch_size": 12},
    {"mesh.data": 2, "eval.batch_size": 7},
    {"mesh.fsdp": 8, "model.d_model": 36},
    {"mesh.expert": 4, "mesh.sequence_parallel": "true", "model.context_length": 62},
    {"mesh.expert": 3, "model.attention": "dense", "model.mlp": "dense"},
    *(
        {"model.attention": name}
        for name in ("mosa", "linformer", "nystromformer", "performer", "reformer", "long_short")
    ),
    {"model.mlp": "expert_choice"},
    *({"model.mlp": "token_choice", "model.moe.k": k} for k in (3, 9, HUGE)),
    {"model.mlp": "deepseek_moe", "model.moe.n_shared": 1},  # F=64 is not cut in 3
    {
        "model.mlp": "deepseek_moe",
        "model.moe.n_shared": 2,
        "mesh.expert": 3,
        "model.moe.d_expert": 4,
    },
    {"model.mlp": "token_choice", "model.moe.threshold": 0.5},
    {"model.mlp": "xmoe", "model.moe.score": "sigmoid"},
    {"model.moe.k": 1},
    {"model.mla.q_rank": 8},
    *({"model.attention": "mla", "model.mla.d_rope": n} for n in (1, 7)),
    {"model.attention": "mla", "model.qk_norm": "true"},
    {"model.attention": "mla", "model.n_kv_heads": 2},
    *({"model.attention": "moh", "model.moh.k": k} for k in (3, HUGE)),
    {"model.attention": "moh", "model.moh.n_shared": 4},
    {"model.attention": "moh", "mesh.expert": 8},
    {"model.mlp": "xmoe", "mesh.expert": 3},
]


@dataclasses.dataclass
class Case:
    """Arguments after `uoe train --config=tiny --workdir=…`, and the keys of which one must be named."""

    args: list[str]
    keys: list[str]


def invalid_cases() -> Iterator[Case]:
    rng = random.Random(20240607)
    for name in TABLE:
        for value in rng.sample(wrong_values(name), 3) if TABLE[name] != "text" else ():
            equals = rng.random() < 0.8 or value.startswith("-")
            yield Case(
                [f"--config.{name}={value}"] if equals else [f"--config.{name}", value], [name]
            )
        slip = typo(name, rng)
        yield Case([f"--config.{slip}=3"], [slip])
        yield Case([f"--config.{name}=1", f"--config.{name}=2"], [name])
    odd = (
        "",
        ".",
        "model.",
        ".train",
        "train.steps.",
        "train..steps",
        "train.steps.more",
        "config.train.steps",
        "x" * 5000,
    )
    for section in (*RULES, *odd):
        yield Case([f"--config.{section}={rng.choice(('3', '', '{}', 'None'))}"], [section])
    for pair in PAIRS:
        yield Case([f"--config.{name}={value}" for name, value in pair.items()], list(pair))
    for args in (
        ["--config.train.steps"],
        ["--config.train.steps", "--config.train.seed=3"],
        ["--config.train.steps==3"],
    ):
        yield Case(args, ["train.steps"])


# Runs every case in one process, which has not imported jax at the end.
CHILD = """
import contextlib, io, json, sys, time
from uoe_jax.cli import main
found = []
for args in json.load(sys.stdin):
    out, start = io.StringIO(), time.perf_counter()
    with contextlib.redirect_stderr(out):
        code = main(args)
    found.append((code, out.getvalue(), time.perf_counter() - start))
late = [m for m in ("jax", "jaxlib", "flax", "orbax", "grain", "tensorflow", "optax") if m in sys.modules]
json.dump({"found": found, "late": late}, sys.stdout)
"""


def refused(code: int, err: str, keys: list[str]) -> bool:
    """Whether this is the answer that bad input gets: exit code 2 and one sentence that names a key as it was typed."""
    typed = [key if key.isprintable() else ascii(key)[1:-1] for key in keys]
    named = any(f"config.{key}" in err for key in typed) or any(
        f" {key.rpartition('.')[2]}=" in err for key in typed
    )
    return code == 2 and err.startswith("uoe: ") and err.count("\n") == 1 and named


def test_the_table_has_every_key():
    assert sorted(TABLE) == sorted(config.ALL_KEYS)  # a new key states its rule here as well


def test_hundreds_of_wrong_overrides_are_refused_at_once():
    cases = list(invalid_cases())
    assert len(cases) >= 300
    base = ["train", f"--config={TINY}", "--workdir=/nonexistent/never"]
    done = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps([base + case.args for case in cases]), env=environment(),
        stdout=subprocess.PIPE, text=True, timeout=120, check=True,
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["late"] == []
    answers = list(zip(cases, told["found"], strict=True))
    wrong = [
        (case.args, code, err[:300])
        for case, (code, err, _) in answers
        if not refused(code, err, case.keys)
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)}: {wrong[:20]}"
    slow = [(case.args, seconds) for case, (_, _, seconds) in answers if seconds > 1]
    assert not slow


@pytest.mark.parametrize("name,value", [
    ("model.uome.capacity_factor", "nan"), ("train.stepz", "3"), ("model.d_model", "30"), ("model.n_heads", str(HUGE)),
])  # fmt: skip
def test_the_answer_comes_within_a_second_of_start_up(name, value):
    """Against a process that only imports the command line; the better of two tries, as others use this machine too."""

    def seconds(code: str, *args: str) -> tuple[float, subprocess.CompletedProcess]:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
        )
        return time.perf_counter() - start, done

    args = ("train", f"--config={TINY}", "--workdir=/nonexistent/never", f"--config.{name}={value}")
    bare = min(seconds("import uoe_jax.cli")[0] for _ in range(2))
    tries = [seconds("from uoe_jax.cli import console; console()", *args) for _ in range(2)]
    assert all(refused(done.returncode, done.stderr, [name]) for _, done in tries), tries
    assert min(t for t, _ in tries) - bare < 1


@pytest.mark.parametrize("name,text,value", [
    ("train.steps", "1_000", 1000), ("train.steps", " 5 ", 5), ("train.steps", "+5", 5), ("eval.every", "-0", 0),
    ("model.bias", "TRUE", True), ("model.dropout", "-0.0", 0.0), ("optimizer.learning_rate", "1E-3", 1e-3),
    ("optimizer.learning_rate", "1", 1.0), ("train.seed", str(HUGE), HUGE), ("data.path", "", ""), ("data.path", "ünï", "ünï"),
    ("generate.prompt", "a=b", "a=b"), ("mesh.data", "-1", -1),
])  # fmt: skip
def test_odd_but_clear_values_are_taken(name, text, value):
    twice = [
        f"--config.{name}={text}",
        f"--config.{name}",
        text,
    ]  # the same value twice is no contradiction
    found = cli.load_config(TINY, cli._overrides(twice, argparse.Namespace(takes_config=True)))
    assert {key: v for key, v, _ in config.leaves(found)}[name] == value


@pytest.mark.parametrize(
    "name", ["x" * 5000, "~nobody-of-this-name/c.py", "no\nfile", "", ":", "/", "tests"]
)
def test_config_names_that_cannot_be(capsys, name):
    assert cli.main(["train", f"--config={name}", "--workdir=/nonexistent/never"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("uoe: --config=") and "no such file" in err and err.count("\n") == 1


def test_values_in_a_config_file_are_held_to_the_same_rules(tmp_path, capsys):
    for line, named in (("c.train.steps = 10**12", "config.train.steps"), ("c.optimizer.eps = 10**300", "config.optimizer.eps"),
                        ("c = type(c)({'train': 3})", "config.train=3"), ("c.model.d_hidden = 66", "d_hidden=66")):  # fmt: skip
        text = f"from uoe_jax import config\ndef get_config():\n    c = config.base()\n    {line}\n    return c"
        (tmp_path / "c.py").write_text(text)
        args = [
            "train",
            f"--config={tmp_path / 'c.py'}",
            "--workdir=/nonexistent/never",
            "--config.train.seed=1",
        ]
        assert cli.main(args) == 2, line
        err = capsys.readouterr().err
        assert named in err and err.count("\n") == 1, (line, err)


def valid(rng: random.Random, causal: bool = True) -> dict[str, Any]:
    """A random configuration that keeps every rule, for eight devices: {key: value}."""
    pick = rng.choice
    c: dict[str, Any] = {"model.causal": causal, "train.steps": 2}
    for name in ("bias", "qk_norm", "tie_embeddings"):
        c[f"model.{name}"] = pick((True, False))
    for name in ("activation", "norm", "position", "dtype", "remat"):
        c[f"model.{name}"] = pick(TABLE[f"model.{name}"].split("|"))
    attention, mlp = pick(("smha", "smha", "dense")), pick(("uome", "uome", "dense"))
    kv, group = pick((1, 2, 4, 4)), pick((1, 1, 2))
    heads, width = kv * group, pick((2, 4, 8) if c["model.position"] == "rope" else (1, 2, 3, 8))
    n = {"smha": pick([d for d in (1, 2, 4, kv, kv) if kv % d == 0]), "uome": pick((1, 2, 3, 4, 4))}
    d_model, d_hidden = heads * width, n["uome"] * pick((1, 2, 6))
    patch = {"smha": pick((1, 1, 2, 3)), "uome": pick((1, 1, 2, 4))}
    length = math.lcm(*patch.values()) * pick((2, 4, 5, 8))
    c |= {
        "model.n_layers": pick((1, 2)), "model.n_heads": heads, "model.n_kv_heads": kv if group > 1 else pick((0, kv)),
        "model.d_model": d_model, "model.d_hidden": d_hidden, "model.context_length": length, "model.attention": attention,
        "model.mlp": mlp, "model.vocab_size": pick((0, 257, 300)), "model.norm_eps": pick((1.2e-38, 1e-6, 1.0)),
        "model.rope_theta": pick((1, 1e4, 1e12)), "model.dropout": pick((0, 0.1, 0.99)),
        "model.attention_dropout": pick((0, 0.1)), "optimizer.schedule": pick(("cosine", "linear")), "model.cutoffs": pick(("", "20,100")),
    }  # fmt: skip
    expert = pick([e for e in (1, 2, 2, 4, 4) if cuts_evenly(e, n, kv, d_hidden, attention, mlp)])
    fsdp = pick([f for f in (1, 2, 4) if d_model % f == 0 and f * expert <= 8])
    replica = pick([r for r in (1, 2) if r * fsdp * expert <= 8])
    parts = 8 // expert
    own, microbatches = pick((1, 2, 4)), pick((1, 1, 2, 3))
    c |= {
        "mesh.expert": expert, "mesh.fsdp": fsdp, "mesh.replica": replica, "mesh.data": pick((-1, parts // fsdp // replica)),
        "mesh.sequence_parallel": length % expert == 0 and pick((True, False)),
        "train.batch_size": own * parts * microbatches, "train.accumulation": microbatches,
        "eval.batch_size": pick((0, parts, 3 * parts)),
    }  # fmt: skip
    for block in ("smha", "uome"):
        k = rng.randint(1, n[block])
        gates = ["sigmoid", "score", "straight_through", "none", *["normalized"] * (k > 1)]
        r = {
            "n_experts": n[block], "k": k, "patch_size": patch[block], "gate": pick(gates), "order": pick(("gather", "project")),
            "capacity_factor": pick((1.2e-38, 0.3, 1.0, 1.3, 1e6)), "capacity_window": pick((1, 2, 7, 64, 100_000)),
            "dispatch": pick(("auto", "inverse", "scatter", "onehot")), "router_bias": pick((True, False)), "router_noise": pick((0, 0.5, 1e3)),
            "balance_weight": pick((0, 0.01, 1)), "z_weight": pick((0, 1e-3)), "bias_rate": pick((0, 0.01, 1)),
            "sequence_group": HUGE,
        }  # fmt: skip
        if not causal:
            r |= {
                "unit": pick(("patch", "sequence", "hierarchical")),
                "priority": pick(("position", "score")),
            }
            if r["unit"] != "patch":
                r |= {"sequence_capacity_factor": pick((0, 0.01, 1.25, 1e6)), "sequence_group": own}
                if (
                    r["sequence_capacity_factor"] and r["dispatch"] == "onehot"
                ):  # which has a row for every sequence
                    r["dispatch"] = "inverse"
        c |= {f"model.{block}.{name}": value for name, value in r.items()}
    room = length - 2  # the separator, and a token to draw
    c |= {
        "optimizer.learning_rate": pick((1.2e-38, 1e-3, 1e-2)), "optimizer.warmup_steps": pick((0, 1, 2, 100, HUGE)),
        "optimizer.decay_steps": pick((0, 1, 50, HUGE)), "optimizer.final_fraction": pick((0, 0.1, 1)),
        "optimizer.weight_decay": pick((0, 0.1)), "optimizer.b1": pick((0, 0.9, 0.999999)), "optimizer.b2": pick((0, 0.95, 0.999999)),
        "optimizer.eps": pick((1e-8, 1)), "optimizer.clip_norm": pick((0, 1e-30, 1, 1e9)), "train.seed": pick((0, HUGE)),
        "train.log_every": pick((1, HUGE)), "train.stop_after": pick((0, 0, 1, HUGE)), "train.deterministic": pick((True, False)),
        "eval.every": pick((0, 1, HUGE)), "eval.batches": pick((0, 1, HUGE)), "checkpoint.every": pick((0, 1, HUGE)),
        "checkpoint.keep_latest": pick((1, 2, HUGE)), "checkpoint.keep_best": pick((0, 1, HUGE)),
        "guard.spike_sigmas": pick((0, 1e6)), "guard.max_bad_steps": pick((1, HUGE)), "guard.rollbacks": pick((0, 1000)),
        "guard.hang_timeout_s": pick((0, 300)), "guard.compile_timeout_s": pick((0, 1800)), "guard.peer_timeout_s": pick((1, 1e5)),
        "generate.prompt": pick(("", "d", "é" * 20, "def f(x):"))[: room // 2], "generate.max_tokens": pick((1, 3, HUGE)),
        "generate.temperature": pick((0, 1.2e-38, 0.7, 1e3)), "generate.top_k": pick((0, 1, 5, HUGE)),
        "generate.top_p": pick((1.2e-38, 0.9, 1)), "generate.seed": pick((0, HUGE)),
    }  # fmt: skip
    return c


def cuts_evenly(
    expert: int, n: dict[str, int], kv: int, d_hidden: int, attention: str, mlp: str
) -> bool:
    """Whether both blocks can be cut in so many parts."""
    a, m = n["smha"] if attention == "smha" else kv, n["uome"] if mlp == "uome" else d_hidden
    return a % expert == 0 and m % expert == 0


def test_a_window_longer_than_the_row_takes_no_memory():
    chosen = jax.ShapeDtypeStruct((2, 8, 4), bool)
    assert str(HUGE) not in str(jax.make_jaxpr(lambda a: keep_by_position(a, HUGE, 1))(chosen))


@pytest.fixture
def as_commands_run(request):
    """jax as a command sets it up: promotion as usual, and what one sitting compiled is there for the next."""
    patience = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", patience)
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()  # what fifty configurations compile takes gigabytes


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "files", 90)


WHOLE_RUNS, STEPS_ALONE = (3, 7, 11), range(12, 24)  # 11: float16, two sittings


@pytest.mark.slow
@pytest.mark.parametrize("seed", WHOLE_RUNS)
def test_valid_configurations_train(seed, source, tmp_path, capsys, as_commands_run):
    """Two steps, in one sitting or two: finite, saved, and there is nothing left to do."""
    values = valid(random.Random(seed)) | {"data.path": source}
    overrides = {name: str(value) for name, value in values.items()}
    print(
        " ".join(f"--config.{name}={value!r}" for name, value in overrides.items())
    )  # shown where it fails
    assert train(cli.load_config(TINY, overrides), str(tmp_path / "run"), sample) == 0
    if values["train.stop_after"] == 1:
        overrides["train.stop_after"] = "0"
        assert train(cli.load_config(TINY, overrides), str(tmp_path / "run"), sample) == 0
    lines = metric_lines(tmp_path / "run")
    trained = [line["train/loss"] for line in lines if "train/loss" in line]
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert (
        trained
        and evaluated
        and lines[-1]["step"] == 2
        and np.isfinite([*trained, *evaluated]).all()
    ), lines
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert "nothing left" not in capsys.readouterr().err
    assert train(cli.load_config(TINY, overrides), str(tmp_path / "run"), sample) == 0
    assert "nothing left to train, 2 of 2 steps are done" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("seed", STEPS_ALONE)
def test_valid_models_train(seed):
    """Two steps without a run; half of them with what a language model may not have, as it looks at later tokens."""
    rng = random.Random(seed)
    values: dict[str, Any] = {}
    drawn = valid(rng, causal=seed % 2 == 0) | {"model.vocab_size": 11}
    for name, value in (drawn | {"model.cutoffs": drawn["model.cutoffs"] and "2,7"}).items():
        *parents, last = name.split(".")
        section = values
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    print(json.dumps(values))
    c = config.from_dict(values)
    mesh = mesh_lib.make_mesh(c.mesh)
    shape = (c.train.batch_size, c.model.context_length)
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(0, 11, shape)
    batch = {
        "tokens": tokens,
        "targets": tokens,
        "segments": np.ones(shape),
        "positions": np.arange(shape[1]) + np.zeros(shape),
    }
    batch = {name: a.astype(np.int32) for name, a in batch.items()} | {
        "n_bytes": np.full(shape[0], shape[1], np.int32)
    }
    with jax.set_mesh(mesh):
        program = build(c, mesh)
        state = program.init(jax.random.key(c.train.seed))
        for _ in range(2):
            state, found = program.train_step(state, mesh_lib.put_batch(mesh, batch))
    assert (
        int(state.step) == 2
        and np.isfinite(float(found["sums"].nll))
        and np.isfinite(float(found["grad_norm"]))
    )

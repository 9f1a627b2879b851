"""Configuration fuzzing: hundreds of wrong overrides each get their sentence.

What is wrong is known from the table of rules below, written from the documentation and not read from the library.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import subprocess
import sys
import time
from typing import Any, Iterator

from fuzz_rules import HUGE, RULES, TABLE
from helpers import TINY, environment

from uoe_jax import cli, config

NO_NUMBERS = (
    "", " ", "abc", "None", "true", "0x10", "1,000", "5 6", "1/2", "٣", "５", "--5", "[5]", "1__0", "_1", "'5'", "5\n6",
)  # fmt: skip
NO_WHOLE = ("1.5", "5.0", "1e3", "nan", "inf", "9" * 5000, *map(str, (HUGE + 1, 10**18, -(10**30))))
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
    given = json.loads(done.stdout)
    assert given["late"] == []
    answers = list(zip(cases, given["found"], strict=True))
    wrong = [
        (case.args, code, err[:300])
        for case, (code, err, _) in answers
        if not refused(code, err, case.keys)
    ]
    assert not wrong, f"{len(wrong)} of {len(cases)}: {wrong[:20]}"
    slow = [(case.args, seconds) for case, (_, _, seconds) in answers if seconds > 1]
    assert not slow


def test_the_answer_comes_within_a_second_of_start_up():
    """Against a process that only imports the command line; the best of several tries, as others use this machine too."""

    def seconds(code: str, *args: str) -> tuple[float, subprocess.CompletedProcess]:
        start, command = time.perf_counter(), [sys.executable, "-c", code, *args]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, timeout=60
        )
        return time.perf_counter() - start, done

    bare = min(seconds("import uoe_jax.cli")[0] for _ in range(2))
    took = []
    for name, value in (
        ("model.uome.capacity_factor", "nan"),
        ("train.stepz", "3"),
        ("model.d_model", "30"),
        ("model.n_heads", str(HUGE)),
    ):
        args = ["train", f"--config={TINY}", "--workdir=/nonexistent/never"]
        code = "from uoe_jax.cli import console; console()"
        time_of_one, done = seconds(code, *args, f"--config.{name}={value}")
        assert refused(done.returncode, done.stderr, [name]), done
        took.append(time_of_one)
    assert min(took) - bare < 1


ODD_BUT_CLEAR = [
    ("train.steps", "1_000", 1000), ("train.steps", " 5 ", 5), ("train.steps", "+5", 5), ("eval.every", "-0", 0),
    ("model.bias", "TRUE", True), ("model.dropout", "-0.0", 0.0), ("optimizer.learning_rate", "1E-3", 1e-3),
    ("optimizer.learning_rate", "1", 1.0), ("train.seed", str(HUGE), HUGE), ("data.path", "", ""), ("data.path", "ünï", "ünï"),
    ("generate.prompt", "a=b", "a=b"), ("mesh.data", "-1", -1),
]  # fmt: skip


def test_odd_but_clear_values_are_taken():
    for name, text, value in ODD_BUT_CLEAR:
        # the same value twice is no contradiction
        twice = [f"--config.{name}={text}", f"--config.{name}", text]
        for args in (twice, cli._joined(twice)):
            overrides = cli._overrides(args, argparse.Namespace(takes_config=True))
            found = cli.load_config(TINY, overrides)
            assert {key: v for key, v, _ in config.leaves(found)}[name] == value


def test_config_names_that_cannot_be(capsys):
    for name in ("x" * 5000, "~nobody-of-this-name/c.py", "no\nfile", "", ":", "/", "tests"):
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

"""ListOps: right values, the published grammar and lengths, and the same example for a seed and an index anywhere."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import listops_baseline
from uoe_jax.config.data import ListopsConfig
from uoe_jax.data.sources.listops import SYMBOLS, open_listops, share_within_limits, to_text
from uoe_jax.errors import ConfigError

REPO = Path(__file__).resolve().parent.parent
SHORT = {"min_length": 10, "max_length": 128}

# Frequencies of the values 0 … 9 and of the root's number of arguments 2 … 10 under the published rules: 30,000
# expressions of a recursive generator written from LRA's file for this purpose (Python's random, one draw per node;
# it kept one draw in 12.18 with the default limits, and one in 19.73 with SHORT). Standard errors are below 0.0022.
PUBLISHED = {
    "values": [0.1692, 0.0919, 0.0744, 0.0813, 0.0894, 0.0866, 0.0785, 0.0736, 0.0855, 0.1696],
    "short values": [
        0.1529,
        0.0970,
        0.0836,
        0.0836,
        0.0894,
        0.0898,
        0.0798,
        0.0777,
        0.0919,
        0.1545,
    ],
    "arguments": [0.0442, 0.0645, 0.0814, 0.1018, 0.1160, 0.1334, 0.1427, 0.1550, 0.1610],
    "length": (1033.6, 701, 952, 1308),  # mean and quartiles
}


def evaluate(text: str) -> tuple[int, int, int]:
    """Value, depth of operators, and most arguments of an expression, by a stack over its words."""
    stack: list[list] = [[]]
    depth = most = 0
    for word in text.split():
        if word.startswith("["):
            stack.append([word[1:]])
            depth = max(depth, len(stack) - 1)
        elif word == "]":
            name, *args = stack.pop()
            assert len(args) >= 2
            most = max(most, len(args))
            args.sort()
            middle = len(args) // 2
            median = args[middle] if len(args) % 2 else (args[middle - 1] + args[middle]) / 2
            stack[-1].append(
                {"MIN": args[0], "MAX": args[-1], "MED": int(median), "SM": sum(args) % 10}[name]
            )
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return value, depth, most


def draw(n: int, split: str = "train", **keys: int) -> list[tuple[np.ndarray, int]]:
    examples = open_listops(ListopsConfig(**keys)).examples(split)
    return [(example.inputs[0], example.label) for example in (examples[i] for i in range(n))]


@pytest.fixture(scope="module")
def default() -> list[tuple[np.ndarray, int]]:
    return draw(4000)


def check(
    drawn: list[tuple[np.ndarray, int]], above: int, below: int, depth: int, args: int
) -> None:
    deepest = most = 0
    for ids_T, label in drawn:
        assert ids_T.dtype == np.uint8 and ids_T.ndim == 1 and above < len(ids_T) < below
        text = to_text(ids_T)
        assert [SYMBOLS.index(word) for word in text.split()] == ids_T.tolist()
        value, d, a = evaluate(text)
        assert value == label and type(label) is int
        deepest, most = max(deepest, d), max(most, a)
    assert (deepest, most) == (depth, args)


def frequencies(of: list[int], among: range) -> list[float]:
    return [of.count(i) / len(of) for i in among]


def root_args(ids_T: np.ndarray) -> int:
    return listops_baseline.root(ids_T)[1]


# ---- what is generated ---------------------------------------------------------------------------------------------


def test_every_expression_has_the_value_of_its_label(default):
    check(
        default[:1000], 500, 2000, depth=9, args=10
    )  # LRA's root is at depth 1, and at depth 10 are only digits
    check(draw(1000, **SHORT), 10, 128, depth=9, args=10)
    check(draw(200, min_length=3, max_length=60, max_depth=3, max_args=4), 3, 60, depth=2, args=4)


def test_the_reference_evaluates_known_expressions():
    for text, value in [("[MED 3 4 ]", 3), ("[MED 9 0 5 ]", 5), ("[MED 9 8 0 1 ]", 4), ("[SM 9 9 2 ]", 0),
                        ("[MIN 7 [MAX 2 [SM 8 7 ] ] 6 ]", 5), ("[MAX [MIN 1 2 ] [MED 1 2 ] 0 ]", 1)]:  # fmt: skip
        assert evaluate(text)[0] == value


def test_values_lengths_and_roots_are_distributed_as_published(default):
    # 4,000 draws: standard errors up to 0.006, so that these bounds are four of them and more.
    values = frequencies([label for _, label in default], range(10))
    np.testing.assert_allclose(values, PUBLISHED["values"], atol=0.025)
    arguments = frequencies([root_args(ids_T) for ids_T, _ in default], range(2, 11))
    np.testing.assert_allclose(arguments, PUBLISHED["arguments"], atol=0.025)
    lengths = [len(ids_T) for ids_T, _ in default]
    found = (np.mean(lengths), *np.quantile(lengths, [0.25, 0.5, 0.75]))
    np.testing.assert_allclose(found, PUBLISHED["length"], rtol=0.05)
    operators = frequencies([int(ids_T[0]) for ids_T, _ in default], range(11, 15))
    np.testing.assert_allclose(operators, 0.25, atol=0.03)
    short = [label for _, label in draw(4000, **SHORT)]
    np.testing.assert_allclose(frequencies(short, range(10)), PUBLISHED["short values"], atol=0.025)


def test_the_chance_of_a_length_is_exact():
    # LRA draws a digit three times in four; the rest is what `share_within_limits` speaks of.
    assert share_within_limits(ListopsConfig()) == pytest.approx(4 / 12.1794, rel=0.02)
    assert share_within_limits(ListopsConfig(**SHORT)) == pytest.approx(4 / 19.7334, rel=0.02)
    # By hand: four tokens are an operator over two digits: one of nine numbers of arguments, and two digits.
    assert share_within_limits(ListopsConfig(min_length=3, max_length=5)) == pytest.approx(
        0.75**2 / 9
    )
    assert share_within_limits(
        ListopsConfig(min_length=3, max_length=5, max_depth=2)
    ) == pytest.approx(1 / 9)
    assert share_within_limits(
        ListopsConfig(min_length=1, max_length=2000, max_depth=3)
    ) == pytest.approx(1)


# ---- by index ------------------------------------------------------------------------------------------------------


def test_an_example_is_a_function_of_seed_split_and_index_alone():
    keys = {**SHORT, "seed": 7}
    here = [(to_text(ids_T), label) for ids_T, label in draw(20, "test", **keys)]
    code = (
        "from uoe_jax.config.data import ListopsConfig; from uoe_jax.data.sources.listops import open_listops, to_text\n"
        f"e = open_listops(ListopsConfig(**{keys})).examples('test')\n"
        "print([(to_text(e[i].inputs[0]), e[i].label) for i in reversed(range(20))][::-1])"
    )
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONHASHSEED": hash_seed}
        out = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout
        assert out.strip() == repr(here)
    more = draw(20, "test", **keys, n_train=5, n_eval=20)
    assert [
        (to_text(ids_T), label) for ids_T, label in more
    ] == here  # the sizes of the splits move nothing
    for other in (draw(20, "train", **keys), draw(20, "test", **SHORT, seed=8)):
        assert not {to_text(ids_T) for ids_T, _ in other} & {
            text for text, _ in here if len(text) > 60
        }


def test_examples_do_not_move():
    """If this fails, every figure measured on ListOps means something else: raise listops.VERSION."""
    found = [(to_text(ids_T), label) for ids_T, label in draw(2, min_length=8, max_length=16)]
    assert found == [("[MED 4 7 3 2 7 8 0 0 6 ]", 4), ("[SM 9 3 9 9 8 7 0 [MAX 4 9 4 6 ] ]", 4)]


def test_no_expression_is_in_two_splits():
    # Four tokens: 400 expressions, so without the rule about checksums nearly all would be everywhere.
    keys = {"min_length": 3, "max_length": 5}
    splits = ("train", "validation", "test")
    seen = {split: {to_text(ids_T) for ids_T, _ in draw(1000, split, **keys)} for split in splits}
    sizes = [len(texts) for texts in seen.values()]
    assert sum(sizes) == len(set().union(*seen.values())) <= 400 and min(sizes) > 50
    long = [to_text(ids_T) for split in seen for ids_T, _ in draw(200, split)]
    assert len(set(long)) == 600


def test_splits_have_their_sizes_and_their_names():
    source = open_listops(ListopsConfig(n_train=3, n_eval=2))
    assert [len(source.examples(split)) for split in ("train", "validation", "test")] == [3, 2, 2]
    for i in (-1, 2):
        with pytest.raises(IndexError):
            source.examples("test")[i]
    with pytest.raises(ValueError):
        source.examples("dev")
    assert (
        source.n_classes == 10 and source.vocab_size == len(SYMBOLS) == 16 and SYMBOLS[0] == "<pad>"
    )
    assert source.record()["seed"] == 0 and source.record()["max_length"] == 2000


def test_text_of_padded_and_of_wrong_ids():
    assert to_text([12, 5, 1, 15, 0, 0]) == "[MAX 4 0 ]"
    with pytest.raises(ValueError, match="16"):
        to_text([16])


# ---- limits that cannot be met -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"min_length": 2000, "max_length": 500}, "max_length=500: .*min_length=2000"),
        ({"min_length": 500, "max_length": 501}, "max_length=501: .*at least 502"),
        ({"max_depth": 1}, "min_length=500: .*max_depth=1 .*none"),
        ({"max_depth": 3}, "min_length=500: .*max_depth=3 .*none"),  # at most 122 tokens
        (
            {"max_depth": 3, "min_length": 90, "max_length": 130},
            "min_length=90: .*one in 8,3\\d\\d,",
        ),
        (
            {"max_args": 2, "min_length": 500, "max_length": 600},
            "min_length=500: .*max_args=2, none",
        ),
        ({"max_length": 4, "min_length": 1}, "min_length=1: .*none"),
        ({"max_length": 10**9}, "max_length=1000000000: give at most 32768"),
        (
            {"max_depth": 100, "max_args": 100, "max_length": 32768, "min_length": 10**4},
            "max_args=100, ",
        ),
    ],
)
def test_lengths_the_grammar_does_not_reach_are_refused_at_once(keys, named):
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=named):
        open_listops(ListopsConfig(**keys))
    assert time.perf_counter() - began < 1


def test_rare_lengths_that_are_allowed_still_come():
    keys = {"max_depth": 3, "min_length": 47, "max_length": 60}
    assert 0.001 < share_within_limits(ListopsConfig(**keys)) < 0.02
    check(draw(20, **keys), 47, 60, depth=2, args=10)


# ---- the bar -------------------------------------------------------------------------------------------------------


def test_baseline_predicts_from_the_root_alone():
    def counted(text: str) -> tuple[str, int]:
        return listops_baseline.root(
            np.array([SYMBOLS.index(word) for word in text.split()], np.uint8)
        )

    assert counted("[MAX [MIN 1 2 ] 3 [SM 4 [MED 5 6 ] ] ]") == ("MAX", 3)
    assert counted("[SM 1 2 ]") == ("SM", 2)
    scores = listops_baseline.measure(ListopsConfig(**SHORT, n_train=2000, n_eval=1000))
    train, test = draw(2000, **SHORT), draw(1000, "test", **SHORT)
    table = collections.defaultdict(collections.Counter)
    for ids_T, label in train:
        value = to_text(ids_T).split()
        table[value[0], root_args(ids_T)][label] += 1
    hits = [
        table[to_text(ids_T).split()[0], root_args(ids_T)].most_common(1)[0][0] == label
        for ids_T, label in test
    ]
    assert scores["accuracy"] == pytest.approx(np.mean(hits), abs=0.01)  # ties may break otherwise
    # Minima and maxima of many digits are mostly 0 and 9; sums are uniform.
    by_operator = scores["by_operator"]
    assert (
        by_operator["SM"] < 0.2
        and scores["majority"] + 0.1 < scores["accuracy"] < by_operator["MAX"]
    )

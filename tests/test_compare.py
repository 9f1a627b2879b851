"""`uoe compare`: tables load and are matched, are refused with a sentence, survive stops, and hold what was measured."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import json
import math
import shutil
import signal
import threading
import time

import jax
import pytest
from helpers import ROOT, environment, uoe_process

from uoe_jax import cli
from uoe_jax.compare import measure as measuring
from uoe_jax.compare import presets
from uoe_jax.compare import run as running
from uoe_jax.compare.measure import against, at_length, drawn_batch, measure
from uoe_jax.compare.report import spread, write
from uoe_jax.compare.run import claim, planned_runs, search_rates
from uoe_jax.compare.table import load_table
from uoe_jax.compare.workspace import best_rates, is_finished, results
from uoe_jax.config import to_dict, with_vocabulary
from uoe_jax.costs.flops import attention_flops, ends_flops, mlp_flops, train_flops
from uoe_jax.data.pipeline import TrainBatches, default_cache_dir, load
from uoe_jax.workdir import locate, wait_for_writer

TABLES = sorted(path.stem for path in (ROOT / "configs" / "compare").glob("*.py"))
LAPTOP = ("digits", "listops", "lm_stdlib")


def whole_width(row) -> int:
    """Hidden units of all of a row's MLP, routed and shared."""
    return row.config.model.routed_hidden + row.config.model.whole_hidden


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_matched_by_width(name):
    found = load_table(f"compare/{name}", {})
    assert (
        found.config.match == "width"
        and found.config.seeds == 3
        and found.reference.name == "full_attention"
    )
    first = found.rows[0].config
    for row in found.rows:
        assert abs(whole_width(row) - first.model.d_hidden) < presets.hidden_parts(
            to_dict(row.config)["model"]
        ), row.name
        for part in (
            "data",
            "optimizer",
            "train",
            "eval",
            "augment",
        ):  # what is not the architecture is the same
            assert getattr(row.config, part) == getattr(first, part), (row.name, part)

        def shape(c):
            return (
                c.d_model,
                c.n_layers,
                c.n_heads,
                c.context_length,
                c.norm,
                c.position,
                c.dropout,
                c.dtype,
            )

        assert shape(row.config.model) == shape(first.model), row.name


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_matched_by_operations(name):
    found = load_table(f"compare/{name}", {"match": "flops"})

    def operations(m) -> float:
        """FLOPs without the vocabulary scores of a language model, whose size is not known before the data is read."""
        ends = ends_flops(m, m.block_length) if m.task == "classify" else 0
        return (
            m.rows_per_example
            * m.n_layers
            * (attention_flops(m, m.block_length) + mlp_flops(m, m.block_length))
            + ends
        )

    target = operations(found.reference.config.model)
    assert target > 0
    for row in found.rows:
        m = row.config.model
        miss = operations(m) / target - 1
        assert row.miss == pytest.approx(miss, abs=1e-9)
        smallest = presets.hidden_parts(to_dict(row.config)["model"])
        wider = dataclasses.replace(
            m,
            d_hidden=m.d_hidden + smallest,
            moe=dataclasses.replace(m.moe, d_expert=m.moe.d_expert + 1),
        )
        half_step = (operations(wider) - operations(m)) / target / 2
        assert abs(miss) < 0.02 or abs(miss) < half_step + 1e-9 or m.d_hidden <= 2 * smallest, (
            row.name,
            miss,
        )  # the attention alone costs more


def test_the_small_tables_hold_what_the_paper_and_the_design_name():
    rows = {name: {row.preset for row in load_table(f"compare/{name}", {}).rows} for name in LAPTOP}
    gates = {f"gate_{gate}" for gate in presets.GATES if gate != "sigmoid"}  # sigmoid is the base's
    assert gates <= rows["lm_stdlib"] & rows["digits"]
    assert {"full_attention", "xmoe", "deepseek_moe", "deepseek_v3", "skywork_moe", "uoe"} <= rows[
        "lm_stdlib"
    ] & rows["digits"]
    assert {
        "linformer",
        "nystromformer",
        "performer",
        "reformer",
        "expert_choice",
        "uoe",
        "full_attention",
    } <= rows["listops"]
    for name in LAPTOP:
        assert {"smha_only", "uome_only"} <= rows[name]
    assert {"no_balance", "switch_balance", "bias_balance"} <= rows["lm_stdlib"]
    assert sum(row.startswith("capacity") for row in rows["lm_stdlib"]) >= 3
    for name in LAPTOP:
        short = load_table(f"compare/{name}:short", {})
        assert short.config.seeds == 1 and len(short.rows) < len(rows[name])


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"seeds": "0"}, "config.seeds=0"),
        ({"seeds": "two"}, "config.seeds='two'"),
        ({"sedes": "2"}, "the nearest known key is config.seeds"),
        ({"base.train.step": "2"}, "config.train.step: unknown key"),
        ({"base.train.steps": "x"}, "config.train.steps='x'"),
        ({"rows": "uoe,perciever"}, "'perciever' is none of"),
        ({"rows": "uoe"}, "config.reference='full_attention': is none of the rows uoe"),
        ({"match": "weight"}, "config.match='weight'"),
        ({"learning_rates": "0.1,fast"}, "config.learning_rates='0.1,fast'"),
        ({"lengths": "64,-1"}, "config.lengths='64,-1'"),
        (
            {"learning_rates": "0.0010000001,0.0010000002"},
            "config.learning_rates='0.0010000001,0.0010000002': give each once",
        ),
        ({"base.model.n_heads": "3"}, "config.model.n_heads=3"),
        ({"learning_rates": "10000"}, "config.optimizer.learning_rate=10000.0"),
        (
            {"search_steps": "801"},
            "config.search_steps=801: a try is no longer than a run; give at most 800",
        ),
        ({"lengths": "100000000"}, "config.lengths='100000000'"),
        (
            {"length_rows": "uoe,mamba"},
            "config.length_rows='uoe,mamba': 'mamba' is none of the rows",
        ),
        ({"base.train.stop_after": "5"}, "config.base.train.stop_after=5"),
        ({"base.model.mlp": "xmoe"}, "config.base.model.mlp='xmoe': no row takes it"),
        ({"base.model.moe.k": "9"}, "config.base.model.moe.k=9: no row takes it"),
        (
            {"base.model.performer.features": "3"},
            "config.base.model.performer.features=3: no row takes it",
        ),
        ({"base.model.n_kv_heads": "2"}, "config.model.smha.n_experts=4"),
        ({"base.train.seed": "7"}, "config.base.train.seed=7: every row is trained with the seeds"),
        (
            {"base.optimizer.learning_rate": "0.02"},
            "config.base.optimizer.learning_rate=0.02: it is searched for",
        ),
        ({"base.model.d_hidden": "4"}, "config.model.d_hidden=4: (in the row 'expert_choice')"),
    ],
)
def test_what_cannot_be_a_table_is_refused(overrides, said, capsys):
    args = [f"--config.{key}={value}" for key, value in overrides.items()]
    assert cli.main(["compare", "--config=compare/digits", "--workdir=/proc/never", *args]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and err.startswith("uoe: "), err


def test_an_experiment_is_no_table_and_a_table_no_experiment(capsys):
    assert cli.main(["compare", "--config=digits", "--workdir=/proc/never"]) == 2
    assert "is no table of rows" in capsys.readouterr().err
    assert cli.main(["train", "--config=compare/digits", "--workdir=/proc/never"]) == 2
    assert "use uoe compare" in capsys.readouterr().err


def a_run(place, config, value: float, seed_lines: int = 2) -> None:
    """The metrics of a finished run of a classifier."""
    place.mkdir(parents=True)
    steps = config.train.steps
    lines = [
        {
            "step": steps * i // seed_lines,
            "eval/loss": 2.0,
            "eval/accuracy": value / 2 + value / 2 * i / seed_lines,
        }
        for i in range(1, seed_lines + 1)
    ]
    lines.append({"step": steps, "test/loss": 1.0, "test/accuracy": value, "test/step": steps})
    (place / "config.json").write_text(json.dumps(to_dict(config)))
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_table_is_made_of_what_was_measured(tmp_path):
    """From runs whose figures are known: means, spreads, order, a row that diverged, one that is not finished."""
    found = load_table("compare/digits", {"seeds": "2", "rows": "full_attention,uoe,xmoe,switch"})
    workdir = locate(str(tmp_path))
    claim(found, workdir)
    rates = {slug: {"0.001": 1.0, "0.003": 2.0} for slug in ("full-attention", "uoe", "xmoe")} | {
        "switch": {"0.001": None, "0.003": None}
    }
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    rates = best_rates(rates)
    assert rates == {"full-attention": 0.001, "uoe": 0.001, "xmoe": 0.001, "switch": None}
    values = {"full-attention": (0.8, 0.9), "uoe": (0.95, 0.93), "xmoe": (None, 0.5)}
    planned = list(planned_runs(found, workdir, rates))  # no rate suits switch: it is not trained
    assert [p.what for p in planned][:4] == [
        "full_attention, seed 0",
        "uoe, seed 0",
        "xmoe, seed 0",
        "full_attention, seed 1",
    ]
    assert {p.config.train.seed for p in planned} == {0, 1} and {
        p.config.optimizer.learning_rate for p in planned
    } == {0.001}
    for p in planned:
        seed = p.config.train.seed
        assert not is_finished(p.config, p.workdir)
        if values[p.row.slug][seed] is not None:
            a_run(
                tmp_path / "rows" / p.row.slug / f"seed_{seed}", p.config, values[p.row.slug][seed]
            )
            assert is_finished(p.config, p.workdir)
    place = tmp_path / "rows" / "xmoe" / "seed_0"
    place.mkdir()
    (place / "diverged").write_text("")
    got = {r.name: r for r in results(workdir, found.config.seeds)}
    assert set(got) == {"full_attention", "uoe", "xmoe", "switch"} and got["switch"].diverged == 2
    assert (
        got["uoe"].finals == {0: 95.0, 1: 93.0}
        and got["xmoe"].finals == {1: 50.0}
        and got["xmoe"].diverged == 1
    )
    text = write(found, workdir)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "| uoe",
        "| full_attention",
        "| xmoe",
        "| switch",
    ]
    assert (
        "94.00 ± 1.41" in lines[2]
        and "85.00 ± 7.07" in lines[3]
        and "1 (1 diverged)" in lines[4]
        and "| diverged |" in lines[5]
    )
    assert all(line.endswith("| 0.001 |") for line in lines[2:5]) and lines[5].endswith("| none |")
    assert "not measured" in lines[2]
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["row"], int(r["seed"]), float(r["value"])) for r in rows] == [
        ("full_attention", 0, 80.0), ("full_attention", 1, 90.0), ("uoe", 0, 95.0), ("uoe", 1, 93.0), ("xmoe", 1, 50.0)
    ]  # fmt: skip
    (tmp_path / "rows" / "uoe" / "seed_0" / "metrics.jsonl").unlink()
    (tmp_path / "rows" / "uoe" / "seed_0" / "diverged").write_text("")
    (tmp_path / "rows" / "uoe" / "seed_1" / "metrics.jsonl").unlink()
    (tmp_path / "rows" / "uoe" / "seed_1" / "diverged").write_text("")
    gone = next(r for r in results(workdir, found.config.seeds) if r.name == "uoe")
    assert (gone.finals, gone.diverged, gone.rate) == (
        {},
        2,
        0.001,
    )  # the rate it was trained with, not the experiment's
    assert (tmp_path / "steps.png").read_bytes()[:4] == b"\x89PNG"
    assert spread([], 2) == "diverged" and spread([1.0], 1) == "1.0"
    # Another table in the same place is refused; more seeds and rows are not.
    claim(load_table("compare/digits", {"seeds": "3"}), workdir)
    with pytest.raises(
        cli.UserError,
        match="config.learning_rates='0.1': the table in this workdir has '0.001,0.003'",
    ):
        claim(load_table("compare/digits", {"learning_rates": "0.1"}), workdir)
    with pytest.raises(
        cli.UserError,
        match="config.base.train.steps=7: the row 'full_attention' of the table in this workdir has 800",
    ):
        claim(load_table("compare/digits", {"base.train.steps": "7"}), workdir)
    claim(
        load_table("compare/digits", {"base.train.log_every": "7"}), workdir
    )  # a run may change it as well
    with pytest.raises(
        cli.UserError,
        match="config.base.eval.test=False: the row 'full_attention' of the table in this workdir has True",
    ):
        claim(
            load_table("compare/digits", {"base.eval.test": "False"}), workdir
        )  # a run may, but two measures are no table
    scheduled = {
        "base.optimizer.decay_steps": "800",
        "base.train.steps": "1600",
    }  # a run may go on then, but no table has two lengths
    (tmp_path / "other").mkdir()
    claim(
        load_table("compare/digits", {"base.optimizer.decay_steps": "800"}),
        locate(str(tmp_path / "other")),
    )
    with pytest.raises(
        cli.UserError,
        match="config.base.train.steps=1600: the row 'full_attention' of the table in this workdir has 800",
    ):
        claim(load_table("compare/digits", scheduled), locate(str(tmp_path / "other")))
    (tmp_path / "table.json").write_text("{")
    with pytest.raises(cli.UserError, match="cannot be read"):
        claim(found, workdir)


def test_no_row_is_trained_on_half_a_search(tmp_path, monkeypatch):
    """A try that is stopped stops the table, and the next call makes the same try."""
    found = load_table("compare/digits", {"seeds": "1", "rows": "full_attention,uoe"})
    ended, tried = [75, 0, 0, 76, 76], []

    class Children(running.Children):
        def run(self, command, what):
            tried.append(what)
            code = ended.pop(0)
            if code == 75:
                raise running.Ended(75)
            if code == 0:
                place = (
                    tmp_path
                    / "rows"
                    / ("uoe" if what.startswith("uoe") else "full-attention")
                    / f"rate_{what.split()[-1]}"
                )
                place.mkdir(parents=True)
                rate = float(what.split()[-1])  # the last evaluation of the larger one is no number
                line = {
                    "step": found.search_steps,
                    "eval/loss": rate if rate == 0.001 else math.nan,
                    "eval/accuracy": 0.5,
                }
                (place / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            else:
                (tmp_path / "rows" / "uoe" / f"rate_{what.split()[-1]}").mkdir(parents=True)
            return code

    workdir = locate(str(tmp_path))
    with pytest.raises(running.Ended, match="75"):
        search_rates(found, workdir, Children())
    assert search_rates(found, workdir, Children()) == {"full-attention": 0.001, "uoe": None}
    assert tried == [f"full_attention, learning rate {r}" for r in ("0.001", "0.001", "0.003")] + [
        f"uoe, learning rate {r}" for r in ("0.001", "0.003")
    ]


@pytest.mark.parametrize(
    "name, content",
    [("rates.json", {"uoe": []}), ("rates.json", {"uoe": {"fast": 1.0}}), ("rates.json", {"uoe": {"0.001": "x"}}), ("table.json", {"a": 1}),
     ("table.json", {"match": "width", "reference": "full_attention", "learning_rates": "0.001,0.003", "search_steps": 0, "rows": {"uoe": {}}})],
)  # fmt: skip
def test_what_others_wrote_is_no_traceback(tmp_path, name, content):
    found = load_table("compare/digits", {"seeds": "1", "rows": "full_attention,uoe"})
    (tmp_path / name).write_text(json.dumps(content))
    with (
        running.Children() as children,
        pytest.raises(cli.UserError, match=rf"{name}: .*; remove it and what it is about"),
    ):
        claim(found, locate(str(tmp_path)))
        search_rates(found, locate(str(tmp_path)), children)


def test_a_run_that_outlived_its_table_is_waited_for(tmp_path):
    workdir = locate(str(tmp_path))
    wait_for_writer(workdir, 60, lambda: False)  # nobody ever wrote there
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        wait_for_writer(workdir, 60, lambda: True)  # asked to stop
        start = time.monotonic()
        wait_for_writer(workdir, 0.3, lambda: False)
        assert time.monotonic() - start >= 0.3
        threading.Timer(0.5, fcntl.flock, (held, fcntl.LOCK_UN)).start()
        start = time.monotonic()
        wait_for_writer(workdir, 60, lambda: False)
        assert 0.4 < time.monotonic() - start < 30
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and it keeps nobody out


def test_a_table_whose_reference_diverged_says_so(tmp_path):
    found = load_table("compare/digits", {"seeds": "1", "rows": "full_attention,uoe"})
    with (
        running.Children() as children,
        pytest.raises(cli.UserError, match="row 'full_attention': every learning rate diverged"),
    ):
        running.measure(found, locate(str(tmp_path)), children)


def test_a_child_that_fails_is_an_error_and_one_that_stops_a_stop():
    with running.Children() as children:
        assert children.run(["json.tool", "--help"], "fine") == 0
        with pytest.raises(
            cli.UserError,
            match="odd: ended with exit code 1 .above.; fix that and run the same command again",
        ):
            children.run(["uoe_jax.no_such_module"], "odd")
        children.stopped = True
        with pytest.raises(running.Ended, match="75"):
            children.run(["json.tool", "--help"], "late")


def test_bad_input_that_a_child_finds_is_reported_once(tmp_path):
    """Text without a word in it, which is seen only where it is read."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("")
    args = [
        "compare",
        "--config=compare/lm_stdlib:tiny",
        f"--workdir={tmp_path / 'table'}",
        "--config.rows=full_attention",
    ]
    args += ["--config.base.data.source=text", f"--config.base.data.path={tmp_path / 'texts'}"]
    done = uoe_process(*args, cwd=tmp_path)
    out, err = done.communicate(timeout=300)
    said = [line for line in err.splitlines() if line.startswith("uoe: ")]
    assert done.returncode == 2 and len(said) == 1 and "texts" in said[0], (done.returncode, err)


def test_rows_differ_in_their_blocks_alone(tmp_path):
    """Sizes follow the changes of a row, and what is not of its blocks is refused."""

    def rows(text: str):
        body = "from uoe_jax.compare.table import experiment, table\ndef get_config():\n    return table(experiment('digits:tiny'), {'full_attention': {}, %s}, seeds=1)"
        (tmp_path / "t:1.py").write_text(body % text)
        return load_table(str(tmp_path / "t:1.py"), {}).rows  # a colon in the path

    wide = rows("'a': {'preset': 'switch', 'model.moe.n_experts': 16}")[1]
    assert whole_width(wide) == 48 and wide.config.model.d_expert == 3 and wide.miss == 0
    odd = rows("'a': {'preset': 'switch', 'model.moe.n_experts': 5}")[1]
    assert whole_width(odd) == 45 and odd.miss == pytest.approx(-3 / 48)  # and is marked
    assert rows("'a': {'preset': 'moh', 'model.moh.n_shared': 0}")[1].config.model.moh.n_shared == 0
    for shared, chosen in ((0, 2), (1, 2), (2, 2)):  # of 4 heads: half of the others, at least two
        assert (
            rows(f"'a': {{'preset': 'moh', 'model.moh.n_shared': {shared}}}")[1].config.model.moh.k
            == chosen
        )
    for preset in (
        "deepseek_moe",
        "deepseek_v3",
        "xmoe",
    ):  # whatever their experts, they have slots for all
        for more in ("", ", 'model.moe.n_experts': 10, 'model.moe.k': 3"):
            c = rows(f"'a': {{'preset': '{preset}'{more}}}")[1].config.model
            assert c.routed()[c.mlp].slot_tokens(64) == 64, (preset, more)
    assert (
        rows("'a': {'preset': 'switch', 'model.moe.capacity_window': 2}")[
            1
        ].config.model.moe.capacity_window
        == 2
    )
    for change in (
        "'preset': 'switch', 'model.moh.k': 3",
        "'preset': 'performer', 'model.linformer.rank': 7",
        "'preset': 'switch', 'model.smha.gate': 'none'",
    ):
        with pytest.raises(
            cli.UserError,
            match=r"config.rows: model.\w+.\w+=.*which read nothing of it; leave it out",
        ):
            rows(f"'a': {{{change}}}")
    for change in (
        "'train.steps': 7",
        "'optimizer.learning_rate': 0.1",
        "'model.d_hidden': 96",
        "'model.moe.d_expert': 9",
    ):
        with pytest.raises(cli.UserError, match="would differ in more than its blocks"):
            rows(f"'a': {{'preset': 'switch', {change}}}")
    refused = {
        "'a': {'preset': 'switch', 'model.moe.n_experts': 0}": "config.rows: model.moe.n_experts=0: give at least 1",
        "'a': {'preset': 'deepseek_moe', 'model.moe.k': '2'}": "config.rows: model.moe.k='2': give a value of type int",
        "'a': {'preset': 'moh', 'model.moh.n_shared': 4}": "config.rows: model.moh.n_shared=4: .in the row 'moh'. tokens choose among the other heads; give less than 4",
        "'a': {'preset': None}": "config.rows: None is no preset",
        "3: {'preset': 'switch'}": "config.rows: 3 is no name",
        f"'{'a' * 300}': {{'preset': 'switch'}}": "give one of at most 200 characters",
    }
    for text, said in refused.items():
        with pytest.raises(cli.UserError, match=said):
            rows(text)


def test_an_ablation_of_unions_needs_unions():
    dense = to_dict(load_table("compare/digits:tiny", {}).reference.config)["model"]
    assert (dense["attention"], dense["mlp"]) == ("dense", "dense")
    for name in ("gate_none", "capacity_2.0", "hierarchical", "no_balance"):
        with pytest.raises(
            cli.UserError,
            match=f"config.rows={name!r}: changes unions of experts, and its blocks are dense . dense",
        ):
            presets.apply(name, dense)
        assert presets.apply(name, dense | {"mlp": "uome"})["mlp"] == "uome"


def test_training_is_counted_by_the_lengths_of_its_batches():
    """Batches that are padded to several lengths: their operations are those of the arrays that a step is given."""
    found = load_table(
        "compare/listops:tiny", {"rows": "full_attention,uoe", "base.train.steps": "12"}
    )
    c = found.reference.config
    assert c.data.buckets > 1
    data = load(c, default_cache_dir())
    batches = TrainBatches(data.train, c.train.batch_size, 0, window=c.data.sort_window)
    widths = [batches[i]["inputs"].shape[1] for i in range(c.train.steps)]
    assert len(set(widths)) > 1
    lengths = measuring.batch_lengths(c)
    in_front = c.model.block_length - c.model.context_length
    for row in found.rows:
        want = sum(
            train_flops(row.config.model, c.train.batch_size, w + in_front) for w in widths
        ) / len(widths)
        sized = with_vocabulary(row.config, data.vocab_size)
        counted = measuring.counts(sized, lengths)["train_flops_per_step"]
        assert counted == pytest.approx(want) and counted < train_flops(
            row.config.model, c.train.batch_size
        )
    whole = load_table("compare/digits:tiny", {}).reference.config
    assert measuring.batch_lengths(whole) == {whole.model.block_length: 1}


def test_a_directory_without_a_table_is_not_measured(tmp_path):
    with pytest.raises(cli.UserError, match="holds no table.json; give the directory of a table"):
        measure(str(tmp_path))


def test_times_are_compared_within_a_round():
    """A machine that is twice as slow in some rounds changes no ratio."""
    found = against([0.5, 1.0, 0.5, 2.0], [1.0, 2.0, 1.0, 4.0])
    assert found == {"seconds": 0.75, "ratio": 0.5, "ratio_low": 0.5, "ratio_high": 0.5}


def test_seconds_are_the_ratio_of_the_references(monkeypatch):
    """Rows are not measured at the same moment: the reference is slower beside one of them, and no row is shown so."""

    class Step:
        bytes, moments = (
            1,
            iter([2.0] * 6 + [8.0, 4.0] * 3),
        )  # beside itself, then beside a row that takes half as long

        def __init__(self, config):
            pass

        def seconds(self):
            return next(self.moments)

    monkeypatch.setattr(measuring, "Step", Step)
    found, failed = measuring.side_by_side({"dense": None, "half": None}, "dense", 2)
    assert not failed
    assert (found["dense"]["seconds"], found["half"]["ratio"], found["half"]["seconds"]) == (
        2.0,
        0.5,
        1.0,
    )


def test_rows_that_cannot_run_are_left_out(tmp_path, monkeypatch, capfd):
    """One that was not trained to its end, and one for which two models at a time are too much; the table is made without them."""
    found = load_table(
        "compare/digits:tiny",
        {"seeds": "1", "rows": "full_attention,uoe,xmoe,switch", "learning_rates": ""},
    )
    workdir = locate(str(tmp_path))
    claim(found, workdir)
    for planned in planned_runs(found, workdir, {}):
        a_run(planned.workdir, planned.config, 0.5)
    (tmp_path / "rows" / "xmoe" / "seed_0" / "metrics.jsonl").unlink()

    class Step:
        bytes = 1

        def __init__(self, config):
            assert config.model.mlp != "xmoe"
            self.mlp = config.model.mlp

        def seconds(self):
            if self.mlp == "token_choice":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")
            return 1.0

    monkeypatch.setattr(measuring, "Step", Step)
    monkeypatch.setattr(measuring.setup, "start", lambda config: None)
    measure(str(tmp_path))
    measured = json.loads((tmp_path / "measured.json").read_text())
    assert measured["rows"].keys() == {"full-attention", "uoe"}
    assert measured["refused"] == [
        ["switch", found.reference.config.model.context_length, "RESOURCE_EXHAUSTED: Out of memory"]
    ]
    assert "switch is not measured: RESOURCE_EXHAUSTED: Out of memory\n" in capfd.readouterr().err
    text = write(found, workdir)
    assert (
        "| switch | 50.00 | 1 | not measured |" in text
        and "- Not measured at 4 tokens: switch (RESOURCE" in text
        and "xmoe" not in text
    )


def test_a_length_is_another_model_of_one_row():
    row = load_table("compare/listops:tiny", {}).rows[0]
    config = at_length(row.config, 128)
    assert (config.model.context_length, config.train.batch_size) == (128, 1)
    known = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=16))
    batch = drawn_batch(known)
    assert batch["inputs"].shape == (1, 128) and batch["inputs"].max() < 16


def test_operations_are_matched_on_a_mesh_too():
    found = load_table(
        "compare/digits",
        {"match": "flops", "rows": "full_attention,moh,gate_none", "base.mesh.expert": "2"},
    )
    assert all(row.config.model.d_hidden % 2 == 0 and abs(row.miss) < 0.02 for row in found.rows)


@pytest.mark.slow
def test_a_table_from_nothing_to_the_end_with_a_stop_in_between(tmp_path):
    """Real processes: SIGTERM while a row trains gives 75, the same command goes on, and a third time trains nothing."""
    args = [
        "compare", "--config=compare/digits:tiny", f"--workdir={tmp_path / 'table'}", "--config.rows=full_attention,uoe",
        "--config.base.train.steps=30", "--config.learning_rates=0.001,0.003",
    ]  # fmt: skip
    env = environment(UOE_CACHE=str(tmp_path / "cache"))
    process = uoe_process(*args, env=env)
    first = tmp_path / "table" / "rows" / "uoe" / "seed_0" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not first.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert not (tmp_path / "table" / "table.md").exists()
    process = uoe_process(*args, env=env)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    assert (
        "full_attention, seed 0" not in err and "uoe, seed 0" in err
    )  # what was finished is not started again
    assert "| uoe " in out and (tmp_path / "table" / "table.md").exists()
    measured = json.loads((tmp_path / "table" / "measured.json").read_text())
    assert set(measured["rows"]) == {"full-attention", "uoe"}
    assert all(row["ratio"] > 0 and row["bytes"] > 0 for row in measured["rows"].values())
    rates = json.loads((tmp_path / "table" / "rates.json").read_text())
    assert all(set(tried) == {"0.001", "0.003"} for tried in rates.values())
    shutil.rmtree(tmp_path / "table" / "rows" / "uoe" / "seed_0")
    process = uoe_process(*args, env=env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and err.count("== ") == 2, (
        err
    )  # the row that was lost, and the measurement

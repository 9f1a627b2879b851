"""A table to make: which architectures, from one experiment, matched how, with how many seeds. No jax is needed to check it.

A config file under configs/compare/ returns `table(base, rows, …)`. A row is a preset (`compare.presets`) and changes of its blocks'
own sections beyond it:

    rows={"full_attention": {}, "uoe gate score": {"preset": "uoe", "model.smha.gate": "score", "model.uome.gate": "score"}}

`preset` is the row's name where it is left out. What is not of the blocks is the same in all rows.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from typing import Any, Mapping, NamedTuple

from uoe_jax import config as config_lib
from uoe_jax.compare import presets
from uoe_jax.config.baselines import SECTIONS
from uoe_jax.config.fields import checked, key, leaves, parsed
from uoe_jax.config.load import evaluate, put
from uoe_jax.config.schema import Config
from uoe_jax.config.validate import check_training
from uoe_jax.data.registry import known_vocabulary
from uoe_jax.errors import ConfigError, UserError

MOST_TOKENS = 1 << 20
LONGEST_NAME = 200
SMALLEST_MISS = 0.02  # of the operations, or of the hidden units: beyond it, a row that should be matched is said not to be


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """What a table says beside its experiment (`base`) and its rows."""

    title: str = key("", "heading of the table")
    seeds: int = key(
        3, "runs of each row, with seeds 0, 1, …: initialisation and data order", low=1, high=100
    )
    match: str = key(
        "width", "rows have the reference's hidden width (and a mixture's experts together have it), or its operations",
        choices=("width", "flops"),
    )  # fmt: skip
    reference: str = key("full_attention", "the row that others are matched to and compared with")
    learning_rates: str = key(
        "", "tried for every row alike, such as '0.001,0.003'; empty: that of the base"
    )
    search_steps: int = key(0, "steps of each try, with seed 0; 0: a quarter of the run's", low=0)
    rounds: int = key(15, "interleaved measurements of a step's time", low=1, high=1000)
    lengths: str = key(
        "",
        "context lengths at which a step of one row is measured, such as '64,128,256'; empty: none",
    )
    length_rows: str = key(
        "", "the rows that are measured at these lengths, with commas between them; empty: all"
    )


class Row(NamedTuple):
    """One architecture: its name, its configuration (seed and learning rate are those of the base), and what it misses.

    miss: how far its operations (of all but the words), or where rows are matched by width its hidden units, are from the reference's,
      relative to them.
    """

    name: str
    preset: str
    config: Config
    miss: float

    @property
    def slug(self) -> str:
        """The name as a directory."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-.") or "row"


class Table(NamedTuple):
    config: TableConfig
    rows: tuple[Row, ...]

    @property
    def reference(self) -> Row:
        return next(row for row in self.rows if row.name == self.config.reference)

    @property
    def rates(self) -> tuple[float, ...]:
        """Learning rates to try; empty: none but the base's."""
        return numbers("config.learning_rates", self.config.learning_rates, float)

    @property
    def lengths(self) -> tuple[int, ...]:
        return numbers("config.lengths", self.config.lengths, int)

    @property
    def search_steps(self) -> int:
        return self.config.search_steps or max(1, self.rows[0].config.train.steps // 4)


def table(base: Any, rows: Mapping[str, Mapping[str, Any]] | tuple[str, ...], **more: Any) -> Any:
    """What a config file of a table returns: an `ml_collections.ConfigDict`; more: keys of `TableConfig`."""
    from ml_collections import ConfigDict

    rows = rows if isinstance(rows, Mapping) else {name: {} for name in rows}
    given = dataclasses.asdict(TableConfig()) | more
    # Names of rows may hold dots, which a ConfigDict takes for paths: a list.
    return ConfigDict(
        given
        | {
            "base": base.to_dict(),
            "rows": [[name, dict(changes)] for name, changes in rows.items()],
        }
    )


def experiment(name: str, variant: str = "") -> Any:
    """The configuration of a shipped config file as a `ConfigDict`, to make a table of: 'digits', 'lra_listops:short'.

    variant: of the table; the `tiny` one is made of the file's own.
    """
    from ml_collections import ConfigDict

    return ConfigDict(evaluate(f"{name.partition(':')[0]}:tiny" if variant == "tiny" else name))


def load_table(name: str, overrides: Mapping[str, str]) -> Table:
    """Reads a table's config file, with overrides `base.KEY`, `rows=NAME,NAME` (some of them), and keys of `TableConfig`.

    Raises:
      UserError: it is no table; an unknown key or row; two rows of one name; a row whose configuration cannot be used.
    """
    values = evaluate(
        name, "it must define get_config() that returns uoe_jax.compare.table.table(base, rows)"
    )
    if not isinstance(values.get("rows"), list) or not isinstance(values.get("base"), Mapping):
        raise UserError(
            f"--config={name}: is no table of rows; train it with uoe train, or give one of configs/compare/"
        )
    base, rows, given = (
        values.pop("base"),
        {n: dict(changes) for n, changes in values.pop("rows")},
        values,
    )
    for row in rows:
        if not isinstance(row, str):
            raise UserError(f"config.rows: {row!r} is no name; give text")
    asked, every = {}, tuple(rows)
    for key_, text in overrides.items():
        if key_.startswith("base."):
            name_of = key_.removeprefix("base.")
            asked[name_of] = config_lib.parse_value(name_of, text)
            put(base, name_of, asked[name_of])
        elif key_ == "rows":
            rows = _some(rows, text)
        else:
            given[key_] = _parsed(key_, text)
    config = _table_config(given)
    for name in filter(None, config.length_rows.split(",")):
        if name not in every:
            raise ConfigError(
                "config.length_rows",
                config.length_rows,
                f"{name!r} is none of the rows {', '.join(every)}",
            )
    if config.reference not in rows:
        raise ConfigError(
            "config.reference", config.reference, f"is none of the rows {', '.join(rows)}"
        )
    found = Table(config, tuple(_rows(base, rows, config)))
    _check(found, asked)
    slugs = [row.slug for row in found.rows]
    for row in found.rows:
        if slugs.count(row.slug) > 1:
            raise ConfigError(
                "config.rows", row.name, "two rows would have one directory; give another name"
            )
        if len(row.slug) > LONGEST_NAME:
            raise ConfigError(
                "config.rows",
                row.name,
                f"is a directory's name, too; give one of at most {LONGEST_NAME} characters",
            )
    return found


def _check(table: Table, asked: Mapping[str, Any]) -> None:
    """What a row would be refused for only when it is its turn, and what would change nothing."""
    reference, steps = table.reference.config, table.reference.config.train.steps
    if reference.train.stop_after:
        raise ConfigError(
            "config.base.train.stop_after",
            reference.train.stop_after,
            "a table is made to its end; leave it out",
        )
    if "train.seed" in asked:
        raise ConfigError(
            "config.base.train.seed",
            asked["train.seed"],
            "every row is trained with the seeds 0, 1, …; give config.seeds",
        )
    if "optimizer.learning_rate" in asked and table.rates:
        remedy = "it is searched for; give config.learning_rates, or that as '' to train all rows with one"
        raise ConfigError(
            "config.base.optimizer.learning_rate", asked["optimizer.learning_rate"], remedy
        )
    if table.config.match == "flops" and reference.mesh.expert == -1:
        raise ConfigError(
            "config.base.mesh.expert",
            -1,
            "widths that match operations must be a multiple of it; give the number",
        )
    if table.config.search_steps > steps:
        raise ConfigError(
            "config.search_steps",
            table.config.search_steps,
            f"a try is no longer than a run; give at most {steps}",
        )
    for rate in table.rates:
        values = config_lib.to_dict(reference)
        values["optimizer"]["learning_rate"] = rate
        _validated(table.config.reference, values)
    if len({f"{rate:g}" for rate in table.rates}) < len(table.rates):
        raise ConfigError(
            "config.learning_rates",
            table.config.learning_rates,
            "give each once; six digits of it count",
        )
    if any(length > MOST_TOKENS for length in table.lengths):
        raise ConfigError(
            "config.lengths", table.config.lengths, f"give at most {MOST_TOKENS} tokens"
        )
    used = [{name: value for name, value, _ in leaves(row.config)} for row in table.rows]
    for name, value in asked.items():
        if name in ("model.attention", "model.mlp") or all(own[name] != value for own in used):
            raise ConfigError(
                f"config.base.{name}",
                value,
                "no row takes it: presets set it, or no row has such a block; change the rows",
            )


def _rows(
    base: dict[str, Any], rows: Mapping[str, Mapping[str, Any]], config: TableConfig
) -> list[Row]:
    base = config_lib.to_dict(
        config_lib.from_dict(base)
    )  # every key, so that presets find their sections
    reference = _values(base, config.reference, rows[config.reference])
    whole = _validated(config.reference, reference)
    target = _operations(whole)
    out = []
    for name, changes in rows.items():
        values = _values(base, name, changes)
        if config.match == "flops" and name != config.reference:
            values = _matched(base, name, changes, target)
        found = _validated(name, values)
        own, wanted = (
            (_operations(found), target)
            if config.match == "flops"
            else (found.model.all_hidden, whole.model.all_hidden)
        )
        miss = own / wanted - 1
        out.append(Row(name, changes.get("preset", name), found, miss))
    return out


def _values(
    base: Mapping[str, Any], name: str, changes: Mapping[str, Any], d_hidden: int = 0
) -> dict[str, Any]:
    """A row's configuration as nested dicts; d_hidden: in place of the base's; 0: that."""
    preset = changes.get("preset", name)
    if not isinstance(preset, str):
        raise UserError(f"config.rows: {preset!r} is no preset; give the name of one")
    if preset not in presets.PRESETS:
        near = difflib.get_close_matches(preset, presets.PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"config.rows: {preset!r} is no preset; the nearest is {near!r}")
    model = base["model"] | ({"d_hidden": d_hidden} if d_hidden else {})
    own = {key_: value for key_, value in changes.items() if key_ != "preset"}
    for key_, value in own.items():
        if key_ not in config_lib.ALL_KEYS:
            raise config_lib.unknown_key(key_)
        if (
            key_.removeprefix("model.").split(".")[0] not in SECTIONS.values()
            or key_ == "model.moe.d_expert"
        ):
            remedy = f"the row {name!r} would differ in more than its blocks; give keys of {', '.join(sorted(set(SECTIONS.values())))}"
            raise ConfigError(f"config.rows: {key_}", value, remedy)
        default, meta = config_lib.DECLARED[key_]
        own[key_] = checked(
            f"config.rows: {key_}", type(default), value, meta
        )  # before sizes follow from it
    return {
        **base,
        "model": presets.apply(
            preset, model, {key_.removeprefix("model."): value for key_, value in own.items()}
        ),
    }


def _matched(
    base: Mapping[str, Any], name: str, changes: Mapping[str, Any], target: float
) -> dict[str, Any]:
    """A row's configuration with the hidden width at which a forward pass costs what the reference's does.

    Operations are linear in the width of an MLP, of experts and of unions alike.
    """
    values = _values(base, name, changes)
    # Devices divide what they are given; as many as one device of the mesh may have are one step.
    step = math.lcm(presets.hidden_parts(values["model"]), max(1, values["mesh"]["expert"]))
    alone = {**base, "mesh": {}}
    low, high = (
        _operations(config_lib.from_dict(_values(alone, name, changes, n * step)))
        for n in (1, 1001)
    )
    parts = max(1, round(1 + (target - low) / (high - low) * 1000))
    return _values(base, name, changes, parts * step)


def _operations(config: Config) -> float:
    """Of a forward pass without the words' scores: how many words there are is not known before the data is read."""
    from uoe_jax.costs.flops import forward_flops

    return forward_flops(dataclasses.replace(config.model, vocab_size=0, cutoffs=""))


def _validated(name: str, values: Mapping[str, Any]) -> Config:
    try:
        config = config_lib.from_dict(values)
        check_training(config, *known_vocabulary(config))
        return config
    except ConfigError as error:
        remedy = str(error).removeprefix(f"{error.key}={error.value!r}: ")
        raise ConfigError(error.key, error.value, f"(in the row {name!r}) {remedy}") from error
    except UserError as error:
        raise UserError(f"row {name!r}: {error}") from error


def _some(rows: dict[str, Any], text: str) -> dict[str, Any]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in rows:
            raise ConfigError("config.rows", text, f"{name!r} is none of {', '.join(rows)}")
    return {name: rows[name] for name in names}


FIELDS = {field.name: field for field in dataclasses.fields(TableConfig)}


def _table_config(given: Mapping[str, Any]) -> TableConfig:
    for name in given:
        if name not in FIELDS:
            raise _unknown(name)
    return TableConfig(
        **{
            n: checked(f"config.{n}", type(FIELDS[n].default), v, FIELDS[n].metadata)
            for n, v in given.items()
        }
    )


def _parsed(name: str, text: str) -> Any:
    if name not in FIELDS:
        raise _unknown(name)
    return parsed(f"config.{name}", type(FIELDS[name].default), text)


def _unknown(name: str) -> UserError:
    known = [*FIELDS, "rows", *(f"base.{key_}" for key_ in config_lib.ALL_KEYS)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return UserError(
        f"config.{config_lib.printable(name)}: unknown key of a table; the nearest known key is config.{near}"
    )


def numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """Comma-separated positive numbers; ConfigError where they are none."""
    try:
        found = tuple(kind(part) for part in text.split(",")) if text else ()
    except ValueError:
        found = (0,)
    if any(not 0 < n < 1e9 for n in found):
        raise ConfigError(name, text, "give positive numbers with commas between them")
    return found

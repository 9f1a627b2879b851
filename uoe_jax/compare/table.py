"""A table to make: which architectures, from one experiment, matched how, with how many seeds.

A config file under configs/compare/ returns `table(base, rows, …)`. A row is a preset
(`compare.presets`, by default that of its name) and changes of its own blocks' sections:

    rows={"full_attention": {}, "uoe score": {"preset": "uoe", "model.smha.gate": "score"}}

All else is the same in all rows. No jax is imported.
"""

import dataclasses
import difflib
import math
import re
from typing import Any, Iterable, Iterator, Mapping, NamedTuple

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
SMALLEST_MISS = 0.02  # of the FLOPs or hidden units; a row that misses by more is marked
Changes = Mapping[str, Any]  # of a row, by dotted key


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableConfig:
    """What a table says beside its experiment (`base`) and its rows."""

    title: str = key("", "heading of the table")
    seeds: int = key(
        3, "runs of each row, with seeds 0, 1, …: initialisation and data order", low=1, high=100
    )
    match: str = key(
        "width",
        "rows have the reference's hidden width (a mixture's experts together), or its FLOPs",
        choices=("width", "flops"),
    )
    reference: str = key("full_attention", "the row that others are matched to and compared with")
    learning_rates: str = key(
        "", "tried for every row alike, such as '0.001,0.003'; empty: that of the base"
    )
    search_steps: int = key(0, "steps of each try, with seed 0; 0: a quarter of the run's", low=0)
    rounds: int = key(15, "interleaved measurements of a step's time", low=1, high=1000)
    lengths: str = key(
        "", "context lengths at which a step of one row is measured, such as '64,128'; empty: none"
    )
    length_rows: str = key(
        "", "the rows that are measured at these lengths, with commas between them; empty: all"
    )


DECLARED = {name: meta for name, _, meta in leaves(TableConfig())}


class Row(NamedTuple):
    """One architecture."""

    name: str
    preset: str
    config: Config  # with the seed and learning rate of the base
    miss: float  # relative difference from the reference in what rows are matched by

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
    def search_steps(self) -> int:
        return self.config.search_steps or max(1, self.rows[0].config.train.steps // 4)


def table(base: Any, rows: Mapping[str, Changes] | tuple[str, ...], **more: Any) -> Any:
    """What a table's config file returns, a `ConfigDict`. more: keys of `TableConfig`."""
    from ml_collections import ConfigDict

    rows = rows if isinstance(rows, Mapping) else {name: {} for name in rows}
    # A list, because a ConfigDict takes dots in the names of rows for paths.
    listed = [[name, dict(changes)] for name, changes in rows.items()]
    given = dataclasses.asdict(TableConfig()) | more
    return ConfigDict(given | {"base": base.to_dict(), "rows": listed})


def experiment(name: str, variant: str = "") -> Any:
    """A shipped config file to make a table of, a `ConfigDict`; tiny if that `variant` is."""
    from ml_collections import ConfigDict

    return ConfigDict(evaluate(f"{name.partition(':')[0]}:tiny" if variant == "tiny" else name))


def load_table(name: str, overrides: Mapping[str, str]) -> Table:
    """Reads a table's config file. overrides: `base.KEY`, `rows=NAME,…`, keys of `TableConfig`."""
    must = "it must define get_config() that returns uoe_jax.compare.table.table(base, rows)"
    values = evaluate(name, must)
    if not isinstance(values.get("rows"), list) or not isinstance(values.get("base"), Mapping):
        remedy = "train it with uoe train, or give one of configs/compare/"
        raise UserError(f"--config={name}: is no table of rows; {remedy}")
    base, asked = values.pop("base"), {}
    rows = known = {n: dict(changes) for n, changes in values.pop("rows")}
    for row in rows:
        if not isinstance(row, str):
            raise UserError(f"config.rows: {row!r} is no name; give text")
    for key_, text in overrides.items():
        if key_.startswith("base."):
            inner = key_.removeprefix("base.")
            asked[inner] = config_lib.parse_value(inner, text)
            put(base, inner, asked[inner])
        elif key_ == "rows":
            names = [part.strip() for part in text.split(",")]
            _refuse_others("rows", text, names, known)
            rows = {n: known[n] for n in names}
        else:
            values[key_] = parsed(f"config.{key_}", text, _declared(key_))
    values = {n: checked(f"config.{n}", value, _declared(n)) for n, value in values.items()}
    config = TableConfig(**values)
    chosen = [n for n in config.length_rows.split(",") if n]
    _refuse_others("length_rows", config.length_rows, chosen, known)
    remedy = f"is none of the rows {', '.join(rows)}"
    _refuse(config.reference not in rows, "reference", config.reference, remedy)
    found = Table(config, tuple(_rows(base, rows, config)))
    _check(found, asked)
    return found


def _check(table: Table, asked: Mapping[str, Any]) -> None:
    """Refuses what would fail only when a row's turn comes, and overrides that change nothing."""
    c, reference, rate_key = table.config, table.reference.config, "optimizer.learning_rate"
    stop, steps = reference.train.stop_after, reference.train.steps
    _refuse(stop, "base.train.stop_after", stop, "a table is made to its end; leave it out")
    remedy = "every row is trained with the seeds 0, 1, …; give config.seeds"
    _refuse("train.seed" in asked, "base.train.seed", asked.get("train.seed"), remedy)
    remedy = "it is searched for; give config.learning_rates, or '' for that to train all with one"
    _refuse(rate_key in asked and table.rates, f"base.{rate_key}", asked.get(rate_key), remedy)
    remedy = "widths that match FLOPs must be a multiple of it; give the number"
    _refuse(c.match == "flops" and reference.mesh.expert == -1, "base.mesh.expert", -1, remedy)
    remedy = f"a try is no longer than a run; give at most {steps}"
    _refuse(c.search_steps > steps, "search_steps", c.search_steps, remedy)
    for rate in table.rates:
        checked(f"config.{rate_key}", rate, config_lib.DECLARED[rate_key])
    equal = len({f"{rate:g}" for rate in table.rates}) < len(table.rates)
    _refuse(equal, "learning_rates", c.learning_rates, "give each once; six digits of it count")
    is_long = max(numbers("config.lengths", c.lengths, int), default=0) > MOST_TOKENS
    _refuse(is_long, "lengths", c.lengths, f"give at most {MOST_TOKENS} tokens")
    used = [{name: value for name, value, _ in leaves(row.config)} for row in table.rows]
    remedy = "no row takes it: presets set it, or no row has such a block; change the rows"
    for name, value in asked.items():
        unused = all(own[name] != value for own in used)
        _refuse(unused or name in ("model.attention", "model.mlp"), f"base.{name}", value, remedy)
    slugs = [row.slug for row in table.rows]
    same = "two rows would have one directory; give another name"
    long = f"is a directory's name, too; give one of at most {LONGEST_NAME} characters"
    for row in table.rows:
        _refuse(slugs.count(row.slug) > 1, "rows", row.name, same)
        _refuse(len(row.slug) > LONGEST_NAME, "rows", row.name, long)


def _refuse(wrong: object, key_: str, value: object, remedy: str) -> None:
    if wrong:
        raise ConfigError(f"config.{key_}", value, remedy)


def _refuse_others(key_: str, text: str, names: list[str], known: Iterable[str]) -> None:
    for name in names:
        _refuse(name not in known, key_, text, f"{name!r} is none of the rows {', '.join(known)}")


def _rows(base: dict[str, Any], rows: Mapping[str, Changes], config: TableConfig) -> Iterator[Row]:
    """The rows, with hidden widths that match them to the reference."""
    by_flops, reference = config.match == "flops", config.reference
    base = config_lib.to_dict(config_lib.from_dict(base))  # every key: presets find their sections
    whole = _validated(reference, _values(base, reference, rows[reference]))

    def size(c: Config) -> float:
        return _flops(c) if by_flops else c.model.routed_hidden + c.model.whole_hidden

    for name, changes in rows.items():
        width = 0  # that of the base
        if by_flops and name != reference:
            width = _matched_width(base, name, changes, size(whole))
        found = _validated(name, _values(base, name, changes, width))
        yield Row(name, changes.get("preset", name), found, size(found) / size(whole) - 1)


def _values(base: Changes, name: str, changes: Changes, d_hidden: int = 0) -> dict[str, Any]:
    """A row's configuration as nested dicts. d_hidden: in place of the base's, if not 0."""
    preset = changes.get("preset", name)
    if str(preset) not in presets.PRESETS:
        near = difflib.get_close_matches(str(preset), presets.PRESETS, n=1, cutoff=0.0)[0]
        raise UserError(f"config.rows: {preset!r} is no preset; the nearest is {near!r}")
    own, sections = {}, {*SECTIONS.values()}
    for key_, value in changes.items():
        if key_ == "preset":
            continue
        if key_ not in config_lib.ALL_KEYS:
            raise config_lib.unknown_key(key_)
        inner = key_.removeprefix("model.")
        why = f"the row {name!r} would differ in more than its blocks"
        remedy = f"{why}; give keys of {', '.join(sorted(sections))}"
        other = inner.split(".")[0] not in sections or inner == "moe.d_expert"
        _refuse(other, f"rows: {key_}", value, remedy)
        # Checked before sizes follow from it.
        own[inner] = checked(f"config.rows: {key_}", value, config_lib.DECLARED[key_])
    model = base["model"] | ({"d_hidden": d_hidden} if d_hidden else {})
    return {**base, "model": presets.apply(preset, model, own)}


def _matched_width(base: Changes, name: str, changes: Changes, target: float) -> int:
    """The hidden width at which a row's forward pass costs `target` FLOPs, linear in the width."""
    parts = presets.hidden_parts(_values(base, name, changes)["model"])
    step = math.lcm(parts, max(1, base["mesh"]["expert"]))  # devices divide the width, too

    def cost(width: int) -> float:
        return _flops(config_lib.from_dict(_values({**base, "mesh": {}}, name, changes, width)))

    low, high = cost(step), cost(1001 * step)
    return step * max(1, round(1 + (target - low) / (high - low) * 1000))


def _flops(config: Config) -> float:
    """Of a forward pass without the vocabulary's scores: its size is known when data is read."""
    from uoe_jax.costs.flops import forward_flops

    return forward_flops(dataclasses.replace(config.model, vocab_size=0, cutoffs=""))


def _validated(name: str, values: Mapping[str, Any]) -> Config:
    try:
        config = config_lib.from_dict(values)
        check_training(config, *known_vocabulary(config))
        return config
    except UserError as error:
        raise UserError(f"row {name!r}: {error}") from error


def _declared(name: str) -> Mapping[str, Any]:
    """The declaration of a key of `TableConfig`; UserError with the nearest for an unknown one."""
    if name in DECLARED:
        return DECLARED[name]
    known = [*DECLARED, "rows", *(f"base.{key_}" for key_ in config_lib.ALL_KEYS)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    unknown = f"config.{config_lib.printable(name)}: unknown key of a table"
    raise UserError(f"{unknown}; the nearest known key is config.{near}")


def numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """Comma-separated positive numbers; ConfigError where they are none."""
    try:
        found = tuple(kind(part) for part in text.split(",")) if text else ()
    except ValueError:
        found = (0,)
    if any(not 0 < n < 1e9 for n in found):
        raise ConfigError(name, text, "give positive numbers with commas between them")
    return found

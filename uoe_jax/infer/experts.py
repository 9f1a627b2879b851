"""`--experts` of `uoe generate` and `uoe eval`: another K than the run's. Imports no jax."""

import dataclasses
import re
from typing import Any

from uoe_jax.config.schema import Config
from uoe_jax.config.validate import check_model
from uoe_jax.errors import UserError


def with_experts(config: Config, k: dict[str, int]) -> Config:
    """The configuration with another K in the blocks named ("smha", "uome"); slots follow."""
    unions = config.model.unions()
    for name, value in k.items():
        if name not in unions:
            has = f"the routed blocks of this model are {', '.join(unions)}"
            has = has if unions else "this model has no unions of experts"
            raise UserError(f"--experts={name}={value}: {has}; leave it out")
        n = unions[name].n_experts
        if not 1 <= value <= n:
            remedy = "give a number from 1 to that"
            raise UserError(f"--experts={value}: {name} has {n} experts; {remedy}")
    found = _with_routing(config, {name: {"k": value} for name, value in k.items()})
    check_model(found.model)
    return found


def all_experts(config: Config) -> Config:
    """All experts for every patch, with slots for all: the dense model, if gates weigh alike."""
    unions = config.model.unions()
    found = with_experts(config, {name: r.n_experts for name, r in unions.items()})
    slots = {name: {"capacity_factor": max(1.0, r.capacity_factor)} for name, r in unions.items()}
    return _with_routing(found, slots)


def _with_routing(config: Config, changed: dict[str, dict[str, Any]]) -> Config:
    """The configuration with these values in the routing of the blocks named."""
    m = config.model
    new = {name: dataclasses.replace(getattr(m, name), **v) for name, v in changed.items()}
    return dataclasses.replace(config, model=dataclasses.replace(m, **new))


def choices(config: Config, text: str) -> list[Config]:
    """A configuration for each K of `--experts`: '2', 'smha=3,uome=4', or (in eval) '1..4'."""
    unions = config.model.unions()
    if numbers := re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", text):
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first > last:
            raise UserError(f"--experts={text}: the range must ascend, such as 1..4")
        if not unions:
            raise UserError(f"--experts={text}: this model has no unions of experts; leave it out")
        return [with_experts(config, dict.fromkeys(unions, k)) for k in range(first, last + 1)]
    named = [re.fullmatch(r"(smha|uome)=(\d{1,6})", part) for part in text.split(",")]
    if not all(named):
        raise UserError(f"--experts={text}: give a number, a range such as 1..4, or smha=3,uome=4")
    return [with_experts(config, {part[1]: int(part[2]) for part in named if part})]

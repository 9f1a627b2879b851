"""Another number of experts than a run was trained with: `--experts` of `uoe generate` and `uoe eval`. Imports no jax."""

from __future__ import annotations

import dataclasses
import re

from uoe_jax.config.schema import Config, RoutingConfig
from uoe_jax.config.validate import check_model
from uoe_jax.errors import UserError


def with_experts(config: Config, k: dict[str, int]) -> Config:
    """The configuration with another K in the blocks named ("smha", "uome"); slots follow through capacity_factor.

    Raises:
      UserError: a block that the model does not have, or a K beyond its N. ConfigError: a gate that K does not fit.
    """
    unions = config.model.unions()
    for name, value in k.items():
        if name not in unions:
            has = (
                f"the routed blocks of this model are {', '.join(unions)}"
                if unions
                else "this model has no unions of experts"
            )
            raise UserError(f"--experts={name}={value}: {has}; leave it out")
        if not 1 <= value <= unions[name].n_experts:
            raise UserError(
                f"--experts={value}: {name} has {unions[name].n_experts} experts; give a number from 1 to that"
            )
    found = _with_routing(
        config, {name: dataclasses.replace(unions[name], k=value) for name, value in k.items()}
    )
    check_model(found.model)
    return found


def all_experts(config: Config) -> Config:
    """All experts for every patch, and slots for all: the dense model's function, where the gate weighs all alike."""
    unions = config.model.unions()
    found = with_experts(config, {name: routing.n_experts for name, routing in unions.items()})
    room = {
        name: dataclasses.replace(r, capacity_factor=max(1.0, r.capacity_factor))
        for name, r in found.model.unions().items()
    }
    return _with_routing(found, room)


def _with_routing(config: Config, changed: dict[str, RoutingConfig]) -> Config:
    """The same with another routing of the blocks named ("smha", "uome")."""
    model = config.model
    model = dataclasses.replace(
        model, smha=changed.get("smha", model.smha), uome=changed.get("uome", model.uome)
    )
    return dataclasses.replace(config, model=model)


def choices(config: Config, text: str) -> list[Config]:
    """What `--experts` asks for: '2', 'smha=3,uome=4', or (of evaluation) '1..4', one configuration for each.

    Raises:
      UserError: it is none of these, or the model has no such experts.
    """
    unions = config.model.unions()
    numbers = re.fullmatch(r"(\d{1,6})(?:\.\.(\d{1,6}))?", text)
    if numbers:
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first > last:
            raise UserError(
                f"--experts={text}: the first number is the larger one; turn them round"
            )
        if not unions:
            raise UserError(f"--experts={text}: this model has no unions of experts; leave it out")
        return [with_experts(config, dict.fromkeys(unions, k)) for k in range(first, last + 1)]
    named = [re.fullmatch(r"(smha|uome)=(\d{1,6})", part) for part in text.split(",")]
    if not all(named):
        raise UserError(f"--experts={text}: give a number, a range such as 1..4, or smha=3,uome=4")
    return [with_experts(config, {part[1]: int(part[2]) for part in named if part})]

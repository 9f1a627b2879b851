"""The configuration: sections of keys (`schema`), their checks (`validate`) and how they are read (`load`)."""

from uoe_jax.config.schema import *  # noqa: F403

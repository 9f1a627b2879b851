"""uoe_jax: pretrain transformers whose blocks are unions of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SMHA", "RoutingConfig", "UoME"]

if TYPE_CHECKING:
    from uoe_jax.config.schema import RoutingConfig
    from uoe_jax.layers.smha import SMHA
    from uoe_jax.layers.uome import UoME
else:  # a type checker that saw this would believe in any name

    def __getattr__(name: str) -> Any:
        """Imports the blocks when they are first asked for: the command line checks its input before jax is imported."""
        if name == "RoutingConfig":
            from uoe_jax.config.schema import RoutingConfig

            return RoutingConfig
        if name == "UoME":
            from uoe_jax.layers.uome import UoME

            return UoME
        if name == "SMHA":
            from uoe_jax.layers.smha import SMHA

            return SMHA
        raise AttributeError(f"module 'uoe_jax' has no attribute {name!r}")

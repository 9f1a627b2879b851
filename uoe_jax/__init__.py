"""uoe_jax: pretrain transformers whose blocks are unions of experts."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["SMHA", "RoutingConfig", "UoME"]

if TYPE_CHECKING:
    from uoe_jax.config.routing import RoutingConfig
    from uoe_jax.layers.smha import SMHA
    from uoe_jax.layers.uome import UoME
else:  # hidden from type checkers, which would accept any name
    _PLACES = {"RoutingConfig": "config.routing", "SMHA": "layers.smha", "UoME": "layers.uome"}

    def __getattr__(name: str) -> Any:
        """Imports a block on first use, as the command line checks its input before jax."""
        if name not in _PLACES:
            raise AttributeError(f"module 'uoe_jax' has no attribute {name!r}")
        return getattr(importlib.import_module(f"uoe_jax.{_PLACES[name]}"), name)

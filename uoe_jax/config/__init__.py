"""The configuration: sections of keys (`schema`), checks (`validate`) and reading (`load`)."""

from uoe_jax.config.data import AugmentConfig, DataConfig
from uoe_jax.config.fields import leaves, printable
from uoe_jax.config.hints import ALL_KEYS, DECLARED, unknown_key
from uoe_jax.config.load import base, changed_keys, from_dict, parse_value, to_dict, with_vocabulary
from uoe_jax.config.routing import RoutingConfig
from uoe_jax.config.schema import (
    CheckpointConfig,
    ClassifierConfig,
    Config,
    EvalConfig,
    GenerateConfig,
    GuardConfig,
    ImageConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from uoe_jax.config.validate import check_model
from uoe_jax.errors import ConfigError

__all__ = ["Config", "ModelConfig", "RoutingConfig", "ClassifierConfig", "ImageConfig"]
__all__ += ["DataConfig", "AugmentConfig", "OptimizerConfig", "TrainConfig", "EvalConfig"]
__all__ += ["CheckpointConfig", "GuardConfig", "MeshConfig", "GenerateConfig", "ConfigError"]
__all__ += ["ALL_KEYS", "DECLARED", "leaves", "printable", "unknown_key", "parse_value"]
__all__ += ["base", "from_dict", "to_dict", "with_vocabulary", "changed_keys", "check_model"]

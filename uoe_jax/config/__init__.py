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

__all__ = [
    "ALL_KEYS",
    "AugmentConfig",
    "CheckpointConfig",
    "ClassifierConfig",
    "Config",
    "ConfigError",
    "DECLARED",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "GuardConfig",
    "ImageConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RoutingConfig",
    "TrainConfig",
    "base",
    "changed_keys",
    "check_model",
    "from_dict",
    "leaves",
    "parse_value",
    "printable",
    "to_dict",
    "unknown_key",
    "with_vocabulary",
]

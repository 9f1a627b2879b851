from uoe_jax import config as uoe


def get_config(variant: str = ""):
    c = uoe.base()
    return c

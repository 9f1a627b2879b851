"""`python -m uoe_jax` is `uoe`."""

from uoe_jax.cli import console

if __name__ == "__main__":
    console()

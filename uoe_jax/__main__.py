"""`python -m uoe_jax` is `uoe`."""

import sys

from uoe_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())

"""Checks in a process of its own that a run can start on this machine: devices, mesh and data.

    python -m uoe_jax.compare.check CONFIG

CONFIG is JSON; ends with exit code 2 and a sentence where the run cannot start. A process of its
own, because the one that makes a table must leave the devices to the runs, which then find the
data prepared.
"""

import json
import sys

from uoe_jax import runtime_env
from uoe_jax.config.load import from_dict
from uoe_jax.errors import EXIT_DONE, UserError


def main() -> int:
    """Returns the exit code."""
    runtime_env.prepare_process()
    try:
        with runtime_env.jax_import_errors():
            from uoe_jax.distributed import setup
            from uoe_jax.train.main import agreed_data

            config = from_dict(json.loads(sys.argv[1]))
            setup.start(config)
            agreed_data(config, None)
    except UserError as error:
        print(f"uoe: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

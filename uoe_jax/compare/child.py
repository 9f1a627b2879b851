"""The processes that a table starts beside its runs: it must leave the devices to them.

    python -m uoe_jax.compare.child check CONFIG       whether a run can start; CONFIG is JSON
    python -m uoe_jax.compare.child measure WORKDIR    after the runs; writes WORKDIR/measured.json

They end with exit code 2 and a sentence for input that cannot be used.
"""

import json
import sys

from uoe_jax import runtime_env
from uoe_jax.config.load import from_dict
from uoe_jax.errors import EXIT_DONE, UserError


def main() -> int:
    """Returns the exit code."""
    runtime_env.prepare_process()
    job, given = sys.argv[1:]
    try:
        with runtime_env.jax_import_errors():
            if job == "check":
                from uoe_jax.distributed import setup
                from uoe_jax.train.main import agreed_data

                config = from_dict(json.loads(given))
                setup.start(config)
                agreed_data(config, None)
            else:
                from uoe_jax.compare.measure import measure

                measure(given)
    except UserError as error:
        runtime_env.notice(str(error))
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

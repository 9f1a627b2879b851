"""`uoe` with faults, for tests: `python tests/faulty.py FAULT[,FAULT…] uoe's arguments`.

A fault is KIND@DOING@STEP@PROCESS: it happens as that process comes to do that at that step ("raise@training@5@1"). Kinds:
raise, kill (SIGKILL), stop (SIGSTOP), hang (Python sleeps), spin (Python works for ever), term (SIGTERM), slow (a second).
nan@training@STEPS@PROCESS puts a NaN into that process's rows at those batches ("nan@training@5+6@1"), from where the
gradients take it. none: no fault. Where UOE_TRACE names a file, it always says what the process is doing.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from uoe_jax import cli
from uoe_jax.distributed import watchdog


def spin():
    while True:
        pass


def boom():
    raise ValueError("boom")


def send(number):
    return lambda: os.kill(os.getpid(), number)


KINDS = {
    "raise": boom,
    "kill": send(signal.SIGKILL),
    "stop": send(signal.SIGSTOP),
    "term": send(signal.SIGTERM),
    "hang": lambda: time.sleep(10000),
    "spin": spin,
    "slow": lambda: time.sleep(1),
}


def main(faults: str, argv: list[str]) -> int:
    me, real, trace = (
        os.environ.get("UOE_PROCESS_ID", "0"),
        watchdog.at,
        os.environ.get("UOE_TRACE"),
    )
    wanted, poisoned = {}, []
    for kind, doing, step, process in (
        fault.split("@") for fault in faults.split(",") if fault != "none"
    ):
        if kind == "nan":
            poisoned.append(([int(s) for s in step.split("+")], process))
        elif process == me:
            wanted[doing, step] = KINDS[kind]

    def at(doing, step=None, slow=False):
        real(doing, step, slow)
        if trace:
            with open(trace, "w") as file:
                file.write(f"{doing} {step}")
        wanted.get((doing, str(step)), lambda: None)()

    watchdog.at = at
    if poisoned:
        poison(poisoned, me)
    return cli.main(argv)


def poison(poisoned, me: str) -> None:
    """Every process's program takes one more array in the batch; it holds NaN where the fault is."""
    import jax
    import numpy as np

    from uoe_jax.data import pipeline
    from uoe_jax.train import step

    real_get, real_gradients = pipeline.TrainBatches.__getitem__, step.accumulated_gradients

    def get(self, i):
        batch = real_get(self, i)
        hit = any(i in steps and process == me for steps, process in poisoned)
        return {**batch, "poison": np.full(len(batch["tokens"]), np.nan if hit else 0, np.float32)}

    def gradients(config, rebuild, params, batch):
        poison = batch.pop("poison").sum()
        grads, sums = real_gradients(config, rebuild, params, batch)
        return jax.tree.map(lambda g: g + poison.astype(g.dtype), grads), sums

    pipeline.TrainBatches.__getitem__, step.accumulated_gradients = get, gradients


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

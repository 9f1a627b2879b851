"""Compiles the train step for forced host devices and says what XLA says of it.

In a process of its own, as the number of devices is settled when jax starts. Nothing of the model
is allocated: the step is lowered from shapes.
"""

import math
import os
import pickle
import subprocess
import sys
import time
from typing import Any, NamedTuple

from uoe_jax.config.schema import Config
from uoe_jax.errors import UserError
from uoe_jax.plan.hlo import Collective, collectives

# The code is never run, so LLVM need not optimise; memory and collectives are decided before it.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Compiled(NamedTuple):
    """What XLA says of the compiled step; sizes are bytes of one device."""

    arguments: int  # state and batch
    outputs: int
    alias: int  # outputs written over arguments
    temporary: int  # everything in between
    flops: float  # of one device; the body of a loop counts once
    parameters: int  # of the arguments, as optimizer
    optimizer: int
    collectives: tuple[Collective, ...]
    seconds: float  # of the compilation, as process_bytes, its largest resident size
    process_bytes: int
    jax: str

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.alias + self.temporary


def compile_step(config: Config) -> Compiled:
    """Compiles the train step for `config.mesh`, all sizes given, on as many host devices.
    UserError where the configuration is refused, RuntimeError with its log where XLA fails."""
    devices = math.prod(config.mesh.shape.values())
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("UOE_", "JAX_", "XLA_"))}
    flags = f"--xla_force_host_platform_device_count={devices} {FLAGS}"
    env = {**mine, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-c", "from uoe_jax.plan.compiled import main; main()"]
    done = subprocess.run(command, input=pickle.dumps(config), capture_output=True, env=env)
    if done.returncode:
        log = done.stderr[-4000:].decode("utf-8", "replace")
        what = f"the compilation for {devices} host devices ended with {done.returncode}"
        raise RuntimeError(f"{what}: {log}")
    found: Compiled | str = pickle.loads(done.stdout)
    if isinstance(found, str):
        raise UserError(found)
    return found


def main() -> None:
    """The process: a pickled configuration in, a `Compiled` or what a UserError says out."""
    try:
        found: Compiled | str = _compiled_here(pickle.load(sys.stdin.buffer))
    except UserError as error:
        found = str(error)
    sys.stdout.buffer.write(pickle.dumps(found))


def _compiled_here(config: Config) -> Compiled:
    import jax

    from uoe_jax.distributed import mesh as mesh_lib
    from uoe_jax.distributed.setup import host_peak_bytes
    from uoe_jax.train.step import build

    begun, mesh = time.monotonic(), mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        compiled = program.train_step.lower(program.abstract, program.abstract_batch).compile()
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None and cost is not None and text is not None  # as on every CPU

    def held(tree: Any) -> int:
        arrays = jax.tree.leaves(tree)
        return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in arrays)

    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        flops=cost["flops"],
        parameters=held(program.abstract.params),
        optimizer=held(program.abstract.opt),
        collectives=tuple(collectives(text, dict(mesh.shape))),
        seconds=time.monotonic() - begun,
        process_bytes=host_peak_bytes(),
        jax=jax.__version__,
    )

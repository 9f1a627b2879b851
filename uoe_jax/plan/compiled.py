"""Compiles the train step for forced host devices, in a process of its own, and says what XLA says.

`compile_step` is for the caller; `python -m uoe_jax.plan.compiled` is the process: a configuration
in (JSON), a `Compiled` out. Nothing of the model is allocated: the step is lowered from shapes. A
process of its own, because the number of devices is settled when jax starts.
"""

import json
import math
import os
import subprocess
import sys
import time
from typing import Any, NamedTuple

from uoe_jax.config.load import from_dict, to_dict
from uoe_jax.config.schema import Config
from uoe_jax.errors import EXIT_BAD_INPUT, UserError
from uoe_jax.plan.hlo import Array, Collective, collectives

# The code is never run, so LLVM need not optimise; memory and collectives are decided before it.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


class Compiled(NamedTuple):
    """What XLA says of the compiled step.

    Attributes:
      arguments, outputs, alias, temporary: bytes of one device: state and batch, outputs, outputs
        written over arguments, and everything in between.
      flops: of one device; the body of a loop counts once.
      parameters, optimizer: bytes of one device, of the arguments.
      seconds, process_bytes: of the compilation; the latter its largest resident size.
    """

    arguments: int
    outputs: int
    alias: int
    temporary: int
    flops: float
    parameters: int
    optimizer: int
    collectives: tuple[Collective, ...]
    seconds: float
    process_bytes: int
    jax: str

    @property
    def peak(self) -> int:
        return self.arguments + self.outputs - self.alias + self.temporary


def compile_step(config: Config) -> Compiled:
    """Compiles the train step for `config.mesh`, all sizes given, on as many host devices.

    Raises:
      UserError: what the configuration is refused for.
      RuntimeError: the compilation failed; with what it wrote.
    """
    devices = math.prod(config.mesh.shape.values())
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("UOE_", "JAX_", "XLA_"))}
    flags = f"--xla_force_host_platform_device_count={devices} {FLAGS}"
    env = {**mine, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "2"}
    command = [sys.executable, "-m", "uoe_jax.plan.compiled"]
    given = json.dumps(to_dict(config)).encode()
    done = subprocess.run(command, input=given, capture_output=True, env=env)
    if done.returncode == EXIT_BAD_INPUT and done.stdout:
        raise UserError(json.loads(done.stdout)["error"])
    if done.returncode:
        log = done.stderr[-4000:].decode("utf-8", "replace")
        what = f"the compilation for {devices} host devices ended with {done.returncode}"
        raise RuntimeError(f"{what}: {log}")
    found = json.loads(done.stdout)
    moved = []
    for kind, *arrays, axes, group, times, counted, op_name, name in found.pop("collectives"):
        before, after = (Array(dtype, tuple(shape)) for dtype, shape in arrays)
        rest = group, times, counted, op_name, name
        moved.append(Collective(kind, before, after, tuple(axes), *rest))
    return Compiled(**found, collectives=tuple(moved))


def describe(config: Config) -> Compiled:
    """The same in this process, which must have the devices."""
    import jax

    from uoe_jax.distributed import mesh as mesh_lib
    from uoe_jax.distributed.setup import host_peak_bytes
    from uoe_jax.train.step import build

    begun = time.monotonic()
    mesh = mesh_lib.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        program = build(config, mesh)
        compiled = program.train_step.lower(program.abstract, program.abstract_batch).compile()
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    # Every program of a CPU has them.
    assert memory is not None and cost is not None and text is not None

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


def main() -> int:
    try:
        print(json.dumps(describe(from_dict(json.load(sys.stdin)))._asdict()))
        return 0
    except UserError as error:
        print(json.dumps({"error": str(error)}))
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())

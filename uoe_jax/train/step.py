"""The compiled part of training: state, optimizer, the train step and the evaluation step."""

import contextlib
import math
from typing import Any, Callable, Iterator, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh

from uoe_jax.config.baselines import MoEConfig
from uoe_jax.config.schema import Config, GuardConfig, ModelConfig, OptimizerConfig
from uoe_jax.config.validate import check_sizes
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.models.decoder import Stack, Stats
from uoe_jax.moe.routing import RoutingStats, rebalanced
from uoe_jax.train.task import TASKS, Batch, Sums, task_of

Params = dict[str, Any]  # nested, by module and weight name
Rebuild = Callable[[Params], Stack]  # the module of these parameters
Optimizer: TypeAlias = optax.GradientTransformation
HALF_SCALE = 4096.0  # of the loss in float16, where a token's share of a mean underflows

WINDOW = 128  # good steps in the running moments; after as many, a step can be a spike


class Guard(NamedTuple):
    """What is known of the bad steps so far; checkpointed. Counts are int32.

    Bad steps are found inside the compiled step, so that all processes agree, and skipped: they
    change only these counts. Parameters, optimizer state and load-balancing biases stay.
    """

    skipped: jax.Array  # bad steps of the whole run, without those that a rollback took back
    in_a_row: jax.Array  # bad steps since the last good one
    seen: jax.Array  # good steps
    mean: jax.Array  # running mean of (loss, gradient norm) over good steps, float32 [2]
    variance: jax.Array  # and their variance
    offset: jax.Array  # batches skipped by rollbacks; step s takes batch s + offset
    rollbacks: jax.Array


class TrainState(NamedTuple):
    """All that a checkpoint holds. step: the number of steps done, with skipped ones, int32."""

    step: jax.Array
    params: Params
    opt: optax.OptState
    guard: Guard


class Program(NamedTuple):
    """A configuration compiled for a mesh; `abstract…` are trees of ShapeDtypeStruct."""

    mesh: Any  # Mesh; of a program that is only planned, AbstractMesh
    init: Callable[[jax.Array], TrainState]  # from a key, with its shardings
    train_step: jax.stages.Wrapped  # (state, batch) -> (state, metrics on device); donates state
    eval_step: Callable[[Params, Batch], Sums]
    abstract: TrainState
    abstract_batch: dict[str, jax.ShapeDtypeStruct]  # of a train step
    model: Callable[[Params], Any]  # Transformer or Classifier


def learning_rate(c: OptimizerConfig, decay_steps: int) -> optax.Schedule:
    """Linear warmup, then a cosine or linear decay to `final_fraction` of the peak."""
    end = max(decay_steps, c.warmup_steps + 1)  # a run shorter than its warmup ends inside it
    peak, last = c.learning_rate, c.learning_rate * c.final_fraction
    if c.schedule == "cosine":
        schedule = optax.warmup_cosine_decay_schedule(0.0, peak, c.warmup_steps, end, last)
    else:
        warmup = optax.linear_schedule(0.0, peak, c.warmup_steps)
        decay = optax.linear_schedule(peak, last, end - c.warmup_steps)
        schedule = optax.join_schedules([warmup, decay], [c.warmup_steps])
    return lambda count: schedule(count + 1)


def make_optimizer(c: OptimizerConfig, decay_steps: int, decayed: Params) -> Optimizer:
    """AdamW with clipping by global norm; decayed: a tree of bool, where weight decay applies."""
    clip = optax.clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    rate, mask = learning_rate(c, decay_steps), lambda _: decayed
    adam = optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=mask)
    if c.moment_dtype != "float32":
        adam = cast_optimizer_state(jnp.dtype(c.moment_dtype), adam)
    return optax.chain(clip, adam)


def cast_optimizer_state(dtype: jnp.dtype, inner: Optimizer) -> Optimizer:
    """The optimizer with its float state in `dtype` between steps, and in float32 in a step."""

    def cast(state: Any, to: Any) -> Any:
        is_float = lambda a: jnp.issubdtype(a.dtype, jnp.floating)  # noqa: E731
        return jax.tree.map(lambda a: a.astype(to) if is_float(a) else a, state)

    def update(grads: Params, state: Any, params: Params) -> tuple[Params, Any]:
        updates, state = inner.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return Optimizer(lambda params: cast(inner.init(params), dtype), update)


def functional(c: ModelConfig) -> tuple[Callable[[jax.Array], Params], Rebuild, nnx.State]:
    """(Key -> params, params -> module, abstract state with the weights' declarations)."""
    model = TASKS[c.task].model
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: model(c, rngs=nnx.Rngs(0))))

    def init(key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(model(c, rngs=nnx.Rngs(params=key))))

    def rebuild(params: Params) -> Stack:
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    return init, rebuild, abstract


def declared(abstract: nnx.State, read: Callable[[nnx.Param, tuple[int, ...]], Any]) -> Params:
    """A tree shaped like the parameters holding `read(weight's declaration, its stacked shape)`."""
    flat = {path: read(v, v.get_value().shape) for path, v in nnx.to_flat_state(abstract)}
    return unflatten_dict({tuple(map(str, path)): value for path, value in flat.items()})


def build(config: Config, mesh: Mesh | AbstractMesh) -> Program:
    """Derives everything compiled from the configuration; nothing is allocated."""
    check_sizes(config, mesh.shape)
    init_params, rebuild, declarations = functional(config.model)
    place = lambda w, shape: mesh_lib.weight_sharding(mesh, w.logical_axes, shape)  # noqa: E731
    shardings = declared(declarations, place)
    decayed = declared(declarations, lambda w, _: w.decay)
    optimizer = make_optimizer(config.optimizer, config.decay_steps, decayed)
    replicated = jax.NamedSharding(mesh, mesh_lib.EVERYWHERE)
    rows = jax.NamedSharding(mesh, mesh_lib.ROWS)
    task = task_of(config)

    def init(key: jax.Array) -> TrainState:
        params, step = init_params(key), jnp.zeros((), jnp.int32)
        return TrainState(step, params, optimizer.init(params), fresh_guard())

    def eval_step(params: Params, batch: Batch) -> Sums:
        return task.sums(rebuild(params), batch, config)

    @contextlib.contextmanager
    def on_mesh() -> Iterator[None]:  # also where the caller has not set the mesh
        sequence_parallel = mesh_lib.sequence_parallel(config.mesh.sequence_parallel)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), sequence_parallel:
            yield

    shapes = jax.eval_shape(init, jax.random.key(0))
    # Optimizer moments are sharded as their parameters; scalars are replicated.
    opt_shardings = optax.tree_utils.tree_map_params(
        optimizer, lambda _, s: s, shapes.opt, shardings, transform_non_params=lambda _: replicated
    )
    guard_shardings = jax.tree.map(lambda _: replicated, shapes.guard)
    placed = TrainState._make((replicated, shardings, opt_shardings, guard_shardings))
    struct = jax.ShapeDtypeStruct
    train_step = on_mesh()(_train_step(config, rebuild, optimizer))
    ins, outs, eval_ins = (placed, rows), (placed, replicated), (shardings, rows)
    return Program(
        mesh=mesh,
        init=jax.jit(init, out_shardings=placed),
        train_step=jax.jit(train_step, donate_argnums=0, in_shardings=ins, out_shardings=outs),
        eval_step=jax.jit(on_mesh()(eval_step), in_shardings=eval_ins, out_shardings=replicated),
        abstract=jax.tree.map(lambda a, s: struct(a.shape, a.dtype, sharding=s), shapes, placed),
        abstract_batch={n: struct(*a, sharding=rows) for n, a in task.shapes(config).items()},
        model=rebuild,
    )


def _train_step(config: Config, rebuild: Rebuild, optimizer: Optimizer) -> Callable[..., Any]:
    rate = learning_rate(config.optimizer, config.decay_steps)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        batch = {**batch, "keys": row_keys(config, state.step + state.guard.offset)}
        grads, sums = accumulated_gradients(config, rebuild, state.params, batch)
        grad_norm = optax.global_norm(grads)
        mean_nll = sums.nll / jnp.maximum(sums.count, 1)
        bad, guard = judge(config.guard, state.guard, mean_nll, grad_norm)
        # optax mixes float constants with integer counts.
        with jax.numpy_dtype_promotion("standard"):
            updates, opt = optimizer.update(grads, state.opt, state.params)
            used_rate = jnp.asarray(rate(state.step - state.guard.skipped), jnp.float32)
        params = rebalance(config.model, optax.apply_updates(state.params, updates), sums.routing)
        params, opt = optax.tree_utils.tree_where(bad, (state.params, state.opt), (params, opt))
        found = {"sums": sums, "grad_norm": grad_norm, "learning_rate": used_rate, "guard": guard}
        return TrainState(state.step + 1, params, opt, guard), found

    return train_step


def fresh_guard() -> Guard:
    """The guard of a new run."""
    zero, moments = jnp.zeros((), jnp.int32), jnp.zeros((2,), jnp.float32)
    return Guard(zero, zero, zero, moments, moments, zero, zero)


def judge(
    c: GuardConfig, guard: Guard, loss: jax.Array, grad_norm: jax.Array
) -> tuple[jax.Array, Guard]:
    """(Whether a step is bad, the guard after it): not finite, or a spike (guard.spike_sigmas)."""
    found = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    bad = ~jnp.isfinite(found).all()
    if c.spike_sigmas:
        bound = guard.mean + c.spike_sigmas * jnp.sqrt(guard.variance)
        bad |= (guard.seen >= WINDOW) & (found > bound).any()
    # A plain mean at first, then an exponential one. The square of `delta` must be finite, as even
    # 0 times an infinity would spoil the moments.
    weight = 1 / jnp.minimum(guard.seen + 1, WINDOW).astype(jnp.float32)
    delta = jnp.where(bad, 0, jnp.minimum(found, 1e18) - guard.mean)
    mean = guard.mean + weight * delta
    variance = (1 - weight) * (guard.variance + weight * delta**2)
    none = jnp.zeros_like(guard.in_a_row)
    good = guard._replace(in_a_row=none, seen=guard.seen + 1, mean=mean, variance=variance)
    skipped = guard._replace(skipped=guard.skipped + 1, in_a_row=guard.in_a_row + 1)
    return bad, optax.tree_utils.tree_where(bad, skipped, good)


def row_keys(config: Config, step: jax.Array) -> jax.Array:
    """A random key for each global row of a batch; layers and experts fold in their number."""
    # Far from the keys of the initialisation.
    root = jax.random.fold_in(jax.random.key(config.train.seed), 0x726F7773)
    key = jax.random.fold_in(root, step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(config.train.batch_size))


def rebalance(c: ModelConfig, params: Params, routing: Stats) -> Params:
    """Updates load-balancing biases and adaptive balance weights from the global expert load."""
    layers = dict(params["layers"])
    for name, r in c.routed().items():
        place = c.place_of(name)
        router, stats = dict(layers[place].get("router", {})), routing[name]
        if r.bias_rate:
            router["load_bias"] = rebalanced(router["load_bias"], stats.chosen_N, r.bias_rate)
        if "balance_weight" in router:
            router["balance_weight"] = adapted(router["balance_weight"], stats, c.moe)
        if router:
            layers[place] = {**layers[place], "router": router}
    return {**params, "layers": layers}


def adapted(weight_T1: jax.Array, stats: RoutingStats, c: MoEConfig) -> jax.Array:
    """Balance weights after a step, by the share of dropped choices (Skywork-MoE, section 4.2)."""
    dropped_T = 1 - stats.kept_N.sum(axis=-1) / jnp.maximum(stats.chosen_N.sum(axis=-1), 1)
    wanted_T = jnp.minimum(c.adaptive_rate * dropped_T, c.adaptive_most)
    return c.adaptive_decay * weight_T1 + (1 - c.adaptive_decay) * wanted_T[:, None]


def routing_loss(c: ModelConfig, params: Params, routing: Stats) -> jax.Array:
    """Load-balancing and z losses of all layers, summed over rows."""
    total = jnp.zeros(())
    for name, r in c.routed().items():
        stats, router = routing[name], params["layers"][c.place_of(name)].get("router", {})
        adaptive = router.get("balance_weight")
        weight = r.balance_weight if adaptive is None else jax.lax.stop_gradient(adaptive)[:, 0]
        total += (weight * stats.balance).sum() + r.z_weight * stats.z.sum()
    return total


def accumulated_gradients(
    config: Config, rebuild: Rebuild, params: Params, batch: Batch
) -> tuple[Params, Sums]:
    """Gradient of the mean loss plus routing losses of the batch, over `accumulation` microbatches.

    Each divides by the global number of targets and rows, so that gradients add up to the batch's.
    """
    task = task_of(config)
    scale = HALF_SCALE if config.model.dtype == "float16" else 1.0
    count, rows = (jnp.maximum(n, 1) for n in task.counts(batch))

    def loss(params: Params, batch: Batch) -> tuple[jax.Array, Sums]:
        sums = task.sums(rebuild(params), batch, config)
        routing = routing_loss(config.model, params, sums.routing)
        return scale * (sums.nll / count + routing / rows), sums

    def gradient(params: Params, batch: Batch) -> tuple[Params, Sums]:
        found, sums = jax.grad(loss, has_aux=True)(params, batch)
        return found if scale == 1 else jax.tree.map(lambda a: a / scale, found), sums

    n = config.train.accumulation
    if n == 1:
        return gradient(params, batch)
    # Microbatch i takes groups of rows i, i + n, …: every device keeps its own rows, and no
    # sequence group is split.
    bounded = [r for r in config.model.routed().values() if r.sequence_capacity_factor]
    group = math.lcm(*(r.sequence_group for r in bounded), 1)

    def microbatches(a: jax.Array) -> jax.Array:
        grouped = a.reshape(-1, n, group, *a.shape[1:]).swapaxes(0, 1)
        return grouped.reshape(n, -1, *a.shape[1:])

    def add(total: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, batch)), None

    batches = jax.tree.map(microbatches, batch)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda a: a[0], batches))
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return jax.lax.scan(add, zero, batches)[0]

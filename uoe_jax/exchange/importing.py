"""`uoe import`: a dense model in Hugging Face's layout, cut into experts, as the workdir of a run.

With all experts chosen the model computes what the dense one does, to rounding. Tensors are read
one at a time and put on the device before the next, so the host never holds the model twice.
"""

import itertools
import shutil
import sys
from typing import Any, Iterator

import jax
import numpy as np

from uoe_jax.config.load import to_dict
from uoe_jax.config.schema import Config, ModelConfig
from uoe_jax.config.validate import check_source
from uoe_jax.data.pipeline import DataBundle, TrainBatches, default_cache_dir, load
from uoe_jax.data.tokenizers.load import keep_tokenizer
from uoe_jax.distributed import mesh as mesh_lib
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError, UserError
from uoe_jax.exchange.calibrate import calibrated
from uoe_jax.exchange.layouts import Entry, Shape
from uoe_jax.exchange.plan_import import ImportPlan
from uoe_jax.exchange.tensors import INDEX, Tensors, by_name, whole_directory
from uoe_jax.infer.experts import all_experts
from uoe_jax.moe import decompose
from uoe_jax.runtime_env import notice
from uoe_jax.train.checkpoint import CheckpointStore
from uoe_jax.train.evaluate import evaluate
from uoe_jax.train.step import Params, build, declared, functional
from uoe_jax.workdir import CONFIG, write_json

SOURCE = "source"  # of a workdir: the files of the imported model, without its weights
KEPT = ("*.json", "*.txt", "*.jinja", "*.model")
N_BATCHES = 8  # of text, for fitting the routers and for the loss


def import_model(plan: ImportPlan, workdir: str) -> None:
    """Writes a workdir with the checkpoint of step 0; prints the loss with K and with N experts.
    UserError where the model cannot be read or does not fit its config.json."""
    config, mesh = plan.config, mesh_lib.make_mesh(plan.config.mesh)
    with jax.set_mesh(mesh), whole_directory(workdir, "--workdir") as place:
        source = Tensors(plan.source)
        _check_names(plan, source)
        data = _data(plan)
        program = build(config, mesh)
        params = _parameters(plan, source, program.abstract.params)
        if isinstance(data, DataBundle) and config.model.task == "language":
            rows = TrainBatches(data.train, config.train.batch_size, config.train.seed)
            batches = (mesh_lib.put_batch(mesh, rows[i]) for i in range(N_BATCHES))
            params = calibrated(config.model, program.model, params, batches)
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(params)) + 1
        origin = {"config": to_dict(config), "imported": plan.theirs.get("_name_or_path", "")}
        with CheckpointStore(place, write_bytes=largest) as store:
            store.save(0, {"params": params}, metadata=origin)
        keep_tokenizer(place, plan.tokenizer)
        for file in itertools.chain.from_iterable(plan.source.glob(pattern) for pattern in KEPT):
            if file.name != INDEX:
                (place / SOURCE).mkdir(exist_ok=True)
                shutil.copyfile(file, place / SOURCE / file.name)
        write_json(place / CONFIG, to_dict(config))
        where, others = f"--from={plan.source}", source.passed_over
        if others:
            files = f"{len(others)} other files of weights were passed over"
            notice(f"{where}: {files} ({', '.join(others)})")
        for note in plan.notes:
            notice(f"{where}: {note}")
        _print_losses(config, params, data, mesh)


def _check_names(plan: ImportPlan, source: Tensors) -> None:
    """UserError where a tensor is missing, of another shape than config.json says, or unknown."""
    where, shapes, used = f"--from={plan.source}", dense_shapes(plan.config.model), set[str]()
    for entry, _, name in ticking(_tensors(plan, source)):
        used.add(name)
        if name not in source.file_of:
            why = f"{name} is missing in its weights, and config.json asks for it"
            raise UserError(f"{where}: {why}; download the model again")
        found, wanted = source.shape(name), entry.shape(shapes)
        fits = found == wanted
        if entry.ours == ("positions",) and len(found) == len(wanted):  # longer ones are cut
            fits = found[-2] >= wanted[-2] and found[-1] == wanted[-1]
        if not fits:
            shape = f"has shape {list(found)} where config.json asks for {list(wanted)}"
            raise UserError(f"{where}: {name} {shape}; they are not of one model")
    left = [name for name in source.file_of if name not in used]
    left = [name for name in left if not _is_known_buffer(plan, source, name)]
    if left:
        which = f"{left[0]} (and {len(left) - 1} more)"
        why = f"have no place in a {plan.family.kind} model here; they would be lost"
        raise UserError(f"{where}: {which} {why}")


def _is_known_buffer(plan: ImportPlan, source: Tensors, name: str) -> bool:
    """Whether a tensor is one of old files that follows from the others; UserError if it does not
    though it has such a name."""
    m, what = plan.config.model, "the one that config.json asks for"
    if name.startswith("vit.pooler."):
        return True  # a classifier does not use it
    if name == "lm_head.weight" and m.tie_embeddings:
        tensors = _tensors(plan, source)
        embedding = next(x for entry, _, x in tensors if entry.ours == ("embedding",))
        what = f"{embedding}, and config.json has tie_word_embeddings=true"
        same = np.array_equal(source.read(name), source.read(embedding))
    elif name.endswith(".rotary_emb.inv_freq"):
        wanted = m.rope_theta ** -(np.arange(0, m.head_dim, 2) / m.head_dim)
        same = source.shape(name) == wanted.shape
        same = same and np.allclose(source.read(name).astype(np.float64), wanted, 1e-2, 1e-4)
    elif name.endswith(".attn.bias"):
        square = source.read(name).squeeze()
        same = square.ndim == 2 and np.array_equal(square != 0, np.tri(*square.shape, dtype=bool))
    elif name.endswith(".attn.masked_bias"):
        same = source.read(name).size == 1
    else:
        return False
    if not same:
        remedy = "take it out of the weights, or correct config.json"
        raise UserError(f"--from={plan.source}: {name} differs from {what}; {remedy}")
    return True


def _tensors(plan: ImportPlan, source: Tensors) -> Iterator[tuple[Entry, int | None, str]]:
    """(entry, layer, name in the files) of every tensor."""
    for entry in plan.family.entries(plan.config.model):
        for layer in entry.layers(plan.config.model):
            name = entry.theirs.format(i=layer)
            short, names = name.removeprefix(plan.family.prefix), source.file_of
            yield entry, layer, name if name in names or short not in names else short


def dense_shapes(m: ModelConfig) -> dict[str, Shape]:
    """{dotted path: shape} of the dense model."""
    leaves = functional(decompose.dense_config(m))[2]
    tree = declared(leaves, lambda _, shape: jax.ShapeDtypeStruct(shape, np.float32))
    return {name: leaf.shape for name, leaf in by_name(tree).items()}


def _parameters(plan: ImportPlan, source: Tensors, abstract: Params) -> Params:
    """The parameters on their shardings, with random routers."""
    m, shapes, found = plan.config.model, dense_shapes(plan.config.model), {}
    leaves, structure = by_name(abstract), jax.tree.structure(abstract)

    def keep(path: str, dense: np.ndarray) -> None:
        found[path] = jax.device_put(decompose.cut_leaf(path, dense, m), leaves[path].sharding)

    for entry, layers in itertools.groupby(_tensors(plan, source), key=lambda item: item[0]):
        arrays = [np.empty(shapes[path], np.float32) for path in entry.ours]
        for _, layer, name in ticking(layers):
            at = ... if layer is None else layer
            theirs = source.read_float32(name)
            if entry.ours == ("positions",):
                theirs = theirs[..., : arrays[0].shape[0], :]
            for a, part in zip(arrays, entry.into_ours(theirs, [a[at].shape for a in arrays])):
                a[at] = part
        for path in entry.ours:
            keep(path, arrays.pop(0))
    rng = np.random.default_rng(plan.config.train.seed)
    for name, routing in m.unions().items():
        for leaf, shape in decompose.router_shapes(m, routing).items():
            std = 0.3 * m.d_model**-0.5
            value = rng.normal(0, std, shape) if "kernel" in leaf else np.zeros(shape)
            keep(f"layers.{m.place_of(name)}.router.{leaf}", value.astype(np.float32))
    return jax.tree.unflatten(structure, [found[path] for path in leaves])


def _data(plan: ImportPlan) -> DataBundle | str:
    """The data for fitting and losses, or why there are none."""
    c, tokenizer = plan.config, plan.tokenizer
    try:
        check_source(c)
    except ConfigError as error:
        return str(error)
    if c.model.task == "language" and tokenizer is None:
        return "there is no tokenizer.json, so no text can be given to it"
    bundle = load(c, default_cache_dir(), tokenizer)
    if c.model.task == "language" and bundle.vocab_size > c.model.vocab_size:
        sizes = f"has {bundle.vocab_size} tokens and the model {c.model.vocab_size}"
        raise UserError(f"config.data.tokenizer={c.data.tokenizer!r}: {sizes}; leave it out")
    return bundle


def _print_losses(config: Config, params: Params, data: DataBundle | str, mesh: Any) -> None:
    """The validation loss of all experts and of those configured."""
    if isinstance(data, str):
        return notice(f"the loss was not measured, and routers are random: {data}")
    limit = config.eval.batches or N_BATCHES
    unions = config.model.unions().items()
    chosen = ", ".join(f"{r.k} of {r.n_experts} experts in {name}" for name, r in unions)
    every = "all experts, the dense model"
    for c, what in ((all_experts(config), every), (config, chosen or "dense blocks")):
        found, _ = evaluate(build(c, mesh), params, data.validation, c, limit, whole=False)
        rows = f"{int(found['eval/rows'])} rows of validation"
        print(f"loss {found['eval/loss']:.4f} on {rows} with {what}", file=sys.stderr, flush=True)

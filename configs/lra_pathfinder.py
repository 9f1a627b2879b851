"""Long Range Arena, Pathfinder: are two dots joined by a dashed path, one pixel after the other.

Command:   uoe train --config=lra_pathfinder --config.data.path=DIR --workdir=runs/lra_pathfinder
           DIR is the lra_release directory of the benchmark's archive (pathfinder32/curv_contour_length_14 in it); without
           data.path, images in the manner of the benchmark are generated.
Hardware:  meant for one GPU; any will do.
Time:      not measured.
Expected:  not measured. Sizes and schedule are those of the released code.
"""

from uoe_jax import config as uoe


def get_config(variant: str = ""):
    c = uoe.base()
    c.data.source = "pathfinder"
    c.model.context_length = 1024  # every grey value is a token
    c.model.classifier.n_classes = 2
    c.model.task = "classify"
    c.model.causal = False
    c.model.n_layers = 2
    c.model.d_model = 64
    c.model.n_heads = 2
    c.model.d_hidden = 128
    c.model.smha.n_experts, c.model.smha.k = 2, 1
    c.model.uome.n_experts, c.model.uome.k = 4, 2
    for routing in (c.model.smha, c.model.uome):
        routing.priority = "score"
        routing.capacity_factor = 1.25
    c.optimizer.learning_rate = 1e-4
    c.optimizer.schedule = "linear"
    c.optimizer.final_fraction = 0.0
    c.optimizer.b2 = 0.999
    c.optimizer.warmup_steps = 8_000
    c.optimizer.weight_decay = 0.0
    c.model.dropout = 0.1
    c.train.steps = 150_000
    c.train.batch_size = 256
    c.train.log_every = 50
    c.eval.every = c.checkpoint.every = 3_000
    c.eval.test = True  # validation chooses the checkpoint, test is read once
    if variant == "tiny":
        return uoe.tiny(c)
    if variant:
        raise ValueError(f"there is no variant {variant!r}; give 'tiny' or none")
    return c

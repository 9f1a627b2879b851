"""CIFAR-10 by an encoder of unions of experts on patches of 4 x 4 pixels.

Command:   uoe train --config=cifar10 --config.data.path=DATA_DIR --workdir=runs/cifar10
           DATA_DIR: where TensorFlow Datasets prepared cifar10 (uoe says how).
           uoe train --config=cifar10:tiny … five steps of a small model; cifar10:100 is CIFAR-100.
Hardware:  meant for one GPU.
Time:      not measured.
Expected:  not measured. The paper's image code and sizes were not released; these are a small
           ViT's.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


def get_config(variant: str = ""):
    c = uoe.base()
    c.data.source = "cifar10"
    c.model.task = "classify"
    c.model.stem = "image"
    c.model.causal = False
    c.model.n_layers = 8
    c.model.d_model = 256
    c.model.n_heads = 8
    c.model.d_hidden = 1024
    c.model.context_length = 64
    c.model.position = "learned"
    c.model.dropout = 0.1
    c.model.dtype = "bfloat16"
    c.model.classifier.n_classes = 10
    c.model.image.update(height=32, width=32, channels=3, patch=4)
    c.model.smha.n_experts, c.model.smha.k = 4, 3
    c.model.uome.n_experts, c.model.uome.k = 8, 4
    for routing in (c.model.smha, c.model.uome):
        routing.priority = "score"
        routing.capacity_factor = 1.25
    c.augment.crop_padding = 4
    c.augment.flip = True
    c.augment.rand_layers = 2
    c.augment.mixup = 0.8
    c.augment.cutmix = 1.0
    c.train.label_smoothing = 0.1
    c.train.steps = 70_000  # 200 times the 45,000 images
    c.train.batch_size = 128
    c.train.log_every = 100
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 3_500
    c.optimizer.weight_decay = 0.05
    c.eval.every = c.checkpoint.every = 2_000
    c.eval.test = True
    if variant == "100":
        c.data.source = "cifar100"
        c.model.classifier.n_classes = 100
    return recipes.finished(c, variant, "100")

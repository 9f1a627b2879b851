"""ImageNet-1k by an encoder of unions of experts in the shape of ViT-S/16.

Command:   uoe train --config=imagenet --config.data.path=DATA_DIR --workdir=runs/imagenet
           DATA_DIR: where TensorFlow Datasets prepared imagenet2012 (uoe says how).
           uoe train --config=imagenet:tiny … five steps of a small model.
Hardware:  meant for one node of 8 GPUs, or a slice of 16 TPU chips.
Time:      not measured.
Expected:  not measured. The paper's image code and sizes were not released; the recipe is that of
           plain ViT-S/16 (Beyer et al. 2022), which reaches 76.5 % in 90 epochs with dense blocks.

The official validation split is the test split here; one in a hundred training images is held out
to choose the checkpoint.
"""

from uoe_jax import config as uoe
from uoe_jax.config import recipes


def get_config(variant: str = ""):
    c = uoe.base()
    c.data.source = "imagenet2012"
    c.model.task = "classify"
    c.model.stem = "image"
    c.model.causal = False
    c.model.n_layers = 12
    c.model.d_model = 384
    c.model.n_heads = 6
    c.model.d_hidden = 1536
    c.model.context_length = 196
    c.model.position = "learned"
    c.model.dtype = "bfloat16"
    c.model.bias = True
    c.model.norm = "layernorm"
    c.model.classifier.n_classes = 1000
    c.model.image.update(height=224, width=224, channels=3, patch=16)
    c.model.smha.n_experts, c.model.smha.k = 6, 4
    c.model.uome.n_experts, c.model.uome.k = 8, 4
    for routing in (c.model.smha, c.model.uome):
        routing.priority = "score"
        routing.capacity_factor = 1.25
    c.augment.crop_area = 0.05
    c.augment.flip = True
    c.augment.rand_layers = 2
    c.augment.rand_magnitude = 10
    c.augment.mixup = 0.2
    c.train.steps = 112_000  # 90 times the images
    c.train.batch_size = 1024
    c.train.log_every = 50
    c.optimizer.learning_rate = 1e-3
    c.optimizer.warmup_steps = 10_000
    c.optimizer.weight_decay = 0.1
    c.optimizer.b2 = 0.999
    c.optimizer.final_fraction = 0.0
    c.eval.every = c.checkpoint.every = 5_000
    c.eval.test = True
    return recipes.finished(c, variant)

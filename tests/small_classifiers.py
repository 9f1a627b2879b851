"""Small classifiers, one for each kind of input and pooling."""

from __future__ import annotations

from uoe_jax.config import from_dict

SCORE = dict(n_experts=4, k=2, priority="score", capacity_factor=1.0)

SMALL = dict(
    task="classify",
    causal=False,
    d_model=16,
    n_layers=2,
    n_heads=4,
    d_hidden=32,
    context_length=12,
    vocab_size=7,
)

IMAGE = dict(stem="image", context_length=12, image=dict(height=6, width=8, channels=3, patch=2))

CLASSIFIERS = {
    "mean": dict(smha=SCORE | dict(patch_size=5), uome=SCORE | dict(patch_size=4)),
    "cls, learned positions": dict(smha=SCORE | dict(patch_size=2), uome=SCORE, position="learned", classifier=dict(pooling="cls", n_classes=3)),
    "two inputs": dict(smha=SCORE | dict(unit="sequence"), uome=SCORE | dict(unit="hierarchical"), classifier=dict(n_inputs=2, d_head=8)),
    "two inputs, cls": dict(smha=SCORE, uome=SCORE | dict(patch_size=3), classifier=dict(n_inputs=2, pooling="cls")),
    "image": dict(smha=SCORE, uome=SCORE, norm="layernorm", bias=True, classifier=dict(n_classes=10), **IMAGE),
    "pixels, cls": dict(
        smha=SCORE | dict(patch_size=8), uome=SCORE | dict(patch_size=4), stem="image", context_length=48,
        image=dict(height=6, width=8, channels=1, patch=1), classifier=dict(pooling="cls"),
    ),
    "dense": dict(attention="dense", mlp="dense"),
    "causal": dict(causal=True, smha=dict(n_experts=4, k=3), uome=dict(n_experts=4)),
}  # fmt: skip


def classifier_config(name: str, **changes):
    return from_dict({"model": {**SMALL, **CLASSIFIERS[name], **changes}}).model

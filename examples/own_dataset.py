"""A dataset of one's own: sums such as "512+40=552", written out. This file is the source, its config and its command:

uoe train --config=examples/own_dataset.py --workdir=runs/sums
python examples/own_dataset.py generate --workdir=runs/sums --prompt=40+2=
"""

import sys

import numpy as np

from uoe_jax import cli
from uoe_jax import config as uoe
from uoe_jax.data.registry import add_source

SIZES = {"train": 20_000, "validation": 500, "test": 500}


class Sums:
    key = "sums-1"  # another one whenever the documents change

    def documents(self, split):
        """Every document as bytes, in every process the same."""
        numbers = np.random.default_rng(list(SIZES).index(split)).integers(
            0, 1000, (SIZES[split], 2)
        )
        return [f"{a}+{b}={a + b}".encode() for a, b in numbers]

    def record(self):
        """What a resumed run compares, and `uoe eval` keeps."""
        return {"sha256": self.key, "sums": SIZES}


add_source("sums", lambda data: Sums())


def get_config():
    c = uoe.base()
    c.data.source = "sums"
    c.model.context_length = 128
    c.model.d_model, c.model.n_layers, c.model.n_heads, c.model.d_hidden = 128, 2, 8, 512
    c.train.steps, c.optimizer.learning_rate = 300, 2e-3
    c.generate.prompt, c.generate.max_tokens = "40+2=", 8
    return c


if __name__ == "__main__":
    sys.exit(cli.main())

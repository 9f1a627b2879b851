"""A block of two unions of experts in a model of your own: run it with `python examples/blocks.py`.

Plain Flax and optax teach it to repeat the token of four places ago, which the attention must find.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from uoe_jax import SMHA, RoutingConfig, UoME

D, HEADS, HIDDEN, VOCABULARY, LENGTH = 64, 8, 256, 16, 32


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        routing = RoutingConfig(n_experts=4, k=2, capacity_factor=1.25, capacity_window=16)
        self.embed = nnx.Embed(VOCABULARY, D, rngs=rngs)
        self.positions = nnx.Embed(LENGTH, D, rngs=rngs)
        self.attention = SMHA(D, HEADS, routing, causal=True, rngs=rngs)  # 4 experts of 2 heads
        self.mlp = UoME(D, HIDDEN, routing, causal=True, rngs=rngs)  # 4 experts of 64 hidden units
        self.norms = nnx.List([nnx.LayerNorm(D, rngs=rngs) for _ in range(3)])

    def __call__(self, tokens_BL):
        x_BLD = self.embed(tokens_BL) + self.positions(jnp.arange(LENGTH))
        y_BLD, attention = self.attention(self.norms[0](x_BLD))
        x_BLD += y_BLD
        y_BLD, mlp = self.mlp(self.norms[1](x_BLD))
        return self.embed.attend(self.norms[2](x_BLD + y_BLD)), (attention, mlp)


@nnx.jit
def train_step(model, optimizer, tokens_BL):
    def loss_of(model):
        logits_BLV, stats = model(tokens_BL)
        score = optax.softmax_cross_entropy_with_integer_labels
        nll_BL = score(logits_BLV[:, 4:], tokens_BL[:, :-4])
        balance = sum(s.balance for s in stats) / len(tokens_BL)  # 1 each where the load is even
        return nll_BL.mean() + 0.01 * balance, (nll_BL.mean(), stats)

    (_, found), grads = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, grads)
    return found


def main():
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for step in range(301):
        tokens_BL = jax.random.randint(jax.random.key(step), (16, LENGTH), 0, VOCABULARY)
        loss, stats = train_step(model, optimizer, tokens_BL)
        if step % 50 == 0:
            loads = [[round(float(n)) for n in s.chosen_N] for s in stats]
            print(f"step {step}: loss {loss:.3f}, tokens by expert (attention, MLP):", *loads)
    return float(loss)


if __name__ == "__main__":
    main()

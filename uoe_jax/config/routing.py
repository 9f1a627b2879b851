"""The section of the configuration for a routed block, and the sizes that follow from it."""

import dataclasses
import math
from fractions import Fraction

from uoe_jax.config.fields import free_key, key

UNITS = ("patch", "sequence", "hierarchical")
PRIORITIES = ("position", "score")
GATES = ("sigmoid", "normalized", "score", "straight_through", "none")
ORDERS = ("gather", "project")
DISPATCHES = ("auto", "inverse", "scatter", "onehot")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """Routing of one union of experts (N experts, K chosen, C slots, P tokens per patch)."""

    n_experts: int = key(8, "N, experts: equal partitions of the block", low=1)
    k: int = key(4, "K, experts that each patch chooses (top-k)", low=1)
    capacity_factor: float = key(1.0, "expert capacity relative to an even load", above=0, high=1e6)
    capacity_window: int = key(64, "patches per capacity window, with priority='position'", low=1)
    sequence_capacity_factor: float = key(
        0.0, "training: sequences per expert relative to an even load; 0: any", low=0, high=1e6
    )
    sequence_group: int = key(8, "consecutive rows over which that limit is counted", low=1)
    patch_size: int = key(1, "P, consecutive tokens that are routed together", low=1)
    unit: str = key(
        "patch", "who chooses experts: each patch, the sequence, or both levels", choices=UNITS
    )
    priority: str = key(
        "position", "patches that get the slots: first come, or best score", choices=PRIORITIES
    )
    gate: str = key("sigmoid", "combine weight of a chosen expert", choices=GATES)
    order: str = key(
        "gather", "project the gathered tokens, or gather the projected tokens", choices=ORDERS
    )
    router_bias: bool = key(False, "add a bias to the router logits")
    router_noise: float = key(
        0.0, "standard deviation of router noise in training", low=0, high=1e3
    )
    balance_weight: float = key(0.01, "weight of the Switch load-balancing loss", low=0, high=1e3)
    bias_rate: float = key(0.0, "step of the loss-free load-balancing bias; 0: off", low=0, high=1)
    z_weight: float = key(0.0, "weight of the router z-loss", low=0, high=1e3)
    dispatch: str = free_key(
        "auto", "how slots are moved: gather, scatter-add, one-hot matmul", choices=DISPATCHES
    )

    def window_capacity(self, window: int | None = None) -> int:
        """Slots per expert in a window of patches: ceil(cf * window * K / N), in 1..window.

        Where the whole sequence chooses: ceil(cf * window). The factor counts as the decimal that
        was written: binary rounding moves no slot.
        """
        window = self.capacity_window if window is None else window
        share = Fraction(self.k, self.n_experts) if self.unit == "patch" else 1
        return max(1, min(window, math.ceil(Fraction(str(self.capacity_factor)) * window * share)))

    def sequence_capacity(self) -> int:
        """Sequences per expert in a group of rows: ceil(factor * group * K / N), in 1..group."""
        share = Fraction(str(self.sequence_capacity_factor)) * self.k / self.n_experts
        return max(1, min(self.sequence_group, math.ceil(share * self.sequence_group)))

    def row_share(self) -> float:
        """Rows of an expert's buffer in training, relative to the sequences."""
        bounded = self.sequence_capacity_factor
        return self.sequence_capacity() / self.sequence_group if bounded else 1.0

    def patches(self, length: int) -> int:
        """M, the patches of a row of `length` tokens; the last one is padded."""
        return -(-length // self.patch_size)

    def slot_tokens(self, length: int) -> int:
        """S = C·P, the tokens of a row of `length` tokens that fit in one expert's slots."""
        return self.slots(self.patches(length)) * self.patch_size

    def slots(self, n_patches: int) -> int:
        """C, the static number of slots per expert and sequence of `n_patches` patches (M)."""
        if self.priority == "score":
            return self.window_capacity(n_patches)
        # The last window has the capacity of a full one, so that neither padding nor later tokens
        # change which patches are kept.
        cap = self.window_capacity()
        full, rest = divmod(n_patches, self.capacity_window)
        return full * cap + min(cap, rest)

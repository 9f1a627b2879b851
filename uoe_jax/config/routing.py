"""How a routed block routes: one section of the configuration for each, and the sizes that follow from it."""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

from uoe_jax.config.fields import key


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How one block (SMHA or UoME) routes. Letters: N experts, K chosen, C slots, P tokens per patch."""

    n_experts: int = key(8, "N, the number of equal partitions of the block", low=1)
    k: int = key(4, "K, experts each patch chooses", low=1)
    capacity_factor: float = key(
        1.0,
        "slots per expert, relative to an even load of the patches that may come to it",
        above=0,
        high=1e6,
    )
    capacity_window: int = key(
        64,
        "patches per capacity window (priority='position'); a shorter row, or the rest of one, has as many slots as a whole window",
        low=1,
    )
    sequence_capacity_factor: float = key(
        0.0,
        "in training, sequences per expert relative to an even load (unit not 'patch'); 0: no bound",
        low=0,
        high=1e6,
    )
    sequence_group: int = key(
        8, "consecutive rows among which sequence_capacity_factor counts", low=1
    )
    patch_size: int = key(1, "P, consecutive tokens routed together", low=1)
    unit: str = key(
        "patch",
        "who chooses experts: each patch; the whole sequence; or the sequence, whose patches then compete for the slots",
        choices=("patch", "sequence", "hierarchical"),
    )
    priority: str = key(
        "position", "who gets the slots: first come, or best score", choices=("position", "score")
    )
    gate: str = key(
        "sigmoid",
        "combine weight of a chosen expert",
        choices=("sigmoid", "normalized", "score", "straight_through", "none"),
    )
    order: str = key(
        "gather",
        "gather tokens, then project into the experts; or project, then gather",
        choices=("gather", "project"),
    )
    router_bias: bool = key(False, "a bias b_g in the router")
    router_noise: float = key(
        0.0,
        "standard deviation of the noise on the logits that choose experts, in training",
        low=0,
        high=1e3,
    )
    balance_weight: float = key(0.01, "weight of the Switch balance loss", low=0, high=1e3)
    bias_rate: float = key(
        0.0, "step of the loss-free balancing bias; 0 turns it off", low=0, high=1
    )
    z_weight: float = key(0.0, "weight of the router z-loss", low=0, high=1e3)
    dispatch: str = key(
        "auto",
        "how slots are gathered and combined: by gathers alone, by scatter-add, or by a product with a one-hot matrix",
        choices=("auto", "inverse", "scatter", "onehot"),
        free=True,
    )

    def window_capacity(self, window: int | None = None) -> int:
        """Slots per expert in a window of `window` patches: ceil(cf * window * K / N), exact, at least 1, at most window.

        Where the whole sequence chooses, all patches come to a chosen expert, and the capacity is ceil(cf * window).
        The factor is read as the decimal the person wrote, so that no binary rounding adds or loses a slot.
        """
        window = self.capacity_window if window is None else window
        share = Fraction(self.k, self.n_experts) if self.unit == "patch" else 1
        return max(1, min(window, math.ceil(Fraction(str(self.capacity_factor)) * window * share)))

    def sequence_capacity(self) -> int:
        """Sequences per expert in a group of `sequence_group` rows: ceil(factor * group * K / N), exact, at least 1."""
        share = (
            Fraction(str(self.sequence_capacity_factor))
            * self.sequence_group
            * self.k
            / self.n_experts
        )
        return max(1, min(self.sequence_group, math.ceil(share)))

    def row_share(self) -> float:
        """Rows of an expert's buffer in training, relative to the sequences."""
        return (
            self.sequence_capacity() / self.sequence_group if self.sequence_capacity_factor else 1.0
        )

    def patches(self, length: int) -> int:
        """M, the patches of a row of `length` tokens, the last one filled up."""
        return -(-length // self.patch_size)

    def slot_tokens(self, length: int) -> int:
        """S = C·P, the tokens an expert has room for in a row of `length` tokens."""
        return self.slots(self.patches(length)) * self.patch_size

    def slots(self, n_patches: int) -> int:
        """C, the static number of slots per expert and sequence of `n_patches` patches (M)."""
        if self.priority == "score":
            return self.window_capacity(n_patches)
        # Every window has the capacity of a full one, the last too, so that neither padding nor later tokens matter.
        cap = self.window_capacity()
        full, rest = divmod(n_patches, self.capacity_window)
        return full * cap + min(cap, rest)

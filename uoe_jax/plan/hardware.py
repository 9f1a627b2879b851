"""What a device and its networks can do by its maker's figures, and the share that programs reach.

Figures are of one device. Networks are counted in bytes/s that a device sends while it receives as
many; what makers call bidirectional is twice that. Shares are ranges (low, high). Only the H200 was
measured by us: a large bf16 product at 790e12 FLOP/s, a copy at 4.3e12 B/s.
"""

import dataclasses

from uoe_jax.costs.flops import PEAK_FLOPS
from uoe_jax.errors import UserError

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device."""

    kind: str  # its `device_kind` in JAX, the key of its peak 16-bit FLOP/s in `flops.PEAK_FLOPS`
    memory: float  # bytes of HBM
    bandwidth: float  # of HBM, bytes/s
    fast: float  # bytes/s sent inside a domain by a collective along one mesh axis
    domain: int  # devices that the fast network connects
    slow: float  # bytes/s sent between domains
    hops: Range  # seconds from a device to the next, inside a domain and out of it
    products: Range  # share of the peak that matrix products reach
    attention: Range  # the same of flash attention
    source: str  # of the figures
    # Share of HBM's bandwidth that kernels reach which only move data: gathers 0.76-0.79 on H100
    # (FBGEMM issue 3993); a copy 0.90 on H200 (measured).
    streams: Range = (0.75, 0.90)
    network: Range = (0.70, 0.90)  # share of a network's bandwidth (assumed)

    @property
    def flops(self) -> float:
        return PEAK_FLOPS[self.kind]


HOPS = (3.4e-6, 14e-6)  # NCCL's tables of latency: ring, protocol Simple (src/graph/tuning.cc)

# Products: 0.80 was measured on H200; 0.66 is the best grouped product of tokamax's H100 timings.
# Attention: the same timings of cuDNN and Mosaic, head width 64 and 128, 512 to 4096 tokens.
H100 = Hardware(
    kind="NVIDIA H100 80GB HBM3",
    memory=80e9, bandwidth=3.35e12, fast=450e9, domain=8, slow=50e9, hops=HOPS,
    products=(0.60, 0.80), attention=(0.25, 0.55),
    source="NVIDIA H100 SXM data sheet (80 GB, 3.35 TB/s, NVLink 900 GB/s both ways); "
    "DGX H100: 8 GPUs, 400 Gb/s each",
)  # fmt: skip
H200 = dataclasses.replace(  # of the same generation
    H100,
    kind="NVIDIA H200", memory=141e9, bandwidth=4.8e12,
    source="NVIDIA H200 SXM data sheet (141 GB, 4.8 TB/s, NVLink 900 GB/s both ways); "
    "DGX H200: 8 GPUs, 400 Gb/s each",
)  # fmt: skip
# JAX products reach 430-1400 of 2250 TFLOP/s (tokamax); the rest of the range is assumed.
B200 = Hardware(
    kind="NVIDIA B200",
    memory=180e9, bandwidth=8e12, fast=900e9, domain=8, slow=50e9, hops=HOPS,
    products=(0.50, 0.75), attention=(0.20, 0.50),
    source="NVIDIA HGX B200 data sheet (180 GB, 8 TB/s, NVLink 1.8 TB/s both ways); "
    "DGX B200: 8 GPUs, 400 Gb/s each",
)  # fmt: skip
# A mesh axis lies on one axis of the torus; a ring uses both its links of 100 GB/s each way.
# Products: whole dense models reach 0.65 (v5p) and 0.44 (v6e) of the peak (MaxText). Hops: assumed.
V5P = Hardware(
    kind="TPU v5p",
    memory=95 * 2**30, bandwidth=2.765e12, fast=200e9, domain=6144, slow=6.25e9,
    hops=(1e-6, 30e-6), products=(0.70, 0.90), attention=(0.30, 0.60),
    source="Google Cloud TPU v5p page (95 GiB, 2765 GB/s, ICI 1200 GB/s both ways in a 3D torus, "
    "DCN 50 Gb/s, slices of 6144)",
)  # fmt: skip
V6E = Hardware(
    kind="TPU v6 lite",
    memory=32e9, bandwidth=1.638e12, fast=200e9, domain=256, slow=12.5e9,
    hops=(1e-6, 30e-6), products=(0.55, 0.85), attention=(0.30, 0.60),
    source="Google Cloud TPU v6e page (32 GB, 1638 GB/s, ICI 800 GB/s both ways in a 2D torus, "
    "4 x 200 Gb/s for 8 chips, pods of 256)",
)  # fmt: skip
HARDWARE = {"h100": H100, "h200": H200, "b200": B200, "v5p": V5P, "v6e": V6E}
CPU = "cpu"  # the compiler's own figures; time is not predicted


def find(name: str) -> Hardware | None:
    """The named hardware; None for the CPU devices of the plan's own. UserError if unknown."""
    if name != CPU and name not in HARDWARE:
        known = f"{', '.join(HARDWARE)}, or {CPU}"
        raise UserError(f"--hardware={name}: is not known; choose one of {known}")
    return HARDWARE.get(name)

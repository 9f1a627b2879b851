"""What a device and its networks can do, as its maker states it, and the share of that which programs get.

A statement is one device's. Networks are counted in bytes a device sends in a second while it also receives as much; what
makers call bidirectional is twice that. The shares are ranges (low, high): nothing here was measured on these devices by us,
but for the H200, on which a large bf16 product was measured at 790e12 FLOP/s and a copy at 4.3e12 B/s.
"""

from __future__ import annotations

import dataclasses

from uoe_jax.costs.flops import PEAK_FLOPS
from uoe_jax.errors import UserError

Range = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of device.

    Attributes:
      kind: its `device_kind` in JAX, by which flops.PEAK_FLOPS has its peak 16-bit FLOP/s.
      memory: bytes of HBM. bandwidth: of HBM, bytes/s.
      fast: bytes/s sent over the network inside a domain, by a collective along one mesh axis. domain: devices in it.
      slow: bytes/s sent between domains. hops: seconds from a device to the next, inside a domain and out of it.
      products, attention, streams, network: reached share of the peak by matrix products, by flash attention, of HBM's
        bandwidth by kernels that only move data, and of a network's by a collective.
      source: of the figures.
    """

    kind: str
    memory: float
    bandwidth: float
    fast: float
    domain: int
    slow: float
    hops: Range
    products: Range
    attention: Range
    source: str
    streams: Range = (
        0.75,
        0.90,
    )  # gathers 0.76-0.79 on H100 (FBGEMM issue 3993); a copy 0.90 on H200 (measured)
    network: Range = (0.70, 0.90)  # assumed

    @property
    def flops(self) -> float:
        return PEAK_FLOPS[self.kind]


GIB = 2**30
# Products: 0.80 of the peak was measured on H200; 0.66 is the best grouped product of tokamax's own H100 timings. Attention:
# the same timings for cuDNN and Mosaic at head width 64 and 128, 512 to 4096 tokens, forward and backward.
HOPS = (3.4e-6, 14e-6)  # NCCL's own tables of latency, ring, protocol Simple (src/graph/tuning.cc)


H100 = Hardware(
    kind="NVIDIA H100 80GB HBM3", memory=80e9, bandwidth=3.35e12, fast=450e9, domain=8, slow=50e9, hops=HOPS,
    products=(0.60, 0.80), attention=(0.25, 0.55),
    source="NVIDIA H100 SXM data sheet (80 GB, 3.35 TB/s, NVLink 900 GB/s both ways); DGX H100: 8 GPUs, 400 Gb/s each",
)  # fmt: skip
NVIDIA = {
    "h100": H100,
    "h200": dataclasses.replace(  # of the same generation
        H100, kind="NVIDIA H200", memory=141e9, bandwidth=4.8e12,
        source="NVIDIA H200 SXM data sheet (141 GB, 4.8 TB/s, NVLink 900 GB/s both ways); DGX H200: 8 GPUs, 400 Gb/s each",
    ),
    "b200": Hardware(
        # Published JAX products reach 430-1400 of 2250 TFLOP/s (tokamax); the rest of the range is assumed.
        kind="NVIDIA B200", memory=180e9, bandwidth=8e12, fast=900e9, domain=8, slow=50e9, hops=HOPS,
        products=(0.50, 0.75), attention=(0.20, 0.50),
        source="NVIDIA HGX B200 data sheet (180 GB, 8 TB/s, NVLink 1.8 TB/s both ways); DGX B200: 8 GPUs, 400 Gb/s each",
    ),
}  # fmt: skip
# A mesh axis lies on one axis of the torus, whose two links of 100 GB/s each way a ring uses together. Products: dense
# models reach 0.65 (v5p) and 0.44 (v6e) of the peak with everything around them (MaxText), so products more. Hops are assumed.
TPU = {
    "v5p": Hardware(
        kind="TPU v5p", memory=95 * GIB, bandwidth=2.765e12, fast=200e9, domain=6144, slow=6.25e9, hops=(1e-6, 30e-6),
        products=(0.70, 0.90), attention=(0.30, 0.60),
        source="Google Cloud TPU v5p page (95 GiB, 2765 GB/s, ICI 1200 GB/s both ways in a 3D torus, DCN 50 Gb/s, "
        "slices of 6144)",
    ),
    "v6e": Hardware(
        kind="TPU v6 lite", memory=32e9, bandwidth=1.638e12, fast=200e9, domain=256, slow=12.5e9, hops=(1e-6, 30e-6),
        products=(0.55, 0.85), attention=(0.30, 0.60),
        source="Google Cloud TPU v6e page (32 GB, 1638 GB/s, ICI 800 GB/s both ways in a 2D torus, 4 x 200 Gb/s for 8 chips, "
        "pods of 256)",
    ),
}  # fmt: skip
HARDWARE = NVIDIA | TPU
CPU = "cpu"  # what the plan itself compiles for: its memory is the compiler's own figure, its time is not predicted


def find(name: str) -> Hardware | None:
    """The named hardware; None for the CPU devices that the plan itself compiles for.

    Raises:
      UserError: an unknown name.
    """
    if name != CPU and name not in HARDWARE:
        raise UserError(
            f"--hardware={name}: is not known; choose one of {', '.join(HARDWARE)}, or {CPU}"
        )
    return HARDWARE.get(name)

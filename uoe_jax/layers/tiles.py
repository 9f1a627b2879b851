"""In what pieces scores are computed, for whoever computes them and whoever counts them: tiles of attention
(`layers.flash`), chunks of tokens against a vocabulary (`layers.chunked`)."""

from __future__ import annotations

LARGEST = 256  # tokens: of 128, 256 and 512 the fastest on CPUs (docs/performance.md)
LEAST_CHUNK = 1024  # tokens: enough for a product to outweigh adding the words' gradient up (docs/performance.md)
CHUNK_SCORES = 1 << 22  # 16 MiB of float32


def tile(length: int) -> int:
    """The side of a tile: rows that are longer than LARGEST are cut in equal parts, filled up to a multiple of 8."""
    n = -(-length // LARGEST)
    return length if n == 1 else -(-length // (8 * n)) * 8


def pairs(length: int, causal: bool) -> list[tuple[int, int]]:
    """(tile of queries, tile of keys) of all tiles that are computed; under a causal mask none that lies behind it."""
    n = -(-length // tile(length))
    return [(i, j) for i in range(n) for j in range(i + 1 if causal else n)]


def computed_scores(length: int, causal: bool) -> int:
    """Scores computed for one head of a row of `length` tokens."""
    n, side = -(-length // tile(length)), tile(length)
    return (n * (n + 1) // 2 if causal else n * n) * side**2


def chunk(n: int, words: int) -> int:
    """Tokens that are scored at a time, of n against so many words."""
    return min(n, max(LEAST_CHUNK, CHUNK_SCORES // words))

"""Sizes of attention's tiles (`layers.flash`) and of the chunks of tokens of `layers.chunked`."""

LARGEST = 256  # tokens: of 128, 256 and 512 the fastest on CPUs (docs/appendix)
LEAST_CHUNK = 1024  # tokens: enough matmul to outweigh summing the table's gradient (ibid.)
CHUNK_SCORES = 1 << 22  # 16 MiB of float32


def tile(length: int) -> int:
    """The side of a tile: rows longer than LARGEST are cut in equal parts, a multiple of 8."""
    n = -(-length // LARGEST)
    return length if n == 1 else -(-length // (8 * n)) * 8


def pairs(length: int, causal: bool) -> list[tuple[int, int]]:
    """(tile of queries, tile of keys) of all that are computed; causal: no tile of later keys."""
    n = -(-length // tile(length))
    return [(i, j) for i in range(n) for j in range(i + 1 if causal else n)]


def computed_scores(length: int, causal: bool) -> int:
    """Scores computed for one head of a row of `length` tokens."""
    n, side = -(-length // tile(length)), tile(length)
    return (n * (n + 1) // 2 if causal else n * n) * side**2


def chunk(n: int, entries: int) -> int:
    """Tokens scored at a time, of n tokens against so many vocabulary entries."""
    return min(n, max(LEAST_CHUNK, CHUNK_SCORES // entries))

"""Tokens per second of the loader alone: what a training step may take before the data is what it waits for.

    python -m benchmarks.loader [--batches=500]        a few seconds; prints one JSON line
"""

from __future__ import annotations

import argparse
import json
import time

from uoe_jax.data import pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--patch", type=int, default=4)
    args = parser.parse_args()

    began = time.perf_counter()
    data = pipeline.load("stdlib", "", "bytes", args.length, args.patch, pipeline.default_cache_dir())
    load_s = time.perf_counter() - began
    batches = pipeline.TrainBatches(data.train, args.batch_size, seed=0)
    batches[0]  # first touch: pages of the store, grain's own set-up

    began = time.perf_counter()
    valid = sum(int((batches[step]["segments"] > 0).sum()) for step in range(args.batches))
    direct_s = time.perf_counter() - began
    began = time.perf_counter()
    with pipeline.Prefetcher(batches.__getitem__, 0, args.batches) as prefetcher:
        for step in range(args.batches):
            prefetcher.get(step)
    prefetched_s = time.perf_counter() - began

    tokens = args.batches * args.batch_size * args.length
    result = {
        "benchmark": "loader",
        "tokens_per_s": round(tokens / direct_s),
        "tokens_per_s_prefetched": round(tokens / prefetched_s),
        "ms_per_batch": round(direct_s / args.batches * 1e3, 3),
        "valid_share": round(valid / tokens, 4),
        "load_s": round(load_s, 3),
        "shape": [args.batch_size, args.length],
        "n_rows": len(data.train),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()

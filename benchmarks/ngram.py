"""Bits per byte of byte n-gram models on the validation split: the bar a trained model must clear.

    python -m benchmarks.ngram [--path=DIR]        a few seconds on one core; prints one JSON line

Documents are independent and scored as in packing: each byte and the closing separator is a target,
the opening separator is context, and the sum over all targets is divided by the bytes alone.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from uoe_jax.data import pipeline
from uoe_jax.data.sources import stdlib
from uoe_jax.data.store import TokenStore, open_or_build
from uoe_jax.data.tokenizers.base import ByteTokenizer

ALPHA = 1.0  # added to every bigram count


def ngrams(store: TokenStore, separator: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 [n_targets] each: the token two before, the one before, and the target itself."""
    n_targets = int(store.offsets[-1]) + len(store)
    targets = np.full(n_targets, separator, np.int64)
    ends = store.offsets[1:] + np.arange(len(store))  # the closing separator of each document
    is_token = np.ones(n_targets, bool)
    is_token[ends] = False
    targets[is_token] = store.tokens_T
    # The separator that closes a document opens the next one.
    before = np.concatenate([[separator], targets[:-1]])
    two_before = np.concatenate([[separator], before[:-1]])
    # Context does not reach into the previous document.
    two_before[np.concatenate([[0], ends[:-1] + 1])] = separator
    return two_before, before, targets


def fit_and_score(
    train: TokenStore, held_out: TokenStore, v: int, separator: int
) -> dict[str, float]:
    """Bits per byte on `held_out` of a bigram and two interpolated trigrams fitted on `train`."""
    a, b, c = ngrams(train, separator)
    c1 = np.bincount(c, minlength=v)  # [V]
    c2 = np.bincount(b * v + c, minlength=v * v)  # [V·V]: (b, c)
    c3 = np.bincount((a * v + b) * v + c, minlength=v**3)  # [V·V·V]
    n1 = len(c)
    n2 = c2.reshape(v, v).sum(1)  # [V]: b as a context
    n3 = c3.reshape(v * v, v).sum(1)  # [V·V]: (a, b) as a context
    t2 = (c2.reshape(v, v) > 0).sum(1)  # different tokens seen after b
    t3 = (c3.reshape(v * v, v) > 0).sum(1)

    # Deleted interpolation (Brants 2000): each seen trigram votes, with its count, for the order
    # that predicts it best once it is taken out of the counts.
    seen = np.flatnonzero(c3)
    ab, bc = seen // v, seen % (v * v)
    without = [
        (c1[bc % v] - 1) / (n1 - 1),
        (c2[bc] - 1) / np.maximum(n2[bc // v] - 1, 1),
        (c3[seen] - 1) / np.maximum(n3[ab] - 1, 1),
    ]
    weights = np.bincount(np.argmax(without, axis=0), c3[seen], minlength=3) / n1

    a, b, c = ngrams(held_out, separator)
    ab, bc, abc = a * v + b, b * v + c, (a * v + b) * v + c
    n_bytes = int(held_out.offsets[-1])
    p1 = (c1[c] + 1) / (n1 + v)
    p2 = c2[bc] / np.maximum(n2[b], 1)
    p3 = c3[abc] / np.maximum(n3[ab], 1)
    # An unseen context has no estimate of its own order: its weight goes to the next order down.
    w1, w2, w3 = weights[0], weights[1] * (n2[b] > 0), weights[2] * (n3[ab] > 0)
    p2_wb = (c2[bc] + t2[b] * p1) / np.maximum(n2[b] + t2[b], 1)
    p2_wb = np.where(n2[b] > 0, p2_wb, p1)
    p3_wb = np.where(n3[ab] > 0, (c3[abc] + t3[ab] * p2_wb) / np.maximum(n3[ab] + t3[ab], 1), p2_wb)
    models = {
        "bigram": (c2[bc] + ALPHA) / (n2[b] + ALPHA * v),
        "trigram_interpolated": (w1 * p1 + w2 * p2 + w3 * p3) / (w1 + w2 + w3),
        "trigram_witten_bell": p3_wb,
    }
    scores = {name: float(-np.log2(p).sum() / n_bytes) for name, p in models.items()}
    return {**scores, **{f"weight_{order}": float(w) for order, w in enumerate(weights, 1)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    help_text = "directory of .py files; the standard library's by default"
    parser.add_argument("--path", default="", help=help_text)
    path = parser.parse_args().path
    began = time.perf_counter()
    cache_dir = pipeline.default_cache_dir()
    tokenizer = ByteTokenizer()
    source = stdlib.open_stdlib(path, cache_dir)
    stores = {
        split: open_or_build(
            lambda split=split: source.documents(split), tokenizer, cache_dir, source.key, split
        )
        for split in ("train", "validation")
    }
    scores = fit_and_score(
        stores["train"], stores["validation"], tokenizer.vocab_size, tokenizer.separator
    )
    rounded = {f"bits_per_byte/{k}" if "gram" in k else k: round(s, 4) for k, s in scores.items()}
    facts = {
        "python": source.facts["python_version"],
        "sha256": source.facts["sha256"][:12],
        "validation_bytes": source.facts["n_bytes"]["validation"],
        "seconds": round(time.perf_counter() - began, 2),
    }
    print(json.dumps({"benchmark": "ngram", **rounded, **facts}))


if __name__ == "__main__":
    main()

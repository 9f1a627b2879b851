"""What is done to images: sizes, values against small references, and draws that are a function of the generator alone."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from uoe_jax.config.data import AugmentConfig
from uoe_jax.data.augment import (
    RAND_OPS,
    Mix,
    as_floats,
    augmented,
    fitted,
    grey_tokens,
    mixed,
    mixing,
)

EVERYTHING = AugmentConfig(
    crop_area=0.3,
    crop_padding=3,
    flip=True,
    rand_layers=2,
    rand_magnitude=15,
    mixup=0.8,
    cutmix=1.0,
)
PAPER_OPS = (
    "identity autocontrast equalize rotate solarize color posterize contrast brightness sharpness shear_x shear_y "
    "translate_x translate_y"
)  # arXiv 1909.13719, section 3


def generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return generator(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def ramp(height: int, width: int) -> np.ndarray:
    """Red is the column and green is the row, so that a crop tells where it comes from."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, np.zeros_like(rows)], -1).astype(np.uint8)


def applied(name: str, image: np.ndarray, strength: float, sign: int = 1) -> np.ndarray:
    from PIL import Image

    pillow = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    return np.asarray(RAND_OPS[name](pillow, strength, sign)).reshape(image.shape)


def digest() -> str:
    """Of many augmented and mixed images; also run in a fresh process."""
    found = hashlib.sha256()
    for seed in range(20):
        rng = generator(7, seed)
        for shape in ((40, 50, 3), (24, 32, 1)):
            image = augmented(noise(*shape), EVERYTHING, rng, 24, 32)
            mix = mixing(EVERYTHING, rng, 24, 32)
            found.update(
                mixed(image, noise(24, 32, shape[-1], seed=1), mix).tobytes() + repr(mix).encode()
            )
    return found.hexdigest()


# ---- draws --------------------------------------------------------------------------------------------------------


def test_image_and_seed_give_the_same_in_a_fresh_process():
    code = "from test_augment import digest; print(digest())"
    env = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)}
    fresh = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert fresh.stdout.strip() == digest()


def test_draws_do_not_move():
    """If this fails, batches mean something else than in every run before; nothing here depends on Pillow's release."""
    image = noise(8, 6)
    c = AugmentConfig(crop_padding=2, flip=True, mixup=1.0, cutmix=1.0)
    rng = generator(1, 2, 3)
    found, mix = augmented(image, c, rng, 8, 6), mixing(c, rng, 8, 6)
    again = generator(1, 2, 3)
    top, left = again.integers(5), again.integers(5)
    window = np.pad(image, ((2, 2), (2, 2), (0, 0)))[top : top + 8, left : left + 6]
    flipped, cut = again.integers(2), again.integers(2)
    np.testing.assert_array_equal(found, window[:, ::-1] if flipped else window)
    share = again.beta(1.0, 1.0)
    assert (mix.box is not None) == bool(cut) and (cut or mix.share == share)
    assert (top, left, flipped, cut) == (4, 3, 1, 0)


def test_what_is_off_draws_nothing_and_changes_nothing():
    rng, image = generator(5), noise(9, 7)
    np.testing.assert_array_equal(augmented(image, AugmentConfig(), rng, 9, 7), image)
    assert mixing(AugmentConfig(), rng, 9, 7) is None
    assert rng.integers(1 << 60) == generator(5).integers(1 << 60)


def test_arguments_are_never_written_to():
    image = noise(24, 32)
    image.flags.writeable = False
    for seed in range(20):
        result = augmented(image, EVERYTHING, generator(seed), 24, 32)
        mixed(image, result, mixing(EVERYTHING, generator(seed), 24, 32))


# ---- crops and flips ----------------------------------------------------------------------------------------------


def test_padded_crops_are_windows_of_the_image_in_black_and_reach_every_offset():
    image = np.maximum(noise(6, 5), 1)
    padded = np.zeros((10, 9, 3), np.uint8)
    padded[2:8, 2:7] = image
    windows = {padded[y : y + 6, x : x + 5].tobytes(): (y, x) for y in range(5) for x in range(5)}
    c = AugmentConfig(crop_padding=2)
    seen = {windows[augmented(image, c, generator(seed), 6, 5).tobytes()] for seed in range(400)}
    assert len(seen) == 25


def test_half_of_the_images_are_mirrored():
    image = noise(4, 5)
    c = AugmentConfig(flip=True)
    results = [augmented(image, c, generator(seed), 4, 5) for seed in range(1000)]
    mirrored = [bool((r == image[:, ::-1]).all()) for r in results]
    assert (
        all(m or (r == image).all() for m, r in zip(mirrored, results))
        and 440 < sum(mirrored) < 560
    )


def test_random_crops_keep_the_asked_share_at_an_allowed_aspect_and_land_everywhere():
    h, w, image = 180, 240, ramp(180, 240)
    areas, aspects, centres = [], [], []
    for seed in range(300):
        crop = augmented(image, AugmentConfig(crop_area=0.25), generator(seed), 32, 32).astype(
            float
        )
        assert crop.shape == (32, 32, 3)
        columns, rows = crop[16, :, 0], crop[:, 16, 1]
        crop_w, crop_h = (
            (v[-2] - v[1]) * 32 / 29 for v in (columns, rows)
        )  # from the middle of pixel 1 to that of 30
        areas.append(crop_w * crop_h / (h * w))
        aspects.append(crop_w / crop_h)
        centres.append((columns.mean() / w, rows.mean() / h))
    assert min(areas) > 0.25 - 0.02 and max(areas) < 1.02 and max(areas) > 0.9
    assert (
        0.5 < np.mean(areas) < 0.65 and np.std(areas) > 0.12
    )  # even from 1/4 to 1, less the ones that do not fit
    assert (
        min(aspects) > 0.75 - 0.05
        and max(aspects) < 4 / 3 + 0.07
        and abs(np.mean(np.log(aspects))) < 0.05
    )
    assert np.std(centres, axis=0).min() > 0.05 and abs(np.mean(centres, axis=0) - 0.5).max() < 0.03


def test_where_no_random_crop_fits_the_middle_is_taken():
    crop = augmented(ramp(12, 240), AugmentConfig(crop_area=0.99), generator(0), 12, 16)
    columns = crop[5, :, 0].astype(int)
    np.testing.assert_array_equal(columns, np.arange(112, 128))  # 12 high, so 16 wide, around 120


def test_evaluation_keeps_the_right_size_and_cuts_the_middle_of_another():
    image = noise(32, 32)
    assert fitted(image, 32, 32) is image and fitted(image, 32, 32, resize=True) is image
    with pytest.raises(ValueError, match="32x32 pixels where 28x28"):
        fitted(image, 28, 28)
    with pytest.raises(ValueError, match="32x32 pixels where 28x28"):
        augmented(image, AugmentConfig(flip=True), generator(0), 28, 28)
    assert augmented(image, AugmentConfig(flip=True), generator(0), 28, 28, resize=True).shape == (
        28,
        28,
        3,
    )
    # 128 -> 112 by 7/8 without a change of scale: exactly the middle.
    big = ramp(128, 250)
    np.testing.assert_array_equal(fitted(big, 112, 112, resize=True), big[8:120, 69:181])
    half = fitted(ramp(256, 250), 112, 112, resize=True).astype(float)  # 7/8 of 250 in 112 pixels
    scale = 250 * 0.875 / 112
    np.testing.assert_allclose(half[50, :, 0], 124.5 + (np.arange(112) - 55.5) * scale, atol=1)
    assert abs(half[:, 50, 1].mean() - 127.5) < 1
    assert fitted(noise(20, 30), 32, 48, resize=True).shape == (32, 48, 3)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        noise(0, 4),
    ],
)
def test_what_is_no_image_is_refused_in_words(image):
    for use in (fitted, lambda image, h, w: augmented(image, EVERYTHING, generator(0), h, w)):
        with pytest.raises(ValueError, match="is no image: uint8"):
            use(image, 4, 4)
    with pytest.raises(ValueError, match="is no image: uint8"):
        grey_tokens(image)


# ---- RandAugment --------------------------------------------------------------------------------------------------


def test_operations_are_those_of_the_paper():
    assert " ".join(RAND_OPS) == PAPER_OPS


@pytest.mark.parametrize(
    "name, channels",
    [(name, n) for name in PAPER_OPS.split() for n in (1, 3) if (name, n) != ("color", 1)],
)
def test_strength_zero_changes_nothing_and_full_strength_something(name, channels):
    image = (
        noise(16, 20, channels) // 2 + 20
    )  # autocontrast and equalize have something to do at any strength
    at = [[applied(name, image, strength, sign) for sign in (1, -1)] for strength in (0, 1)]
    fixed = name in ("autocontrast", "equalize")
    for sign in (0, 1):
        assert (at[0][sign] == image).all() != fixed
        assert (at[1][sign] == image).all() == (name == "identity")
    one_way = name in ("identity", "autocontrast", "equalize", "solarize", "posterize")
    assert (at[1][0] == at[1][1]).all() == one_way


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_agree_with_references(channels):
    image = noise(20, 24, channels)
    x = image.astype(int)
    np.testing.assert_array_equal(applied("solarize", image, 0.5), np.where(x < 128, x, 255 - x))
    assert x.max() == 255
    np.testing.assert_array_equal(applied("solarize", image, 0.0), image)
    np.testing.assert_array_equal(applied("posterize", image, 1.0), x // 16 * 16)
    for sign in (1, -1):
        bright = np.clip(x * (1 + 0.9 * 0.5 * sign), 0, 255)
        np.testing.assert_allclose(applied("brightness", image, 0.5, sign), bright, atol=1)
        for name, moved in (
            ("translate_x", lambda r, c: (r, c + sign * 0.8 * 24 * 150 / 331)),
            ("translate_y", lambda r, c: (r + sign * 0.8 * 20 * 150 / 331, c)),
            ("shear_x", lambda r, c: (r, c + sign * 0.8 * 0.3 * r)),
            ("shear_y", lambda r, c: (r + sign * 0.8 * 0.3 * c, c)),
        ):
            want = np.full_like(image, 128)
            for r in range(20):
                for c in range(24):  # middles of pixels, the nearest one of the image
                    y, z = moved(r + 0.5, c + 0.5)
                    if 0 <= y < 20 and 0 <= z < 24:
                        want[r, c] = image[int(y), int(z)]
            found = applied(name, image, 0.8, sign)
            assert (found != want).mean() < 0.02, name  # where the nearest is a tie
    turned = applied("rotate", ramp(41, 41), 1.0)  # 30 degrees against the clock, about the middle
    assert abs(int(turned[20, 30, 0]) - 20 - 10 * np.cos(np.pi / 6)) <= 1
    assert abs(int(turned[20, 30, 1]) - 20 - 10 * np.sin(np.pi / 6)) <= 1


def test_one_channel_never_draws_an_operation_on_colours(monkeypatch):
    drawn = set()

    def spy(name):
        return lambda image, m, sign: (drawn.add((name, sign)), image)[1]

    for name in list(RAND_OPS):
        monkeypatch.setitem(RAND_OPS, name, spy(name))
    c = AugmentConfig(rand_layers=3)
    for channels, expected in (
        (1, set(PAPER_OPS.split()) - {"color"}),
        (3, set(PAPER_OPS.split())),
    ):
        drawn.clear()
        for seed in range(200):
            assert augmented(noise(5, 5, channels), c, generator(seed), 5, 5).shape == (
                5,
                5,
                channels,
            )
        assert drawn == {(name, sign) for name in expected for sign in (1, -1)}


# ---- mixing -------------------------------------------------------------------------------------------------------


def test_labels_are_weighed_by_the_pixels_each_image_keeps():
    h, w = 12, 18
    black, white = np.zeros((h, w, 3), np.uint8), np.full((h, w, 3), 255, np.uint8)
    cut = 0
    c = AugmentConfig(mixup=0.8, cutmix=1.0)
    shares = {True: [], False: []}
    for seed in range(1000):
        mix = mixing(c, generator(seed), h, w)
        result = mixed(white, black, mix)
        assert 0 <= mix.share <= 1
        assert abs(result.mean() / 255 - mix.share) < (1e-9 if mix.box else 0.5 / 255 + 1e-6)
        if mix.box:
            top, bottom, left, right = mix.box
            assert 0 <= top <= bottom <= h and 0 <= left <= right <= w
            assert (result[top:bottom, left:right] == 0).all() and set(np.unique(result)) <= {
                0,
                255,
            }
        shares[mix.box is not None].append(mix.share)
        cut += mix.box is not None
    assert 440 < cut < 560
    # Beta(a, a) has the variance 1 / (4 (2 a + 1)); the edges cut CutMix's boxes, so that the first keeps more than half.
    assert (
        abs(np.mean(shares[False]) - 0.5) < 0.05
        and abs(np.var(shares[False]) - 1 / (4 * 2.6)) < 0.015
    )
    assert 0.55 < np.mean(shares[True]) < 0.8


def test_mixup_is_the_rounded_mean():
    a, b = noise(5, 6), noise(5, 6, seed=1)
    want = np.round(0.25 * a.astype(float) + 0.75 * b)
    np.testing.assert_allclose(mixed(a, b, Mix(0.25, None)), want, atol=0)
    np.testing.assert_array_equal(mixed(a, b, Mix(1.0, None)), a)
    np.testing.assert_array_equal(mixed(a, b, Mix(0.0, (0, 5, 0, 6))), b)
    with pytest.raises(ValueError, match="cannot be mixed"):
        mixed(a, noise(5, 7), Mix(0.5, None))


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_one_of_the_mixings_alone_is_always_that_one(key):
    for alpha in (1e-30, 0.2, 100.0):
        mixes = [mixing(AugmentConfig(**{key: alpha}), generator(seed), 8, 8) for seed in range(50)]
        assert {mix.box is None for mix in mixes} == {key == "mixup"}
        assert all(0 <= mix.share <= 1 for mix in mixes)


# ---- what models take ---------------------------------------------------------------------------------------------


def test_grey_is_that_of_long_range_arena():
    """One pixel at a time as tf.image does it: to float32 by 1/255, the weights, times 255.5, cut off."""
    colours = noise(30, 40)
    weights = [np.float32(weight) for weight in (0.2989, 0.5870, 0.1140)]
    want = []
    for pixel in colours.reshape(-1, 3):
        unit = [np.float32(value) * np.float32(1 / 255) for value in pixel]
        total = np.float32(0)
        for value, weight in zip(unit, weights):
            total = total + value * weight
        want.append(int(total * np.float32(255.5)))
    tokens = grey_tokens(colours)
    assert tokens.dtype == np.int32 and tokens.tolist() == want
    known = np.uint8(
        [[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 200, 200]]]
    )
    assert grey_tokens(known).tolist() == [76, 149, 29, 255, 0, 200]
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    assert (
        grey_tokens(every).tolist()
        == list(range(256))
        == grey_tokens(np.repeat(every, 3, -1)).tolist()
    )


def test_pixels_become_floats_around_zero():
    x = as_floats(np.uint8([[[0], [255], [51]]]), 2.0)
    assert x.dtype == np.float32 and x.shape == (1, 3, 1)
    np.testing.assert_allclose(x.reshape(-1), [-2, 2, -1.2], rtol=1e-6)
    np.testing.assert_allclose(
        as_floats(np.uint8([[[0], [255], [51]]]), 1.0).reshape(-1), [-1, 1, -0.6], rtol=1e-6
    )

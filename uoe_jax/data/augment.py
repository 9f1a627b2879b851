"""Image augmentation: uint8 in and out, pure functions of the image and of a generator's draws.

The draws are part of batch = f(seed, step): made in the order of the steps in a docstring, and none
for a step that the configuration turns off. Pillow resamples.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from PIL.Image import Resampling, Transform

from uoe_jax.config.data import AugmentConfig

if TYPE_CHECKING:
    import jax

MARGIN = 0.875  # of the short side that evaluation keeps where it resizes: 224 of 256
ASPECTS = (3 / 4, 4 / 3)  # of random crops, width by height
CROP_TRIALS = 10
EMPTY = "#808080"  # the 128 that RandAugment's geometric operations fill in, as its authors do
TRANSLATED = 150 / 331  # of a side, the strongest shift; searched on images of 331 pixels
LUMA = np.array([0.2989, 0.5870, 0.1140], np.float32)

Rng = np.random.Generator
Pixels = TypeVar("Pixels", np.ndarray, "jax.Array")


class Mix(NamedTuple):
    """How two images and their labels are mixed."""

    share: float  # weight of the first label, from 0 to 1; the second has the rest
    box: tuple[int, int, int, int] | None  # top, bottom, left, right of the second; None: mixup


def augmented(
    image: np.ndarray, c: AugmentConfig, rng: Rng, height: int, width: int, *, resize: bool = False
) -> np.ndarray:
    """One draw of crops, flips and RandAugment for training; `mixing` comes after.

    In this order: the random resized crop (for crop_area below 1, else `fitted`, which draws
    nothing), the padded crop (its top, then its left edge), the flip, RandAugment (each layer draws
    an operation, then the sign of its strength, used or not). Otherwise as `fitted`.
    """
    _check(image)
    if c.crop_area < 1:
        image = _resized_crop(image, c.crop_area, rng, height, width)
    else:
        image = fitted(image, height, width, resize=resize)
    if c.crop_padding:
        both = (c.crop_padding, c.crop_padding)
        top, left = (int(rng.integers(2 * c.crop_padding + 1)) for _ in range(2))
        image = np.pad(image, (both, both, (0, 0)))[top : top + height, left : left + width]
    if c.flip and rng.integers(2):
        image = image[:, ::-1]
    if c.rand_layers:
        names = [name for name in RAND_OPS if image.shape[-1] == 3 or name != "color"]
        pillow = _to_pillow(image)
        for _ in range(c.rand_layers):
            name = names[int(rng.integers(len(names)))]
            sign = 1 - 2 * int(rng.integers(2))
            pillow = RAND_OPS[name](pillow, c.rand_magnitude / 30, sign)
        image = _to_array(pillow)
    return np.ascontiguousarray(image)


def fitted(image: np.ndarray, height: int, width: int, *, resize: bool = False) -> np.ndarray:
    """uint8 [height,width,channels], the size the model takes, of uint8 [any,any,1 or 3].

    resize: of another size, the centre is cut out, 7/8 of the tighter pair of sides, and resized
    (as for ImageNet); else it is refused. Raises ValueError for an image that cannot be used.
    """
    _check(image)
    h, w, _ = image.shape
    if (h, w) == (height, width):
        return image
    if not resize:
        raise ValueError(f"an image of {h}x{w} pixels where {height}x{width} are expected")
    scale = MARGIN * min(h / height, w / width)  # pixels of the image per pixel of the result
    crop_h, crop_w = scale * height, scale * width
    box = ((h - crop_h) / 2, (w - crop_w) / 2, crop_h, crop_w)
    return _resized(image, box, height, width)


def mixing(c: AugmentConfig, rng: Rng, height: int, width: int) -> Mix | None:
    """Draws how a pair of images is mixed; None where neither mixup nor CutMix is on.

    In this order: which of them, where both are on; the weight from Beta(alpha, alpha); for CutMix
    row and column of the box's centre. The edge may cut the box; the share is the area kept.
    """
    if not c.mixup and not c.cutmix:
        return None
    cut = bool(rng.integers(2)) if c.mixup and c.cutmix else bool(c.cutmix)
    alpha = c.cutmix if cut else c.mixup
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return Mix(share, None)
    side = math.sqrt(1 - share)
    top, bottom = _span(height, side, rng)
    left, right = _span(width, side, rng)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def mixed(a: np.ndarray, b: np.ndarray, mix: Mix) -> np.ndarray:
    """Two images uint8 [height,width,channels] as one. Raises ValueError for unequal shapes."""
    if a.shape != b.shape:
        raise ValueError(f"images of shapes {a.shape} and {b.shape} cannot be mixed")
    if mix.box is None:
        share = np.float32(mix.share)
        return np.rint(share * a + (1 - share) * b).astype(np.uint8)
    top, bottom, left, right = mix.box
    result = a.copy()
    result[top:bottom, left:right] = b[top:bottom, left:right]
    return result


def grey_tokens(image: np.ndarray) -> np.ndarray:
    """The image as a sequence of grey pixels, row by row: int32 [height*width], from 0 to 255.

    Colours become grey as by the tf.image.rgb_to_grayscale of Long Range Arena: in float32, times
    255.5, truncated. For 237 of the 16.7 million colours the order of the sum decides.
    """
    _check(image)
    if image.shape[-1] == 1:
        return image.reshape(-1).astype(np.int32)
    unit = image.astype(np.float32) * np.float32(1 / 255)
    grey = unit[..., 0] * LUMA[0] + unit[..., 1] * LUMA[1] + unit[..., 2] * LUMA[2]
    return (grey * np.float32(255.5)).astype(np.int32).reshape(-1)


def as_floats(image: Pixels, bound: float) -> Pixels:
    """uint8 pixels as the model takes them: float32 of the same shape, from -bound to bound."""
    return (image.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5 / bound)


def _check(image: np.ndarray) -> None:
    has_pixels = image.ndim == 3 and image.size and image.shape[-1] in (1, 3)
    if image.dtype != np.uint8 or not has_pixels:
        found = f"{image.dtype} {list(image.shape)}"
        raise ValueError(f"{found} is no image: uint8 [height,width,1 or 3] is expected")


def _span(size: int, share: float, rng: Rng) -> tuple[int, int]:
    """Start and end of `share` of a side around a drawn centre, cut off at the side's ends."""
    length = int(size * share)
    start = int(rng.integers(size)) - length // 2
    return max(start, 0), min(start + length, size)


def _resized_crop(image: np.ndarray, area: float, rng: Rng, height: int, width: int) -> np.ndarray:
    """Inception's crop: draws share of the area and log aspect, up to ten times, then top and left.

    If none fits, the largest centre crop of an allowed aspect is taken.
    """
    h, w, _ = image.shape
    low, high = ASPECTS
    for _ in range(CROP_TRIALS):
        pixels = rng.uniform(area, 1) * h * w
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        crop_h, crop_w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < crop_h <= h and 0 < crop_w <= w:
            top, left = int(rng.integers(h - crop_h + 1)), int(rng.integers(w - crop_w + 1))
            return _resized(image, (top, left, crop_h, crop_w), height, width)
    crop_h, crop_w = min(h, max(1, round(w / low))), min(w, max(1, round(h * high)))
    box = ((h - crop_h) // 2, (w - crop_w) // 2, crop_h, crop_w)
    return _resized(image, box, height, width)


def _resized(image: np.ndarray, box: tuple[float, ...], height: int, width: int) -> np.ndarray:
    """box: top, left, height, width."""
    top, left, h, w = box
    corners = (left, top, left + w, top + h)
    return _to_array(_to_pillow(image).resize((width, height), Resampling.BILINEAR, corners))


def _to_pillow(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))


def _to_array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).reshape(image.height, image.width, -1)


def _moved(image: Image.Image, *coefficients: float) -> Image.Image:
    """The pixel at (x, y) is the nearest one to (a x + b y + c, d x + e y + f)."""
    return image.transform(image.size, Transform.AFFINE, coefficients, fillcolor=EMPTY)


# RandAugment (arXiv:1909.13719): functions of an image, a strength from 0 to 1 and its sign. Their
# order is part of the draw. Ranges as in torchvision, except that strength 0 changes nothing: the
# threshold 256 solarises no pixel.
RAND_OPS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "identity": lambda im, m, sign: im,
    "autocontrast": lambda im, m, sign: ImageOps.autocontrast(im),
    "equalize": lambda im, m, sign: ImageOps.equalize(im),
    "rotate": lambda im, m, sign: im.rotate(30 * m * sign, fillcolor=EMPTY),
    "solarize": lambda im, m, sign: ImageOps.solarize(im, round(256 * (1 - m))),
    "color": lambda im, m, sign: ImageEnhance.Color(im).enhance(1 + 0.9 * m * sign),
    "posterize": lambda im, m, sign: ImageOps.posterize(im, 8 - round(4 * m)),
    "contrast": lambda im, m, sign: ImageEnhance.Contrast(im).enhance(1 + 0.9 * m * sign),
    "brightness": lambda im, m, sign: ImageEnhance.Brightness(im).enhance(1 + 0.9 * m * sign),
    "sharpness": lambda im, m, sign: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * m * sign),
    "shear_x": lambda im, m, sign: _moved(im, 1, 0.3 * m * sign, 0, 0, 1, 0),
    "shear_y": lambda im, m, sign: _moved(im, 1, 0, 0, 0.3 * m * sign, 1, 0),
    "translate_x": lambda im, m, sign: _moved(im, 1, 0, TRANSLATED * m * sign * im.width, 0, 1, 0),
    "translate_y": lambda im, m, sign: _moved(im, 1, 0, 0, 0, 1, TRANSLATED * m * sign * im.height),
}

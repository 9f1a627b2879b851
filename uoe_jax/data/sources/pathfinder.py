"""Pathfinder: are two dots the ends of one dashed path? Images by index, from LRA or drawn.

The task is that of Linsley et al. 2018 (generator: drewlinsley/pathfinder, snakes2.py) as the Long
Range Arena released it (google-research/long-range-arena, lra_benchmarks/data/pathfinder.py).
Images are uint8 [size, size, 1]; label 1 means one path.
"""

import dataclasses
import functools
import hashlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uoe_jax.config.data import PathfinderConfig
from uoe_jax.data.examples import SPLITS, Example, Indexed, LabelledSource
from uoe_jax.data.prepared import ARENA
from uoe_jax.distributed.watchdog import ticking
from uoe_jax.errors import ConfigError, UserError, os_error_as
from uoe_jax.runtime_env import expanded

VERSION = 1  # of the drawing: raise it when a (seed, split, index) means another image

TASK = "curv_contour_length_14"  # LRA's "hard", which is its Pathfinder task
INSIDE = ("", TASK, *(f"{folder}pathfinder32/{TASK}" for folder in ARENA))
AGAIN = "unpack the archive again."
REMEDY = (
    "unpack lra_release.gz (a tar archive, linked at github.com/google-research/long-range-arena), "
    f"and give the directory in which lra_release lies, or its {TASK} with metadata/ and imgs/."
)


def read_pathfinder(path: str) -> LabelledSource:
    """The images of LRA's archive. At the start only metadata and file sizes are read and hashed.

    As in LRA, the first 80 % are for training, 10 % each for validation and test, and then images
    of 0 bytes are dropped (lra_benchmarks/image/input_pipeline.py). LRA's order is a shuffle of
    TensorFlow Datasets; ours is metadata/0.npy, 1.npy, … line by line: labels are independent.
    """
    given = Path(expanded(path, "config.data.path"))
    root = next((given / i for i in INSIDE if (given / i / "metadata").is_dir()), None)
    if root is None:
        found = "holds no Pathfinder images" if given.is_dir() else "is no directory here"
        raise ConfigError("data.path", path, f"{found}: {REMEDY}")
    content = hashlib.sha256()
    names, labels = _read_metadata(root, content)
    sizes = np.zeros(len(names), "<i8")
    for i, name in enumerate(ticking(names)):
        problem = f"{root / name}: image {i} of the metadata cannot be read"
        with os_error_as(UserError, problem, REMEDY):
            sizes[i] = (root / name).stat().st_size
    content.update(sizes.tobytes())
    n = len(names)
    every = dict(zip(SPLITS, np.split(np.arange(n), [n * 8 // 10, n * 9 // 10])))
    kept = {split: at[sizes[at] > 0] for split, at in every.items()}
    for split, at in kept.items():
        if not len(at):
            remedy = f"its {n} images leave the {split} split empty: {REMEDY}"
            raise ConfigError("data.path", path, remedy)
    size = len(read_png(root / names[kept["train"][0]], f"example 0 of train in {root}"))

    def read(split: str, i: int) -> Example:
        at, what = kept[split][i], f"example {i} of {split} in {root}"
        image_YX1 = read_png(root / names[at], what)
        if image_YX1.shape != (size, size, 1):
            height, width, _ = image_YX1.shape
            found = f"{height} x {width} pixels where the first has {size} x {size}"
            raise UserError(f"{root / names[at]}: {what} has {found}: {AGAIN}")
        return Example((image_YX1,), int(labels[at]))

    facts = {
        "directory": str(root.resolve()),
        "sha256": content.hexdigest(),
        "size": size,
        "n_examples": {split: len(at) for split, at in kept.items()},
        "n_empty": {split: len(at) - len(kept[split]) for split, at in every.items()},
        "n_positive": {split: int(labels[at].sum()) for split, at in kept.items()},
    }
    return LabelledSource(2, lambda s: Indexed(len(kept[s]), functools.partial(read, s)), facts)


def read_png(file: Path, what: str) -> np.ndarray:
    """uint8 [height, width, 1] in grey. Raises UserError, with `what` it is, for a damaged PNG."""
    from PIL import Image  # only for commands that read images

    try:
        data = file.read_bytes()
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            image.verify()  # all checksums, which decoding does not look at
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.array(image.convert("L"))[:, :, None]
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more
        raise UserError(f"{file}: {what} is not a readable PNG ({error}): {AGAIN}") from error


def _read_metadata(root: Path, content: Any) -> tuple[list[str], np.ndarray]:
    """Names relative to `root` and labels int8 [n]; the bytes read go into the hash `content`."""
    # They are texts. A line is "imgs/0 sample_0.png 0 1 …": folder, file, number, label.
    files = [file for file in (root / "metadata").iterdir() if re.fullmatch(r"\d+\.npy", file.name)]
    if not files:
        raise UserError(f"{root / 'metadata'}: holds no 0.npy, 1.npy, …: {REMEDY}")
    names, labels = [], []
    for file in ticking(sorted(files, key=lambda file: int(file.stem))):
        try:
            data = file.read_bytes()
            lines = data.decode("ascii").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            wrong = f"is not the text that Long Range Arena released ({error})"
            raise UserError(f"{file}: {wrong}: {REMEDY}") from error
        content.update(data)
        for number, line in enumerate(lines, 1):
            columns = line.split()
            if len(columns) < 4 or columns[3] not in ("0", "1"):
                wanted = "where a folder, a file, a number and a label 0 or 1 are expected"
                raise UserError(f"{file}: line {number} is {line[:80]!r} {wanted}: {AGAIN}")
            names.append(f"{columns[0]}/{columns[1]}")
            labels.append(int(columns[3]))
    return names, np.array(labels, np.int8)


# Lengths are in units: 4 are an eighth of the image, or what lets a path of `length` dashes be 1.5
# sides of the image long, but never less than 3 pixels, as in LRA's images of 32 x 32.
STEP = 4.0  # a dash and the gap behind it
DASH = 2.0
WIDTH = 1.0
DOT_RADIUS = 1.6
MARGIN = 2.5  # from the middle of a line to the border
APART = 3.0  # between the middles of lines of different paths, and of non-consecutive dashes
APART_DOT = 4.0  # between the end of a long path and the lines of others
NEAR = 9.0  # how far apart the two long paths may begin
MATCH = 1 / 72  # how far the dots' distances of the two labels may differ, per squared length
TURN = 0.8  # radians a path turns at most from dash to dash
CELLS = 2  # of the map of taken places, to a unit
GREY = 190  # of dashes; dots are 255, the ground 0
WALKERS = 96  # candidates for a path, grown side by side
TRIALS = 4  # images drawn at the start, to see that there is room
TRIAL_TRIES = 200  # pairs of long paths that each of these may take
TRIES = 20 * TRIAL_TRIES  # that any other may take: where all trials succeed, none should fail


def open_pathfinder(path: str, c: PathfinderConfig) -> LabelledSource:
    """The archive under `path`. Where that is empty, images drawn from (seed, split, index).

    Two long paths of `length` dashes begin near each other. One dot marks the beginning of one of
    them, another the end of the same (label 1) or of the other (label 0). Both ends are about as
    far from the marked beginning: neither brightness nor the dots' distance tells the label. Up to
    `distractors` short paths of a third of the dashes are added where there is room. Labels
    alternate. Raises ConfigError where the long paths find no room in images of this size.
    """
    if path:
        return read_pathfinder(path)
    rngs = [np.random.default_rng([c.seed, len(SPLITS), i]) for i in range(TRIALS)]
    found = [len(_draw_scene(c, rng, TRIAL_TRIES).short) for rng in rngs]

    def read(number: int, i: int) -> Example:
        scene = _draw_scene(c, np.random.default_rng([c.seed, number, i]), TRIES)
        return Example((_render(scene, i % 2, c.size),), i % 2)

    def examples(split: str) -> Indexed:
        number = SPLITS.index(split)
        return Indexed(c.n_eval if number else c.n_train, functools.partial(read, number))

    drawn = {"distractors_drawn": sum(found) / TRIALS}  # that found room, on average
    return LabelledSource(2, examples, {"version": VERSION, **dataclasses.asdict(c), **drawn})


class _Scene(NamedTuple):
    """A picture without its dots: dashes by their beginnings and ends (x, y), in units."""

    side: float  # of the image
    long: np.ndarray  # [2, 2·length, 2]; a dot marks the beginning of the first path
    short: list[np.ndarray]  # [2·dashes, 2] each, the distractors


def _draw_scene(c: PathfinderConfig, rng: np.random.Generator, tries: int) -> _Scene:
    """Raises ConfigError where none of so many pairs of long paths found room."""
    side = c.size / max(0.75, min(c.size / 8, 1.5 * c.size / c.length) / STEP)
    for _ in range(tries):
        taken = _Taken(side)
        first = _grow(rng, rng.uniform(MARGIN, side - MARGIN, (WALKERS, 2)), c.length, taken)
        if not len(first):
            continue
        taken.add(first[0])
        angle_W, far_W = rng.uniform(0, 2 * np.pi, WALKERS), rng.uniform(APART_DOT, NEAR, WALKERS)
        near_W2 = first[0, 0] + far_W[:, None] * np.stack([np.cos(angle_W), np.sin(angle_W)], 1)
        second = _grow(rng, near_W2, c.length, taken)
        long = _pair(rng, first[0], second) if len(second) else None
        if long is None:
            continue
        taken.add(long)
        taken.add(long[:, [0, 0, -1, -1]], APART_DOT)
        starts = rng.uniform(MARGIN, side - MARGIN, (WALKERS + 16 * c.distractors, 2))
        short: list[np.ndarray] = []
        found = _grow(rng, starts, max(1, c.length // 3), taken)
        while len(found) and len(short) < c.distractors:
            short.append(found[0])
            taken.add(found[0])
            begin, end = found[:, ::2], found[:, 1::2]
            points = np.concatenate([begin, (begin + end) / 2, end], 1)
            found = found[taken.free(points).all(1)]
        return _Scene(side, long, short)
    what = f"two paths of so many dashes find no room in {c.size} x {c.size} pixels"
    raise ConfigError("data.pathfinder.length", c.length, f"{what}: give fewer, or a larger size.")


def _pair(rng: np.random.Generator, first: np.ndarray, seconds: np.ndarray) -> np.ndarray | None:
    """Two paths [2, 2·length, 2] whose dots' distance does not tell the label, or None."""
    # Longer paths curl: the distances of their ends spread more, and nearness tells less.
    match = max(0.25, MATCH * (first.shape[0] // 2) ** 2)
    to_second, to_first = _nearest(first[[0, -1]], seconds), _nearest(seconds[:, [0, -1]], first)
    clear_n = np.minimum(to_second, to_first) > APART_DOT
    pairs = np.stack([np.broadcast_to(first, seconds.shape), seconds], 1)
    for order in ([0, 1], [1, 0]) if rng.random() < 0.5 else ([1, 0], [0, 1]):
        ends_n2 = np.linalg.norm(pairs[:, order, -1] - pairs[:, order[0], :1], axis=-1)
        alike_n = abs(ends_n2[:, 0] - ends_n2[:, 1]) < match
        good_n = clear_n & (ends_n2.min(1) > APART_DOT) & alike_n
        if good_n.any():
            return pairs[np.argmax(good_n), order]
    return None


def _nearest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float [n]: the least distance between points of a and b, float [n or absent, points, 2]."""
    x, y = np.moveaxis(a[..., :, None, :] - b[..., None, :, :], -1, 0)
    return np.sqrt((x * x + y * y).min((-1, -2)))


class _Taken:
    """A map of the places where no further line may run, with `CELLS` cells to a unit."""

    def __init__(self, side: float) -> None:
        n = int(np.ceil(side * CELLS))
        edge = int(MARGIN * CELLS)
        self._map = np.ones((n, n))
        self._map[edge : n - edge, edge : n - edge] = 0

    def add(self, path: np.ndarray, distance: float = APART) -> None:
        """Takes all within `distance` of the dashes, float [… 2·n, 2]."""
        _stroke(self._map, CELLS * path.reshape(-1, 2, 2), CELLS * distance, 1.0)

    def free(self, points: np.ndarray) -> np.ndarray:
        """bool […]: which of the points […, 2] are inside and not taken."""
        cells = np.floor(points * CELLS).astype(np.int64)  # outside: the border, which is taken
        x, y = np.moveaxis(np.clip(cells, 0, len(self._map) - 1), -1, 0)
        return self._map[y, x] < 0.5


def _grow(rng: np.random.Generator, at_W2: np.ndarray, dashes: int, taken: _Taken) -> np.ndarray:
    """Paths from `at_W2`, float [W, 2·dashes, 2], clear of what is taken and of themselves.

    All W grow at once, dash by dash. One without room is replaced by a copy of one that has room,
    so that twisted paths in a narrow place are found too. Where none has room, W is 0.
    """
    walkers = len(at_W2)
    dots = np.array([0, DASH / 2, DASH])[:, None]  # points that stand for a dash
    points = np.zeros((walkers, dashes, 3, 2))
    heading_W = rng.uniform(0, 2 * np.pi, walkers)
    for d in range(dashes):
        along_W12 = np.stack([np.cos(heading_W), np.sin(heading_W)], 1)[:, None]
        new = at_W2[:, None] + dots * along_W12
        room_W = taken.free(new).all(1)
        if d > 1:
            room_W &= _nearest(new, points[:, : d - 1].reshape(walkers, -1, 2)) > APART
        good = np.flatnonzero(room_W)
        if not len(good):
            return np.zeros((0, 2 * dashes, 2))
        points[:, d] = new
        source = np.concatenate([good, rng.choice(good, walkers - len(good))])
        points = points[source]
        at_W2 = (at_W2 + STEP * along_W12[:, 0])[source]
        heading_W = heading_W[source] + rng.uniform(-TURN, TURN, walkers)
    return points[rng.permutation(walkers), :, ::2].reshape(walkers, -1, 2)


def _render(scene: _Scene, label: int, size: int) -> np.ndarray:
    """uint8 [size, size, 1]: antialiased lines and dots; where they meet, the brighter counts."""
    unit = size / scene.side
    dashes = unit * np.concatenate([*scene.long, *scene.short]).reshape(-1, 2, 2)
    dots = unit * np.stack([scene.long[0, [0, 0]], scene.long[0 if label else 1, [-1, -1]]])
    image = np.zeros((size, size))
    _stroke(image, dashes, max(1.0, WIDTH * unit) / 2, GREY)
    _stroke(image, dots, DOT_RADIUS * unit, 255)
    return np.rint(image).astype(np.uint8)[:, :, None]


def _stroke(image: np.ndarray, lines_N22: np.ndarray, radius: float, bright: float) -> None:
    """Draws lines with round ends into `image`, each in a window about its middle; in pixels."""
    size, begin_N2, end_N2 = len(image), lines_N22[:, 0], lines_N22[:, 1]
    along_N2 = end_N2 - begin_N2
    half = int(np.ceil(np.abs(along_N2).max() / 2 + radius + 1))
    window = np.arange(-half, half + 1)
    middle_N2 = np.floor((begin_N2 + end_N2) / 2).astype(np.int64)
    x = middle_N2[:, 0, None, None] + window  # [N, 1, w]
    y = middle_N2[:, 1, None, None] + window[:, None]  # [N, w, 1]
    dx, dy = x + 0.5 - begin_N2[:, 0, None, None], y + 0.5 - begin_N2[:, 1, None, None]
    ax, ay = along_N2[:, 0, None, None], along_N2[:, 1, None, None]
    t = np.clip((dx * ax + dy * ay) / np.maximum(ax**2 + ay**2, 1e-9), 0, 1)
    cover = np.clip(radius + 0.5 - np.hypot(dx - t * ax, dy - t * ay), 0, 1)
    x, y = np.broadcast_arrays(x, y)
    inside = (cover > 0) & (x >= 0) & (x < size) & (y >= 0) & (y < size)
    np.maximum.at(image, (y[inside], x[inside]), bright * cover[inside])

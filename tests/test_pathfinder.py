"""Pathfinder: the released archive read as it stands, and drawn images whose label only the paths give away."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from uoe_jax.config.data import PathfinderConfig
from uoe_jax.data.sources import pathfinder
from uoe_jax.data.sources.pathfinder import open_pathfinder, read_pathfinder
from uoe_jax.errors import ConfigError, UserError

REPO = Path(__file__).resolve().parent.parent
SPLITS = ("train", "validation", "test")
TASK = "curv_contour_length_14"

# ---- the archive ---------------------------------------------------------------------------------------------------


def write_archive(
    task: Path, folders: tuple[int, ...] = (0, 1, 2, 10), each: int = 5
) -> list[tuple[np.ndarray, int]]:
    """An archive of LRA's layout in `task`; returns its images and labels in the order of the metadata."""
    rng = np.random.default_rng(0)
    (task / "metadata").mkdir(parents=True)
    examples = []
    for n in folders:
        (task / f"imgs/{n}").mkdir(parents=True)
        lines = []
        for i in range(each):
            image, label = rng.integers(0, 256, (32, 32), np.uint8), int(rng.integers(2))
            Image.fromarray(image).save(task / f"imgs/{n}/sample_{i}.png")
            lines.append(
                f"imgs/{n} sample_{i}.png {i} {label} 1.0 14 4 2 0.5 1 1\n"
            )  # as snakes2.py orders them
            examples.append((image, label))
        (task / f"metadata/{n}.npy").write_text("".join(lines))
    return examples


@pytest.fixture
def archive(tmp_path) -> tuple[Path, list[tuple[np.ndarray, int]]]:
    task = tmp_path / "lra_release/lra_release/pathfinder32" / TASK
    return task, write_archive(task)


def test_archive_is_read_in_the_order_of_its_metadata_and_cut_in_tenths(archive):
    task, examples = archive
    source = read_pathfinder(str(task))
    assert (source.n_classes, source.vocab_size) == (2, 0)
    bounds = {
        "train": (0, 16),
        "validation": (16, 18),
        "test": (18, 20),
    }  # folder 10 comes last, not after 1
    for split, (begin, end) in bounds.items():
        read = source.examples(split)
        assert len(read) == end - begin
        for i, (image, label) in enumerate(examples[begin:end]):
            example = read[i]
            assert len(example.inputs) == 1 and example.inputs[0].dtype == np.uint8
            np.testing.assert_array_equal(example.inputs[0], image[:, :, None])
            assert example.label == label and type(example.label) is int
        for i in (-1, end - begin):
            with pytest.raises(IndexError):
                read[i]
    record = source.record()
    assert (
        record["n_examples"] == {"train": 16, "validation": 2, "test": 2} and record["size"] == 32
    )
    assert record["n_positive"]["train"] == sum(label for _, label in examples[:16])
    assert sum(record["n_empty"].values()) == 0


@pytest.mark.parametrize("levels", range(5))
def test_archive_is_found_from_each_directory_above_it(archive, levels):
    path = [archive[0], *archive[0].parents][levels]
    source = open_pathfinder(str(path), PathfinderConfig())
    assert source.record()["directory"] == str(archive[0].resolve())


def test_empty_images_are_left_out_and_counted(archive):
    task, examples = archive
    for name in ("0/sample_1", "2/sample_0", "10/sample_4"):
        (task / f"imgs/{name}.png").write_bytes(b"")
    source = read_pathfinder(str(task))
    # The splits are cut first, as LRA does: an empty file moves no other image to another split.
    assert source.record()["n_examples"] == {"train": 14, "validation": 2, "test": 1}
    assert source.record()["n_empty"] == {"train": 2, "validation": 0, "test": 1}
    kept = [example for i, example in enumerate(examples[:16]) if i not in (1, 10)]
    for i, (image, label) in enumerate(kept):
        example = source.examples("train")[i]
        assert example.label == label and (example.inputs[0][:, :, 0] == image).all()


def test_record_names_the_content(tmp_path):
    sources = []
    for name in "abc":
        write_archive(tmp_path / name)
        if name == "c":
            metadata = tmp_path / "c/metadata/1.npy"
            lines = metadata.read_text().splitlines(keepends=True)
            words = lines[0].split(" ")
            words[3] = "01"[words[3] == "0"]
            metadata.write_text("".join([" ".join(words), *lines[1:]]))
        sources.append(read_pathfinder(str(tmp_path / name)).record()["sha256"])
    assert sources[0] == sources[1] != sources[2]


@pytest.mark.parametrize("what", ["nothing", "file", "empty directory"])
def test_missing_archive_says_what_to_download_and_where_to_put_it(tmp_path, what):
    path = tmp_path / "here"
    if what == "file":
        path.write_bytes(b"")
    elif what == "empty directory":
        path.mkdir()
    with pytest.raises(
        ConfigError, match=r"^data.path='.*here': .*lra_release\.gz.*give the directory"
    ) as error:
        read_pathfinder(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "flip", "text", "jpeg"])
def test_damaged_image_is_named_with_its_index(archive, damage):
    task, _ = archive
    file = task / "imgs/1/sample_2.png"  # example 7
    data = bytearray(file.read_bytes())
    if damage == "jpeg":
        Image.new("L", (32, 32)).save(file, format="JPEG")
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes({"cut": data[:-20], "flip": data, "text": b"not an image"}[damage])
    train = read_pathfinder(str(task)).examples("train")
    assert train[6].inputs[0].shape == train[8].inputs[0].shape == (32, 32, 1)
    with pytest.raises(
        UserError, match=r"imgs/1/sample_2.png: example 7 of train .*not a readable PNG.*unpack"
    ):
        train[7]


def test_image_of_another_size_is_named(archive):
    task, _ = archive
    Image.new("L", (32, 31)).save(task / "imgs/10/sample_4.png")
    with pytest.raises(
        UserError, match="sample_4.png: example 1 of test .* 31 x 32 pixels where .* 32 x 32"
    ):
        read_pathfinder(str(task)).examples("test")[1]


def test_missing_image_is_named(archive):
    task, _ = archive
    (task / "imgs/2/sample_3.png").unlink()
    with pytest.raises(
        UserError, match="imgs/2/sample_3.png: image 13 of the metadata cannot be read"
    ):
        read_pathfinder(str(task))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (
            b"imgs/1 sample_0.png 0 2 1.0\n",
            "1.npy: line 1 is 'imgs/1 sample_0.png 0 2 1.0' .* label 0 or 1",
        ),
        (
            b"imgs/1 sample_0.png 0 1 1.0\nimgs/1 sample_1.png\n",
            "1.npy: line 2 is 'imgs/1 sample_1.png'",
        ),
        (b"\x93NUMPY\x01\x00v\x00", "1.npy: is not the text that Long Range Arena released"),
    ],
)
def test_wrong_metadata_is_named_with_its_line(archive, text, named):
    task, _ = archive
    (task / "metadata/1.npy").write_bytes(text)
    with pytest.raises(UserError, match=named):
        read_pathfinder(str(task))


def test_too_small_an_archive_is_refused(tmp_path):
    write_archive(tmp_path, folders=(0,), each=1)
    with pytest.raises(ConfigError, match="1 images leave the train split empty"):
        read_pathfinder(str(tmp_path))
    for file in (tmp_path / "metadata").iterdir():
        file.rename(file.with_name("all.npy"))
    with pytest.raises(UserError, match="holds no 0.npy"):
        read_pathfinder(str(tmp_path))


# ---- drawn ---------------------------------------------------------------------------------------------------------


def draw(n: int, split: str = "train", **keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, size, size] and labels [n]."""
    examples = open_pathfinder("", PathfinderConfig(**keys)).examples(split)
    drawn = [examples[i] for i in range(n)]
    return np.stack([example.inputs[0][:, :, 0] for example in drawn]), np.array(
        [example.label for example in drawn]
    )


@pytest.fixture(scope="module")
def default() -> tuple[np.ndarray, np.ndarray]:
    return draw(2000)


def dots(image: np.ndarray) -> np.ndarray:
    """float [2, 2]: the centres of the two dots, which alone are brighter than the lines."""
    blobs, n = ndimage.label(image > 200, np.ones((3, 3)))
    assert n == 2
    return np.array(ndimage.center_of_mass(image, blobs, [1, 2]))


def best_threshold(values: np.ndarray, labels: np.ndarray) -> float:
    """The accuracy of the best of all rules "label 1 where the value is above (or below) t", chosen on these."""
    accuracies = [np.mean((values > t) == labels) for t in np.unique(values)]
    return max(max(accuracies), 1 - min(accuracies))


@pytest.mark.slow
def test_brightness_and_distance_of_the_dots_do_not_tell_the_label(default):
    images, labels = default
    distances = np.array([np.linalg.norm(np.subtract(*dots(image))) for image in images])
    statistics = {
        "mean": images.mean((1, 2)),
        "bright": (images > 127).sum((1, 2)),
        "not black": (images > 0).sum((1, 2)),
        "distance": distances,
    }
    found = {name: best_threshold(values, labels) for name, values in statistics.items()}
    assert max(found.values()) < 0.56, (
        found
    )  # by chance alone, the best of many thresholds has some 0.52
    assert distances.min() > 5 and distances.std() > 1.5
    assert (
        best_threshold(labels + np.random.default_rng(0).normal(size=2000), labels) > 0.65
    )  # a hint would be seen


@pytest.mark.parametrize("keys", [{}, {"length": 3, "distractors": 30}, {"length": 10}])
def test_the_label_says_whether_one_path_joins_the_dots(keys):
    images, labels = draw(40, size=128, **keys)
    for image, label in zip(images, labels):
        # Thickened by 3/4 of a line's width on each side, a path's dashes touch, and different paths do not.
        unit = 128 / 32 if keys.get("length", 0) < 7 else 128 * 1.5 / 10 / 4
        grown = ndimage.distance_transform_edt(image < 95) <= 0.75 * unit
        blobs, _ = ndimage.label(grown, np.ones((3, 3)))
        one, other = (blobs[tuple(np.rint(dot).astype(int))] for dot in dots(image))
        assert one and other and (one == other) == label


@pytest.mark.slow
def test_images_hold_two_long_paths_and_distractors(default):
    images, labels = default
    assert images.dtype == np.uint8 and images.shape == (2000, 32, 32)
    assert labels.tolist() == [0, 1] * 1000
    assert len({image.tobytes() for image in images}) == 2000
    assert images[:, [0, -1]].max() < 30 > images[:, :, [0, -1]].max()  # of the dots only a shimmer
    # At a higher resolution: dashes can be counted. Two paths of six and up to six of two; dots hide one or more.
    large, _ = draw(20, size=256)
    counts = [ndimage.label(image > 95, np.ones((3, 3)))[1] for image in large]
    assert 18 < np.mean(counts) <= 24 and max(counts) <= 24
    few, _ = draw(20, size=256, distractors=0)
    assert {ndimage.label(image > 95, np.ones((3, 3)))[1] for image in few} == {12}


def test_an_image_is_a_function_of_seed_split_and_index_alone():
    images, _ = draw(6, "test", seed=5)
    code = (
        "from uoe_jax.config.data import PathfinderConfig; from uoe_jax.data.sources.pathfinder import open_pathfinder\n"
        "e = open_pathfinder('', PathfinderConfig(seed=5, n_train=3, n_eval=6)).examples('test')\n"
        "print([e[i].inputs[0].tobytes().hex() for i in reversed(range(6))][::-1])"
    )
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONPATH": str(REPO), "PYTHONHASHSEED": hash_seed}
        out = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
        ).stdout
        assert out.strip() == repr([image.tobytes().hex() for image in images])
    everything = [draw(6, split, seed=seed)[0] for split in SPLITS for seed in (4, 5)]
    assert len({image.tobytes() for drawn in everything for image in drawn}) == 36


def test_splits_have_their_sizes_and_their_names():
    source = open_pathfinder("", PathfinderConfig(n_train=3, n_eval=2))
    assert (source.n_classes, source.vocab_size) == (2, 0)
    assert [len(source.examples(split)) for split in SPLITS] == [3, 2, 2]
    for i in (-1, 2):
        with pytest.raises(IndexError):
            source.examples("test")[i]
    with pytest.raises(ValueError):
        source.examples("dev")
    record = source.record()
    assert (
        record["seed"] == 0
        and record["version"] == pathfinder.VERSION
        and 4 <= record["distractors_drawn"] <= 6
    )


def test_paths_that_find_no_room_are_refused():
    with pytest.raises(ConfigError, match="data.pathfinder.length=30: .*no room in 16 x 16"):
        open_pathfinder("", PathfinderConfig(size=16, length=30))

"""Images of the experiments: STL-10's files as they are published, digits, generated ones, random changes."""

import hashlib
import tarfile

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.datasets import load_digits

from experiments.augmentation import Augmentation, recoloured, windows
from experiments.images import ARCHIVE, FILES, FOLDER, MD5, load_small_digits, load_stl10, stand_in

TRAIN, TEST = 15, 7


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def published(tmp_path):
    """A folder with few random images in the published format, their MD5 sums, and what the files hold."""
    folder, content, sums = tmp_path / FOLDER, {}, {}
    folder.mkdir()
    random = np.random.default_rng(torch.randint(2**31, ()).item())
    for part, n in (("train", TRAIN), ("test", TEST)):
        images = random.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8)
        labels = random.integers(0, 10, n)
        data = bytearray(images.size)
        # the pixel of a colour, a row and a column
        for colour in range(3):
            for row in range(96):
                for column in range(96):
                    data[colour * 9216 + 96 * column + row :: 27648] = images[:, colour, row, column].tobytes()
        (folder / f"{part}_X.bin").write_bytes(data)
        (folder / f"{part}_y.bin").write_bytes((labels + 1).astype(np.uint8).tobytes())
        content[part] = torch.from_numpy(images), torch.from_numpy(labels)
    for name in FILES:
        sums[name] = md5(folder / name)
    return tmp_path, sums, content


def pack(folder, sums):
    """The files as an archive, in place of their folder."""
    with tarfile.open(folder / ARCHIVE, "w:gz") as archive:
        for name in FILES:
            archive.add(folder / FOLDER / name, f"{FOLDER}/{name}")
            (folder / FOLDER / name).unlink()
    (folder / FOLDER).rmdir()
    sums[ARCHIVE] = md5(folder / ARCHIVE)


def rows(labelled):
    """Images with their classes, in an order of their own."""
    together = zip(labelled.images.flatten(1).tolist(), labelled.labels.tolist(), strict=True)
    return sorted((*pixels, label) for pixels, label in together)


class TestStl10:
    def test_published_format(self, published):
        folder, sums, content = published
        found = load_stl10(folder, checksums=sums)
        assert not found.synthetic
        assert torch.equal(found.test.images, content["test"][0])
        assert torch.equal(found.test.labels, content["test"][1])
        assert found.test.images.dtype == torch.uint8
        # every training image is in one of two parts, a fifth of them held out
        assert (len(found.train), len(found.validation)) == (12, 3)
        images, labels = content["train"]
        expected = sorted(
            (*image.flatten().tolist(), label) for image, label in zip(images, labels.tolist(), strict=True)
        )
        assert sorted(rows(found.train) + rows(found.validation)) == expected

    def test_split_is_always_the_same(self, published):
        folder, sums, _ = published
        torch.manual_seed(1)
        first = load_stl10(folder, checksums=sums)
        torch.manual_seed(2)
        assert torch.equal(first.train.images, load_stl10(folder, checksums=sums).train.images)

    def test_files_without_their_folder(self, published):
        folder, sums, content = published
        found = load_stl10(folder / FOLDER, checksums=sums)
        assert torch.equal(found.test.images, content["test"][0])

    def test_archive_is_extracted_once(self, published):
        folder, sums, content = published
        pack(folder, sums)
        assert torch.equal(load_stl10(folder, checksums=sums).test.images, content["test"][0])
        (folder / ARCHIVE).unlink()
        assert torch.equal(load_stl10(folder, checksums=sums).test.images, content["test"][0])
        assert sorted(path.name for path in (folder / FOLDER).iterdir()) == sorted(FILES)

    @pytest.mark.parametrize("name", FILES)
    def test_another_file_is_refused(self, published, name):
        folder, sums, _ = published
        path = folder / FOLDER / name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is not the published file: its MD5 sum is {md5(path)}"):
            load_stl10(folder, checksums=sums)

    def test_another_archive_is_refused(self, published):
        folder, sums, _ = published
        pack(folder, sums)
        sums[ARCHIVE] = "0" * 32
        with pytest.raises(ValueError, match=f"{ARCHIVE} is not the published file"):
            load_stl10(folder, checksums=sums)
        assert not (folder / FOLDER).exists()

    def test_published_sums_are_asked_for(self, published):
        folder, _, _ = published
        with pytest.raises(ValueError, match=f"expected {MD5['train_X.bin']}"):
            load_stl10(folder)

    def test_absent(self, tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            load_stl10(tmp_path / "nothing")
        for word in ("nothing", ARCHIVE, *FILES, "http://ai.stanford.edu", "--quick", "--data digits"):
            assert word in str(caught.value)

    def test_images_and_labels_must_be_as_many(self, published):
        folder, sums, _ = published
        path = folder / FOLDER / "test_y.bin"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(ValueError, match=f"expected {TEST - 1} images"):
            load_stl10(folder, checksums=sums | {"test_y.bin": md5(path)})

    @pytest.mark.parametrize("label", [0, 11])
    def test_labels_must_be_classes(self, published, label):
        folder, sums, _ = published
        path = folder / FOLDER / "train_y.bin"
        path.write_bytes(bytes([label]) + path.read_bytes()[1:])
        with pytest.raises(ValueError, match="expected 1 to 10"):
            load_stl10(folder, checksums=sums | {"train_y.bin": md5(path)})

    def test_shown(self, published):
        """As large as published, each colour with mean 0 and deviation 1 where it has those of STL-10."""
        folder, sums, _ = published
        found = load_stl10(folder, checksums=sums)
        shown = found.shown(found.test.images)
        assert shown.shape == (TEST, 3, 128, 128)
        pixels = torch.tensor(found.mean) + torch.tensor(found.std)
        image = (255 * pixels).round().to(torch.uint8).view(1, 3, 1, 1).expand(1, 3, 96, 96)
        # pixels are rounded to 1 / 255
        assert (found.shown(image) - 1).abs().max() <= 0.5 / 255 / min(found.std) + 1e-6


class TestStandIn:
    def test_needs_no_file(self, tmp_path):
        found = load_stl10(tmp_path, quick=True)
        assert found.synthetic
        assert [len(part) for part in (found.train, found.validation, found.test)] == [64, 32, 32]
        assert found.train.images.shape[1:] == (3, 96, 96)
        assert found.train.images.dtype == torch.uint8
        assert set(found.train.labels.tolist()) == set(range(10))

    def test_classes_can_be_told_apart(self):
        train, _, test = stand_in((3, 96, 96))
        means = torch.stack([train.images[train.labels == label].float().mean(0) for label in range(10)])
        nearest = torch.cdist(test.images.float().flatten(1), means.flatten(1)).argmin(1)
        assert torch.equal(nearest, test.labels)


class TestDigits:
    def test_all_of_them_once(self):
        found = load_small_digits()
        assert not found.synthetic
        parts = (found.train, found.validation, found.test)
        assert [len(part) for part in parts] == [992, 205, 600]
        pixels, labels = load_digits(return_X_y=True)
        expected = sorted(
            (*np.rint(row * 255 / 16).astype(int).tolist(), label) for row, label in zip(pixels, labels, strict=True)
        )
        assert sorted(row for part in parts for row in rows(part)) == expected

    def test_as_much_of_each_class_in_each_part(self):
        found = load_small_digits()
        shares = torch.bincount(torch.from_numpy(load_digits().target)) / 1797
        for part in (found.train, found.validation, found.test):
            assert ((torch.bincount(part.labels) - len(part) * shares).abs() <= 1).all()

    def test_split_is_always_the_same(self):
        first = load_small_digits()
        torch.manual_seed(1)
        assert torch.equal(first.test.images, load_small_digits().test.images)

    def test_shown(self):
        found = load_small_digits()
        shown = found.shown(found.train.images)
        assert shown.shape == (992, 1, 8, 8)
        assert shown.mean().abs() < 1e-5
        assert (shown.std() - 1).abs() < 1e-5

    def test_quick_takes_few(self):
        found = load_small_digits(quick=True)
        assert [len(part) for part in (found.train, found.validation, found.test)] == [64, 32, 32]
        assert torch.equal(found.test.images, load_small_digits().test.images[:32])

    def test_augmented_images_are_drawn_from_the_generator(self):
        found = load_small_digits()
        images = found.train.images[:5]
        state = torch.get_rng_state()
        first, second = found.augmented(images), found.augmented(images)
        torch.set_rng_state(state)
        assert torch.equal(found.augmented(images), first)
        assert not torch.equal(first, second)
        assert first.shape == (5, 1, 8, 8)


class TestAugmentation:
    def test_none(self):
        images = torch.randn(3, 2, 5, 7)
        assert torch.allclose(windows(images[..., :5], 5, Augmentation()), images[..., :5], atol=1e-5)
        images = torch.rand(3, 3, 5, 7)
        assert torch.allclose(recoloured(images, Augmentation()), images, atol=1e-6)

    def test_windows_lie_inside_and_have_the_wanted_size(self):
        """Seen in an image of coordinates, from -1 to 1 between its edges."""
        side, n = 64, 200
        axis = (torch.arange(side) + 0.5) * 2 / side - 1
        image = torch.stack(torch.meshgrid(axis, axis, indexing="xy")).expand(n, 2, side, side)
        shown = windows(image, side, Augmentation(area=(0.5, 0.7), ratio=4 / 3))
        # away from the edges, where pixels blend with what lies beyond
        first, last = shown[:, :, side // 4, side // 4], shown[:, :, 3 * side // 4, 3 * side // 4]
        size = (last - first) * side / (side // 2) / 2
        area, ratio = size.prod(1), size[:, 0] / size[:, 1]
        assert area.min() + 1e-4 >= 0.5
        assert area.max() - 1e-4 <= 0.7
        assert ratio.min() + 1e-4 >= 3 / 4
        assert ratio.max() - 1e-4 <= 4 / 3
        assert area.max() - area.min() > 0.15
        assert ratio.max() - ratio.min() > 0.4
        # between the two pixels in the middle
        centre = shown[:, :, side // 2 - 1 : side // 2 + 1, side // 2 - 1 : side // 2 + 1].mean((2, 3))
        assert (centre.abs() + size).max() <= 1 + 1e-4
        assert (centre.std(0) > 0.02).all()

    def test_shift_moves_by_pixels(self):
        image = torch.zeros(100, 1, 9, 9)
        image[:, :, 4, 4] = 1
        shown = windows(image, 9, Augmentation(shift=1.5))[:, 0]
        axis = torch.arange(9.0)
        place = torch.stack([(shown.sum(1) * axis).sum(1), (shown.sum(2) * axis).sum(1)]) - 4
        assert place.abs().max() <= 1.5 + 1e-4
        assert place.max() > 1.2
        assert place.min() < -1.2

    def test_half_are_mirrored(self):
        images = torch.randn(400, 2, 5, 5)
        shown = windows(images, 5, Augmentation(flip=True))
        same = (shown - images).flatten(1).abs().amax(1) < 1e-4
        mirrored = (shown - images.flip(3)).flatten(1).abs().amax(1) < 1e-4
        assert (same ^ mirrored).all()
        # five standard deviations of a fair coin
        assert abs(mirrored.sum() - 200) <= 50

    def test_gray(self):
        images = torch.rand(400, 3, 2, 2)
        shown = recoloured(images, Augmentation(gray=0.25))
        gray = (shown - shown[:, :1]).flatten(1).abs().amax(1) < 1e-6
        assert abs(gray.sum() - 100) <= 5 * (400 * 0.25 * 0.75) ** 0.5
        assert torch.allclose(shown[~gray], images[~gray], atol=1e-6)

    def test_jitter_stays_in_range_and_changes_each_image(self):
        images = torch.rand(50, 3, 4, 4)
        shown = recoloured(images, Augmentation(jitter=0.4))
        assert shown.min() >= 0
        assert shown.max() <= 1
        assert ((shown - images).flatten(1).abs().amax(1) > 1e-3).all()

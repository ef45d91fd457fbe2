"""Images as data sets have them: ImageNet's train set has CMYK files, and some tools write 16 bits of grey."""
import numpy as np
import pytest
from PIL import Image

from utils.image_files import read_batches, read_image


def test_cmyk_becomes_rgb(tmp_path):
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    image = read_image(tmp_path / "a.jpg", "a.jpg")
    assert image.shape == (16, 16, 3) and np.abs(image.astype(int) - (200, 30, 60)).max() <= 4
    Image.new("RGB", (16, 16), (200, 30, 60)).save(tmp_path / "b.png")
    [batch] = read_batches(tmp_path, 8)
    assert batch.images.shape == (2, 16, 16, 3)


def test_16_bits_of_grey_become_8(tmp_path):
    levels = np.array([[0, 128, 129, 257], [32896, 65535, 65278, 65406]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    image = read_image(tmp_path / "deep.png", "deep.png")
    assert (image == image[..., :1]).all()
    assert image[..., 0].tolist() == [[0, 0, 1, 1], [128, 255, 254, 254]]


def test_a_mode_without_a_conversion_is_named(tmp_path):
    Image.new("RGB", (8, 8)).convert("LAB").save(tmp_path / "lab.tiff")
    with pytest.raises(ValueError, match="lab.tiff"):
        read_image(tmp_path / "lab.tiff", "lab.tiff")

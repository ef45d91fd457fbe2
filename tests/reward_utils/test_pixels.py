"""Preprocessing against the packages whose preprocessing it stands for, bit for bit; and how far "fast" is from it."""
import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from transformers import CLIPImageProcessorPil

from reward_utils.pixels import CLIP_MEAN, CLIP_STD, clip_pixels, in_batches, normalize, to_pil, unit_range

# squares that shrink, stay and grow; both orientations; 227, 251: an odd number of columns is cut; 333 x 101: long
SIZES = [(256, 256), (224, 224), (64, 64), (384, 384), (192, 320), (320, 192), (224, 227), (251, 224), (257, 300),
         (225, 224), (333, 101)]
ODD_CUTS = {(224, 227), (251, 224)}  # half of 3 and of 27: 1.5 and 13.5 round to 2 and 14, the floors are 1 and 13


def noise(num_images, height, width, seed=0):
    return torch.randint(0, 256, (num_images, 3, height, width), generator=torch.Generator().manual_seed(seed),
                         dtype=torch.uint8)


def smooth(num_images, height, width, seed=0):
    """Blobs with edges here and there, nearer to a picture than noise is."""
    coarse = noise(num_images, 12, 12, seed).float()
    pixels = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    pixels[:, :, height // 3: height // 2, : width // 2] = 255
    return pixels.round().to(torch.uint8)


def levels(pixels):
    """What clip_pixels returns, back to 0..255."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (CLIP_MEAN, CLIP_STD))
    return (pixels * std + mean) * 255


@pytest.mark.parametrize("size", [224, 336])
@pytest.mark.parametrize("shape", SIZES)
def test_exact_is_transformers_and_open_clips_preprocessing(shape, size):
    images = noise(2, *shape)
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    theirs = torch.tensor(np.stack(processor(to_pil(images))["pixel_values"]))
    assert torch.equal(clip_pixels(images, size, "exact", "cpu"), theirs)

    transform = image_transform(size, is_train=False, resize_mode="shortest", interpolation="bicubic", mean=CLIP_MEAN,
                                std=CLIP_STD)
    open_clips = torch.stack([transform(image) for image in to_pil(images)])
    assert torch.equal(clip_pixels(images, size, "exact", "cpu", crop="torchvision"), open_clips)
    if size == 224:
        assert torch.equal(theirs, open_clips) == (shape not in ODD_CUTS)


@pytest.mark.parametrize("shape", SIZES)
def test_fast_is_within_two_levels_of_exact(shape):
    """Measured: noise 0.6 % of the values one level off at most, smooth images 2.1 %; two levels 0.02 % and fewer."""
    for images, share in ((noise(2, *shape), 0.01), (smooth(2, *shape), 0.03)):
        exact, fast = (levels(clip_pixels(images, 224, preprocess, "cpu")) for preprocess in ("exact", "fast"))
        difference = (exact - fast).abs()
        assert difference.max() < 2.01
        assert (difference > 0.5).float().mean() < share and (difference > 1.5).float().mean() < 1e-3


def test_fast_runs_on_the_device_that_is_named():
    pixels = clip_pixels(noise(2, 40, 30), 16, "fast", "meta")
    assert pixels.device.type == "meta" and pixels.shape == (2, 3, 16, 16)


def test_an_image_does_not_depend_on_its_batch():
    images = noise(3, 50, 70)
    for preprocess in ("exact", "fast"):
        batch = clip_pixels(images, 32, preprocess, "cpu")
        assert torch.equal(batch, torch.cat([clip_pixels(image[None], 32, preprocess, "cpu") for image in images]))


@pytest.mark.parametrize("preprocess", ["exact", "fast"])
def test_pixels_that_are_not_levels_are_refused(preprocess):
    """transformers divides floats in [0, 1] by 255 once more and scores almost black images."""
    with pytest.raises(AssertionError, match="uint8 levels, got torch.float32"):
        clip_pixels(torch.rand(1, 3, 224, 224), 224, preprocess, "cpu")
    with pytest.raises(AssertionError, match="uint8 levels"):
        to_pil(torch.rand(1, 3, 8, 8))


def test_pieces():
    images = torch.arange(256, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 1, 1)
    assert np.array_equal(unit_range(images)[:, 0, 0, 0].numpy(),
                          (np.arange(256) * (1 / 255)).astype(np.float32))  # transformers' rescaling
    mean, std = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    torch.testing.assert_close(normalize(mean + std), torch.ones(1, 3, 1, 1))
    assert np.array_equal(np.asarray(to_pil(noise(1, 3, 5))[0]), noise(1, 3, 5)[0].permute(1, 2, 0).numpy())


def test_in_batches_keeps_the_order_and_the_size():
    seen = []

    def function(column, names):
        seen.append(len(column))
        return column * 2 + torch.tensor([len(name) for name in names])

    out = in_batches(function, 2, torch.arange(5), ["", "a", "", "", "bbb"])
    assert out.tolist() == [0, 3, 4, 6, 11] and seen == [2, 2, 1]

"""Views of images: what stays and what changes."""

from __future__ import annotations

import pytest
import torch

from quantlens.calibration import CHUNK, Calibration
from quantlens.calibration.images import OOD_VIEWS, composed, cropped, draw, mixed, noise, shuffled, with_views


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(6, 3, 7, 7, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=56, mode="bicubic") + 0.5


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("view", [cropped, *OOD_VIEWS])
def test_a_view_is_another_image_of_the_same_kind(view, images):
    seen = view(images, _generator())
    assert seen.shape == images.shape
    assert seen.dtype == images.dtype
    assert bool(torch.isfinite(seen).all())
    assert torch.equal(seen, view(images, _generator())), "the same seed gives the same views"
    assert not torch.equal(seen, view(images, _generator(1)))
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in zip(seen, images, strict=True))


def test_a_crop_shows_a_part_of_its_own_image(images):
    ramp = torch.linspace(-1, 1, 56).expand(32, 1, 56, 56) + 10 * torch.arange(32.0)[:, None, None, None]
    seen = cropped(ramp, _generator())
    own = seen - 10 * torch.arange(32.0)[:, None, None, None]
    assert float(own.abs().max()) <= 1 + 1e-4
    slopes = own[:, 0, 28, 40] - own[:, 0, 28, 20]
    assert bool((slopes > 0).any()), "some are as they were"
    assert bool((slopes < 0).any()), "some are mirrored"
    assert bool((slopes.abs() <= 2 * 20 / 55 + 1e-3).all()), "none is shrunk"
    assert float(slopes.abs().min()) > 0.4 * 2 * 20 / 55, "none is a small part"


def test_shuffling_keeps_every_pixel(images):
    seen = shuffled(images, _generator())
    assert torch.equal(seen.flatten(2).sort(-1).values, images.flatten(2).sort(-1).values)
    odd = images[..., :55, :55]
    assert torch.equal(shuffled(odd, _generator()), odd), "an image that no number of tiles divides stays"


def test_mixing_lies_between_two_images(images):
    seen, other = mixed(images, _generator()), images.roll(1, 0)
    share = ((seen - other) / (images - other)).flatten(1).median(1).values
    assert bool(((share >= 0.5) & (share <= 1)).all())
    torch.testing.assert_close(
        seen, share[:, None, None, None] * images + (1 - share[:, None, None, None]) * other, rtol=1e-3, atol=1e-3
    )


def test_noise_keeps_the_spectrum_and_the_mean_colour(images):
    seen = noise(images, _generator())
    torch.testing.assert_close(seen.mean((2, 3)), images.mean((2, 3)), rtol=1e-3, atol=1e-3)
    before, after = (torch.fft.rfft2(x).abs()[..., 1:28, 1:28] for x in (images, seen))
    torch.testing.assert_close(after, before, rtol=1e-2, atol=1e-2)


def test_the_shares_of_views_are_as_asked(images):
    many = images[:1].expand(400, -1, -1, -1) + torch.arange(400.0)[:, None, None, None] * 1e-3
    crops, all_ood, some = (draw(many, share, _generator()) for share in (0.0, 1.0, 0.3))

    def unlike(seen) -> float:
        return float((seen != crops).flatten(1).any(1).double().mean())

    assert bool((crops != many).flatten(1).any(1).all())
    assert unlike(all_ood) == 1
    assert abs(unlike(some) - 0.3) < 0.07


def test_compositions_are_other_images_of_the_same_range(images):
    """None is the image, and some hold a part of another: then colours of two images stand beside each other."""
    flat = torch.linspace(-1, 1, 64)[:, None, None, None].expand(64, 3, 32, 40).contiguous()
    seen = composed(flat, _generator())
    assert seen.shape == flat.shape
    assert float(seen.amin()) >= -1
    assert float(seen.amax()) <= 1
    values = [len(one.unique()) for one in (seen[:, 0] * 1000).round()]
    assert 0.3 < sum(count > 1 for count in values) / 64 < 0.9
    again = composed(images, _generator())
    assert torch.equal(again, composed(images, _generator()))
    assert all(float((view - image).abs().mean()) > 0.01 for view, image in zip(again, images, strict=True))


@pytest.mark.parametrize("count", [1, 6, 40])
def test_calibration_images_followed_by_views(count, images):
    many = Calibration(images.repeat(6, 1, 1, 1), 36, source="a tensor", fingerprint=None, device=images.device)

    def half(seen, generator):
        return draw(seen, 0.5, generator)

    wide = with_views(many, count, 2, half)
    assert len(wide) == 36 + count
    together = torch.cat(list(wide))
    assert len(together) == 36 + count
    assert torch.equal(together[:36], torch.cat(list(many)))
    assert torch.equal(together, torch.cat(list(with_views(many, count, 2, half))))
    assert not torch.equal(together[36:], torch.cat(list(with_views(many, count, 3, half)))[36:])
    assert all(float((view - image).abs().mean()) > 0.01 for view in together[36:] for image in images)
    assert with_views(many, 0, 2, half) is many
    assert CHUNK < 36, "more than one chunk"

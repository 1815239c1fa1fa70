"""Contour energy: SciPy's Bessel functions, a step edge in closed form, flat images."""

import numpy
import pytest
import scipy.special
import torch

from gn_kernels.robustness.contour import contour_energy, discrete_gaussian


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5, 12.0])
def test_gaussian_is_the_bessel_function(scale):
    kernel = discrete_gaussian(scale)
    radius = int(numpy.ceil(3 * scale))
    expected = scipy.special.ive(numpy.arange(-radius, radius + 1), scale)
    expected = torch.from_numpy(expected / expected.sum())
    # Two roundings of a number below 1.
    torch.testing.assert_close(kernel, expected, rtol=0, atol=2.3e-16)


def test_gaussian_at_scale_one_is_the_papers():
    expected = torch.tensor([0.0082, 0.0501, 0.2084, 0.4668], dtype=torch.float64)
    torch.testing.assert_close(discrete_gaussian(1.0)[:4], expected, rtol=0, atol=5e-5)


def test_flat_images_have_no_contour():
    flat = torch.full((2, 3, 9, 11), 0.7, dtype=torch.float64)
    assert contour_energy(flat).shape == (2, 1, 9, 11)
    assert contour_energy(flat).max() < 1e-14


@pytest.mark.parametrize("transposed", [False, True])
def test_step_edge(transposed):
    # A step of height 0.4 in each of two channels, between columns 19 and 20. One direction's
    # slope only: 2·(g[x+1] − g[x−1]) with g the smoothed step, so 2·0.4·(h[x−19] + h[x−20]).
    images = torch.zeros(1, 2, 40, 40, dtype=torch.float64)
    images[..., 20:] = 0.4
    bessel = scipy.special.ive(numpy.arange(-3, 4), 1.0)
    h = bessel / bessel.sum()
    padded = numpy.zeros(60)  # column x at index x + 10
    padded[19 - 3 + 10 : 19 + 4 + 10] += h
    padded[20 - 3 + 10 : 20 + 4 + 10] += h
    profile = numpy.convolve(2 * 0.4 * padded * numpy.sqrt(2), h, mode="same")[10:50]
    energy = contour_energy(images.transpose(-1, -2) if transposed else images)[0, 0]
    energy = energy.T if transposed else energy
    expected = torch.from_numpy(profile).expand(40, 40)
    torch.testing.assert_close(energy, expected, rtol=0, atol=1e-14)
    assert (energy.argmax(1) - 19.5).abs().max() == 0.5
    assert energy[:, :10].max() < 1e-14


def test_dtypes_autocast_and_no_graph():
    images = torch.rand(2, 3, 16, 16, dtype=torch.float64)
    exact = contour_energy(images)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        low = images.to(dtype).requires_grad_()
        energy = contour_energy(low)
        assert energy.dtype == dtype
        assert not energy.requires_grad
        torch.testing.assert_close(energy.double(), exact, rtol=0, atol=tolerance)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            contour_energy(images.float()).double(), exact, rtol=0, atol=1e-6
        )


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="above 3"):
        contour_energy(torch.rand(1, 1, 3, 8))
    with pytest.raises(ValueError, match=r"\(B, C, H, W\)"):
        contour_energy(torch.rand(8, 8))
    with pytest.raises(ValueError, match="scale"):
        discrete_gaussian(0.0)

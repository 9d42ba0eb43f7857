"""Scattering: features of images that nobody trained, so that no data at all, public or secret, are in them.

An image is filtered by wavelets of several widths and angles, its magnitudes again by wider ones, and each is averaged:
    S0 = x * phi      S1 = |x * psi_1| * phi      S2 = ||x * psi_1| * psi_2| * phi
with Morlet wavelets psi of scales 2^j, j = 0 .. 2, and eight angles, and a Gaussian phi of scale 2^3. This keeps most of what
tells textures and shapes apart and changes little when the image moves or is bent (Mallat, Communications on Pure and Applied
Mathematics 2012; Bruna and Mallat, PAMI 2013). Filters and steps are those of Andreux et al. (Kymatio, JMLR 2020), held against
it by a test where it is installed; it is no dependency, because its release cannot be imported beside a current SciPy. With a
linear layer such features learn well under differential privacy (Tramer and Boneh, ICLR 2021).

Before: the image is brought to mean 0 and deviation 1 by itself. After: averages over 4 x 4 fields; the logarithm of order 1, and
of order 2 over the first-order coefficient that it comes from, which takes out what both say twice (Anden and Mallat, Deep
scattering spectrum, IEEE Transactions on Signal Processing 2014, section IV); every order centred and of length 1, divided by
sqrt(3), so that the whole vector has length 1.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import fx, nn
from torch.nn import functional

from mpc_fl.errors import ModelError

SIDE = 64  # pixels
SCALES = 3  # wavelets of scales 2^0, 2^1, 2^2, averages of scale 2^3
ANGLES = 8
FIELDS = 4  # in each direction
MARGIN = 2**SCALES  # what is reflected around the image, so that its borders do not meet
_PADDED = SIDE + 2 * MARGIN
OFFSET = 0.01  # added before the logarithm
LEAST_DEVIATION = 1e-3  # of an image: a constant one has none
_CHANNELS = (1, SCALES * ANGLES, SCALES * (SCALES - 1) // 2 * ANGLES**2)  # of each order

# The channel of order 1 that each channel of order 2 comes from: by first scale, second scale, first angle, second angle.
PARENTS = [
    ANGLES * scale + angle for scale in range(SCALES) for _ in range(scale + 1, SCALES)
    for angle in range(ANGLES) for _ in range(ANGLES)
]  # fmt: skip


def _gabor(width: float, angle: float, frequency: float, slant: float) -> torch.Tensor:
    """A wave of this frequency under a Gaussian that is `slant` times as wide along it as across, periodic, complex128."""
    cosine, sine = math.cos(angle), math.sin(angle)
    places = torch.arange(-2 * _PADDED, 3 * _PADDED, dtype=torch.float64)
    rows, columns = places[:, None], places[None, :]
    along, across = rows * cosine + columns * sine, columns * cosine - rows * sine
    wave = torch.polar(torch.exp(-(along**2 + (slant * across) ** 2) / (2 * width**2)), frequency * along)
    return wave.reshape(5, _PADDED, 5, _PADDED).sum(dim=(0, 2)) * (slant / (2 * math.pi * width**2))


def _morlet(scale: int, angle: float) -> torch.Tensor:
    """A wavelet of scale 2^scale as its (real) Fourier transform, float64 (P, P): a wave less what makes its sum zero."""
    width, slant = 0.8 * 2**scale, 4 / ANGLES
    wave = _gabor(width, angle, 0.75 * math.pi / 2**scale, slant)
    envelope = _gabor(width, angle, 0.0, slant)
    return torch.fft.fft2(wave - wave.sum() / envelope.sum() * envelope).real


def _lowest(transform: torch.Tensor, halvings: int) -> torch.Tensor:
    """The lowest frequencies of a Fourier transform (..., P, P), for images of so many times half the side."""
    size = transform.shape[-1]
    kept = size >> (halvings + 1)
    places = torch.cat([torch.arange(kept), torch.arange(size - kept, size)])
    return transform[..., places[:, None], places[None, :]].contiguous()


def sampled(transform: torch.Tensor, halvings: int) -> torch.Tensor:
    """The Fourier transform (..., n, n) of every 2^halvings-th pixel of each row and column of what has `transform`."""
    steps = 1 << halvings
    for dim in (-2, -1):
        transform = functools.reduce(
            torch.add, transform.chunk(steps, dim)
        )  # several times faster than a sum over two axes
    return transform / steps**2


def _magnitudes(transform: torch.Tensor, wavelets: torch.Tensor, halvings: int) -> torch.Tensor:
    """The Fourier transform of |x * psi| for every x of (..., n, n) and wavelet of (A, n, n): (..., A, n', n')."""
    filtered = sampled(transform.unsqueeze(-3) * wavelets, halvings)
    return torch.fft.fft2(torch.fft.ifft2(filtered).abs())


def _averages(transform: torch.Tensor, low_pass: torch.Tensor) -> torch.Tensor:
    """Averages over FIELDS x FIELDS fields of what has this Fourier transform (..., n, n), as (channels, fields)."""
    halvings = (transform.shape[-1] * (1 << SCALES) // _PADDED).bit_length() - 1
    smooth = torch.fft.ifft2(sampled(transform * low_pass, halvings)).real
    inside = smooth[..., 1:-1, 1:-1].flatten(0, -3)
    return functional.avg_pool2d(inside, inside.shape[-1] // FIELDS).flatten(1)


def _unit(block: torch.Tensor) -> torch.Tensor:
    """All values of one order, (channels, fields), centred and of length 1 (0 where all are equal)."""
    return functional.normalize((block - block.mean()).flatten(), dim=0)


def _features_of_one(
    image: torch.Tensor, low_passes: list[torch.Tensor], wavelets: list[list[torch.Tensor]]
) -> torch.Tensor:
    """Features (F,) of one image (H, W)."""
    pixels = functional.adaptive_avg_pool2d(image[None, None], SIDE)
    centred = pixels - pixels.mean()
    standard = centred / centred.square().mean().sqrt().clamp(min=LEAST_DEVIATION)
    transform = torch.fft.fft2(functional.pad(standard, [MARGIN] * 4, mode="reflect")[0, 0])
    first, second = [], []
    for scale in range(SCALES):
        once = _magnitudes(transform, wavelets[scale][0], scale)
        first.append(_averages(once, low_passes[scale]))
        for wider in range(scale + 1, SCALES):
            twice = _magnitudes(once, wavelets[wider][scale], wider - scale)
            second.append(_averages(twice, low_passes[wider]))
    once, twice = (torch.log(torch.cat(order).clamp(min=0) + OFFSET) for order in (first, second))
    orders = [_averages(transform[None], low_passes[0]), once, twice - once[PARENTS]]
    return torch.cat([_unit(order) for order in orders]) / math.sqrt(len(orders))


def scattering_features(
    images: torch.Tensor, low_passes: list[torch.Tensor], wavelets: list[list[torch.Tensor]]
) -> torch.Tensor:
    """Features (N, F) of images (N, 1, H, W), one by one: nobody else in the batch changes a bit of them.

    `low_passes[j]` and `wavelets[k][j]` are phi and psi of scale 2^k for images that were halved j times. Raises `ModelError` for
    images of several channels or fewer than 64 x 64 pixels.
    """
    if images.dim() != 4 or images.shape[1] != 1 or min(images.shape[2:]) < SIDE:
        raise ModelError(
            f"scattering takes grey images of at least {SIDE} x {SIDE} pixels, not {tuple(images.shape[1:])}",
            f"set data.channels=1 and data.image_size={SIDE}",
        )
    if not len(images):
        return images.new_zeros(0, FIELDS**2 * sum(_CHANNELS))
    return torch.stack([_features_of_one(image[0], low_passes, wavelets) for image in images])


fx.wrap("scattering_features")  # one step of a recorded graph: what is inside looks at shapes


class Scattering(nn.Module):
    """Float32 grey images (N, 1, H, W) in [0, 1], 64 x 64 or larger (then averaged to that), to features (N, F), F = 3472.

    Nothing is trained, nothing is in a file: the filters are buffers that no `state_dict` holds. The same image gives the same
    bits on the same machine and number of threads, whoever else is in the batch; between machines the Fourier transform
    may differ in the last bits, which is 1e-6 of a feature's length.
    """

    def __init__(self) -> None:
        super().__init__()
        low_pass = torch.fft.fft2(_gabor(0.8 * 2 ** (SCALES - 1), 0.0, 0.0, 1.0)).real
        for halvings in range(SCALES):
            self._filter(f"low_pass_{halvings}", _lowest(low_pass, halvings))
        for scale in range(SCALES):
            angles = [(ANGLES // 2 - 1 - place) * math.pi / ANGLES for place in range(ANGLES)]
            bank = torch.stack([_morlet(scale, angle) for angle in angles])
            for halvings in range(scale + 1):
                self._filter(f"wavelets_{scale}_{halvings}", _lowest(bank, halvings))

    def _filter(self, name: str, values: torch.Tensor) -> None:
        self.register_buffer(name, values.float(), persistent=False)

    @property
    def output_features(self) -> int:
        """F."""
        return FIELDS**2 * sum(_CHANNELS)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, F), each of length 1 (less for an image without contrast). Raises `ModelError`."""
        low_passes = [self.get_buffer(f"low_pass_{halvings}") for halvings in range(SCALES)]
        wavelets = [
            [self.get_buffer(f"wavelets_{scale}_{halvings}") for halvings in range(scale + 1)]
            for scale in range(SCALES)
        ]
        return scattering_features(images, low_passes, wavelets)


class ScatteringClassifier(nn.Module):
    """Grey images (N, 1, H, W) to logits (N, classes): `features` as above, `classifier` a linear layer on them."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = Scattering()
        self.classifier = nn.Linear(self.features.output_features, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (N, classes)."""
        return self.classifier(self.features(images))


def scattering(classes: int) -> ScatteringClassifier:
    """Scattering features with a linear layer."""
    return ScatteringClassifier(classes)

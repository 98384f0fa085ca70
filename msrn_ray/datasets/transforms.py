"""Decodes images to uint8 and transforms them to the square network input; pure functions, the caller passes the rng.

Shapes: S input side. Images are [3, H, W] uint8 RGB until the device normalises them: a quarter of the bytes of float32.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as transform

from ..errors import UserError
from .pixel_values import decode_cut_jpeg, is_fourth_band, to_8_bits, why_unknown

_MAX_SIDE = 1_000_000  # pixels; resizing a line of many millions takes gigabytes
# Fewer than Pillow reads: some of its readers, such as that of EPS, start other programs, and photographs do not need them.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def decode(data: bytes, *, max_pixels: int, short_side: int | None = None) -> Tensor:
    """Decode a JPEG, PNG, WebP, GIF (first frame), BMP or TIFF image and turn it upright by its EXIF orientation.

    Grey, CMYK and palette images become RGB. 16-bit and float images are scaled to 8 bits, see `to_8_bits`. Transparent pixels are blended
    with white, as in viewers; a fourth band that is no transparency is left out, see `is_fourth_band`. A baseline JPEG may lack its last
    2 % of pixels.

    Args:
        data: the file's bytes.
        max_pixels: larger images are refused by their header, before their pixels take memory.
        short_side: the short side that is needed, pixels. A JPEG at least four times as large is decoded at 1/4 or 1/8 of its size, in a
            sixteenth of the memory and three quarters of the time. (At 1/2, Pillow takes as long as torchvision at full size.) None: every
            image at full size.

    Returns:
        [3, H, W] uint8.

    Raises:
        UserError: if the bytes are no intact image or the image is too large; the message says which.
    """
    if not data:
        raise UserError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about broken EXIF; the pixels are intact
            header = Image.open(io.BytesIO(data), formats=_FORMATS)
            if header.width * header.height > max_pixels:
                raise UserError(f"{header.width} x {header.height} pixels are more than data.max_pixels={max_pixels}")
            if max(header.size) > _MAX_SIDE:
                raise UserError(f"{header.width} x {header.height} pixels: a side is longer than {_MAX_SIDE}; cut it")
            if header.format == "JPEG" and short_side is not None and min(header.size) >= 4 * short_side:
                header.draft(header.mode, _scaled_down(header.size, short_side))
                return from_pil(header)
            if header.format == "JPEG" and header.mode in {"L", "RGB"}:  # torchvision is a quarter faster here
                encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
                pixels: Tensor = decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
                return pixels
            return from_pil(header)
    except UserError:
        raise
    except Image.DecompressionBombError:
        raise UserError(f"the image has more pixels than data.max_pixels={max_pixels}") from None
    except UnidentifiedImageError:
        raise UserError(why_unknown(data)) from None
    except (OSError, RuntimeError, ValueError, SyntaxError):  # what Pillow and torchvision raise on broken data
        whole = _without_end(data)
        if whole is None:
            raise UserError("the image data is broken or cut off") from None
        return whole
    except Exception as error:  # decoders raise anything on broken data; one image must not end a run
        raise UserError(f"the image data is broken ({type(error).__name__})") from None


def _without_end(data: bytes) -> Tensor | None:
    """Return the image of a baseline JPEG that lacks at most its last 2 %, or None."""
    if not data.startswith(b"\xff\xd8") or data.endswith(b"\xff\xd9"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = Image.open(io.BytesIO(data), formats=("JPEG",))
        # a progressive JPEG does not show how many of its scans are missing
        if header.mode not in {"L", "RGB"} or "progressive" in header.info:
            return None
        return decode_cut_jpeg(data)
    except Exception:  # the caller reports the first error
        return None


def _scaled_down(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Return the size at 1/8 or else 1/4, whichever still has `short_side`."""
    factor = next(factor for factor in (8, 4) if min(size) >= factor * short_side)
    return size[0] // factor, size[1] // factor


def smallest_side(size: int, scales: Sequence[float]) -> int:
    """Return the short side of an image whose smallest crop by `multi_scale_crop` still has `size` pixels per side."""
    return math.ceil(size / min(scales, default=1.0))


def from_pil(image: Image.Image) -> Tensor:
    """Return a Pillow image as [3, H, W] uint8; see `decode`."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # Pillow's own conversion would clip instead of scale
        image = Image.fromarray(to_8_bits(np.asarray(image)))
    if image.mode == "RGBA" and is_fourth_band(image):
        image = image.convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def resize(image: Tensor, size: int) -> Tensor:
    """Return the evaluation view, [3, S, S] uint8: the whole image, bilinear with antialiasing, aspect ratio not kept."""
    view: Tensor = transform.resize(image, [size, size], antialias=True)
    return view


# (x, y) in quarters of the margin around the crop: corners and centre, then middles of edges and inner quarter points
_POSITIONS = ((0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3))


def multi_scale_crop(
    image: Tensor, size: int, scales: Sequence[float], rng: np.random.Generator, *, flip: bool
) -> Tensor:
    """Return the training view: a crop with sides of short side x scale at one of 13 positions, resized and perhaps mirrored.

    Args:
        image: [3, H, W] uint8.
        size: S, pixels.
        scales: sides of the crop as fractions of the short side, large to small; height and width are at most two steps apart. Empty: no
            crop.
        rng: decides crop and mirroring.
        flip: mirror left-right with probability 1/2.

    Returns:
        [3, S, S] uint8.

    Source: the multi-scale crop of Wang et al., "Temporal Segment Networks" (2016), section 3.3, as MSRN's training uses it.
    """
    height, width = image.shape[-2:]
    if scales:
        pairs = [(i, j) for i in range(len(scales)) for j in range(len(scales)) if abs(i - j) <= 2]
        row, column = pairs[rng.integers(len(pairs))]
        x, y = _POSITIONS[rng.integers(len(_POSITIONS))]
        crop_height, crop_width = (max(1, round(min(height, width) * scales[index])) for index in (row, column))
        top, left = (height - crop_height) * y // 4, (width - crop_width) * x // 4
        view: Tensor = transform.resized_crop(image, top, left, crop_height, crop_width, [size, size], antialias=True)
    else:
        view = resize(image, size)
    if flip and rng.random() < 0.5:
        view = transform.horizontal_flip(view)
    return view


def normalize(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """Return (x / 255 - mean) / std of [B, 3, S, S] uint8 images as float32, channels last, on their device."""
    factor, offset = _normalization(tuple(mean), tuple(std), images.device)
    return images.to(torch.float32, memory_format=torch.channels_last) * factor + offset


@lru_cache(maxsize=8)
def _normalization(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return factor and offset: x / 255 / std - mean / std. Cached, so that no step copies constants to the device."""
    centre, scale = torch.tensor([mean, std], dtype=torch.float64).view(2, 3, 1, 1)
    return (1 / (255 * scale)).float().to(device), (-centre / scale).float().to(device)

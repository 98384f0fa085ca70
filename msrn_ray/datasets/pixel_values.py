"""Reads pixel values that are not plain 8-bit colours, and names the kind of files that are no image of ours."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from ..errors import UserError

_FULL_SCALES = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14 and 16 bits
_MAX_MISSING = 0.02  # share of a JPEG's pixels that may lie behind its end
_MCU = 16  # pixels: the largest usual block that a JPEG codes together
_FILL = b"\x55" * 4096  # valid entropy-coded bits, no marker
_CONVERT = "convert it to JPEG or PNG"
_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"msf1": "HEIC", b"avif": "AVIF", b"avis": "AVIF"}


def to_8_bits(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Scale the values of one image to 8 bits; the rule depends on nothing but this image.

    Integers: 0 to the smallest of 255, 1023, 4095, 16383 and 65535 that holds the maximum. Floats: 0 to 1 if the maximum is at most 1,
    otherwise 0 to 255. So a 12-bit image in a 16-bit file keeps its brightness.

    Raises:
        UserError: if a value is negative, not finite or above the largest range.
    """
    if not np.isfinite(values).all():
        raise UserError("the image has values that are not finite numbers; convert it to 8 bits")
    low, high = float(values.min()), float(values.max())
    scales = _FULL_SCALES if np.issubdtype(values.dtype, np.integer) else (1, 255)
    scale = next((scale for scale in scales if high <= scale), None)
    if low < 0 or scale is None:
        raise UserError(
            f"the image has values from {low:g} to {high:g}, above {scales[-1]} or below 0; convert it to 8 bits"
        )
    scaled: npt.NDArray[np.uint8] = (values.astype(np.float32) * np.float32(255 / scale)).round().astype(np.uint8)
    return scaled


def is_fourth_band(image: Image.Image) -> bool:
    """Return whether the alpha channel of an RGBA image is a band of its own, such as infrared, and no transparency.

    Transparency is mostly 0 or 255, or has few values. A channel with at least 32 values, of which less than a tenth of the pixels
    are 0 or 255, varies as a picture does.
    """
    counts = np.array(image.getchannel("A").histogram())
    return bool((counts > 0).sum() >= 32 and counts[0] + counts[255] < 0.1 * counts.sum())


def decode_cut_jpeg(data: bytes) -> Tensor | None:
    """Decode a baseline JPEG that ends too early, [3, H, W] uint8 upright; None if more than 2 % of its pixels are missing.

    Pixels that depend on what follows the end of the data are the missing ones: they differ between two different endings.
    """
    data = data.rstrip(b"\xff")  # half an end marker
    first, second = (_decode(data + ending, upright=False) for ending in (b"\xff\xd9", _FILL + b"\xff\xd9"))
    differs = (first != second).any(0)
    if differs.any():
        height, width = differs.shape
        top = int(differs.any(1).nonzero()[0]) // _MCU * _MCU
        left = int(differs[top : top + _MCU].any(0).nonzero()[0])
        block = min(_MCU, height - top)
        missing = (height - top - block) * width + block * (width - left)
        if missing > _MAX_MISSING * height * width:
            return None
    return _decode(data + b"\xff\xd9", upright=True)


def _decode(data: bytes, *, upright: bool) -> Tensor:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels: Tensor = decode_jpeg(encoded, ImageReadMode.RGB, apply_exif_orientation=upright)
    return pixels


def why_unknown(data: bytes) -> str:
    """Return why no reader knows these bytes: the kind of file, where it is recognised, and what to do."""
    head = data[:512].lstrip().lower()
    if data[4:8] == b"ftyp" and data[8:12] in _BRANDS:
        return f"not an image of a known format: {_BRANDS[data[8:12]]}; {_CONVERT}"
    if data.startswith((b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")):
        return f"not an image of a known format: JPEG 2000; {_CONVERT}"
    if data.startswith((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")):
        return "not an image of a known format: a TIFF whose number of bands or kind of values is not supported; convert it to RGB"
    if head.startswith((b"<!doctype html", b"<html", b"<head")):
        return "not an image of a known format: a web page; download the image again"
    return "not an image of a known format"

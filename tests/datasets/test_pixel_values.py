"""Pixel values that are not plain 8-bit colours, and files that are no image or only almost one."""

import io
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from msrn_ray.datasets.transforms import decode
from msrn_ray.errors import UserError
from msrn_ray.io.byte_ranges import read_bytes

RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)


def encoded(values: np.ndarray | Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return decode(data, max_pixels=10**8).numpy()


def noise(height: int = 160, width: int = 160) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_fewer_bits_in_16_keep_brightness(bits: int, kind: str) -> None:
    values = (RAMP * (2**bits - 1)).round().astype(np.uint16)  # 10 bits and 8 bits round: 1/8 and 1/2 of a step
    assert np.abs(decoded(encoded(values, kind))[0] - RAMP * 255).max() <= 0.64


@pytest.mark.parametrize("scale", [1, 255])
def test_float_images_keep_brightness(scale: int) -> None:
    assert np.abs(decoded(encoded((RAMP * scale).astype(np.float32), "TIFF"))[0] - RAMP * 255).max() <= 0.6


@pytest.mark.parametrize("value", [-1, 1000, np.nan])
def test_float_values_without_known_range_refused(value: float) -> None:
    values = RAMP.astype(np.float32)
    values[0, 0] = value
    with pytest.raises(UserError, match="convert it to 8 bits"):
        decoded(encoded(values, "TIFF"))


def test_infrared_band_is_not_transparency() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    colours[..., 3] = RAMP * 200 + 20
    assert (decoded(encoded(colours, "PNG")) == colours[..., :3].transpose(2, 0, 1)).all()


def test_soft_edged_logo_lies_on_white() -> None:
    distance = np.hypot(*(np.indices((64, 64)) - 31.5))
    logo = np.zeros((64, 64, 4), np.uint8)
    logo[..., 3] = np.clip((24 - distance) * 32, 0, 255)
    pixels = decoded(encoded(logo, "PNG"))
    assert pixels[0, 0, 0] == 255
    assert pixels[0, 32, 32] == 0


@pytest.mark.parametrize("missing", [1, 2])
def test_jpeg_without_end_marker_is_whole(missing: int) -> None:
    data = encoded(noise(), "JPEG")
    assert (decoded(data[:-missing]) == decoded(data)).all()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.95])
def test_jpeg_without_more_pixels_is_bad(share: float) -> None:
    data = encoded(noise(), "JPEG")
    with pytest.raises(UserError, match="broken or cut off"):
        decoded(data[: int(len(data) * share)])


def test_cut_progressive_jpeg_is_bad() -> None:
    with pytest.raises(UserError, match="broken or cut off"):
        decoded(encoded(noise(), "JPEG", progressive=True)[:-2])


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x18ftypheic", "HEIC"),
        (b"\0\0\0\x18ftypavif", "AVIF"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\n<!DOCTYPE html><html>", "web page"),
    ],
)
def test_unknown_format_is_named(head: bytes, kind: str) -> None:
    with pytest.raises(UserError, match=kind):
        decoded(head + bytes(100))


def test_any_decoder_exception_marks_image_bad() -> None:
    turned = struct.pack("<HHII", 0x112, 3, 1, 6)
    resolution = struct.pack("<HHI4s", 0x11A, 2, 4, b"abc")  # a text where Pillow writes a number: TypeError
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + turned + resolution + bytes(4)
    with pytest.raises(UserError, match="TypeError"):
        decoded(encoded(noise(), "WEBP", exif=exif))


def test_image_with_endless_side_is_refused() -> None:
    with pytest.raises(UserError, match="longer than"):
        decoded(encoded(Image.new("L", (1_000_001, 1)), "PNG"))


def test_pipe_is_refused_without_waiting(tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "a.jpg")
    os.mkfifo(path)
    with pytest.raises(OSError, match="no regular file"):
        read_bytes(path)


def test_normal_jpeg_is_unchanged() -> None:
    data = encoded(noise(), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
    assert torch.equal(decode(data, max_pixels=10**8), torch.from_numpy(expected.copy()))

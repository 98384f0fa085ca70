"""Decoding compared with Pillow and constructed pixels; crops recovered from images that encode coordinates."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from msrn_ray.datasets.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    decode,
    from_pil,
    multi_scale_crop,
    normalize,
    resize,
    smallest_side,
)
from msrn_ray.errors import UserError

Pixels = npt.NDArray[np.uint8]
PLENTY = 10_000_000

UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF orientation -> how a viewer turns the stored pixels
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.transpose(1, 0, 2),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2),
    8: lambda pixels: np.rot90(pixels),
}


def reference(data: bytes) -> npt.NDArray[np.float64]:
    """Return [H, W, 3], what a viewer shows, from Pillow's raw pixels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        orientation = image.getexif().get(0x0112, 1)
    if image.mode == "I;16":
        pixels = np.repeat(np.asarray(image).astype(np.float64)[:, :, None] / 257, 3, 2)
    elif image.mode in {"RGBA", "LA"} or "transparency" in image.info:
        layers = np.asarray(image.convert("RGBA")).astype(np.float64)
        alpha = layers[:, :, 3:] / 255
        pixels = layers[:, :, :3] * alpha + 255 * (1 - alpha)
    else:
        pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    return UPRIGHT[orientation](pixels)


def check(image: Tensor, expected: npt.NDArray[Any], tolerance: float) -> None:
    assert image.dtype == torch.uint8
    assert tuple(image.shape) == (3, *expected.shape[:2])
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, rtol=0, atol=tolerance)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(height: int = 48, width: int = 32) -> Pixels:
    """Return [H, W, 3], smooth and without any symmetry."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x * 2 + y * 3) % 256 // 2 + 40], 2).astype(np.uint8)


HOSTILE = {
    "truncated.jpg": "broken or cut off",
    "truncated.png": "broken or cut off",
    "header_only.jpg": "not an image of a known format",
    "text_named.jpg": "not an image of a known format",
    "zero_byte.jpg": "the file is empty",
    "huge_20000x20000.png": "more pixels",
    "png_named.jpg": None,
    "cmyk.jpg": None,
    "grey16.png": None,
    "rgba.png": None,
    "grey_alpha.png": None,
    "palette_transparent.png": None,
    "animated.gif": None,
    "one_pixel.jpg": None,
    "wide_5000x20.jpg": None,
    "exif_orientation6.jpg": None,
    "exif_corrupt.jpg": None,
    "photo.webp": None,
    "progressive.jpg": None,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(shared: Path, name: str) -> None:
    data = (shared / "data/hostile" / name).read_bytes()
    reason = HOSTILE[name]
    if reason is None:
        check(decode(data, max_pixels=PLENTY), reference(data), 3 if name.endswith("jpg") else 1)
    else:
        with pytest.raises(UserError, match=reason):
            decode(data, max_pixels=PLENTY)


def test_every_hostile_file_is_listed(shared: Path) -> None:
    assert {path.name for path in (shared / "data/hostile").iterdir()} - {"manifest.csv"} == set(HOSTILE)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize(("kind", "mode"), [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")])
def test_upright_by_exif(kind: str, mode: str, orientation: int) -> None:
    image = Image.fromarray(photo()).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    check(decode(data, max_pixels=PLENTY), UPRIGHT[orientation](stored), 3)


def test_channels_are_red_green_blue() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        data = encoded(Image.new("RGB", (16, 16), (200, 100, 20)), kind)
        image = decode(data, max_pixels=PLENTY)
        assert image.shape == (3, 16, 16)
        assert (image.float().mean((1, 2)) - torch.tensor([200.0, 100, 20])).abs().max() < 4, kind


def test_cmyk() -> None:
    """No ink is white, all cyan is without red."""
    ink = np.zeros((16, 32, 4), np.uint8)
    ink[:, 16:, 0] = 255
    image = decode(encoded(Image.fromarray(ink, "CMYK"), "JPEG", quality=95), max_pixels=PLENTY)
    assert image[:, :, :12].min() > 240
    assert image[0, :, 20:].max() < 15
    assert image[1:, :, 20:].min() > 240


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = np.array([[0, 128, 129, 257, 1000], [32768, 40000, 65278, 65407, 65535]], np.uint16)
    image = decode(encoded(Image.fromarray(levels), "PNG"), max_pixels=PLENTY)
    expected = np.repeat(np.round(levels / 257)[:, :, None], 3, 2)
    check(image, expected, 0)
    assert image[0].tolist() == [[0, 0, 1, 1, 4], [128, 156, 254, 255, 255]]


def test_transparent_pixels_are_blended_with_white() -> None:
    layers = np.zeros((1, 4, 4), np.uint8)
    layers[0] = [[10, 20, 30, 0], [10, 20, 30, 255], [10, 20, 30, 128], [255, 0, 0, 51]]
    expected = layers[..., :3] * (layers[..., 3:] / 255) + 255 * (1 - layers[..., 3:] / 255)
    for kind in ("PNG", "TIFF"):
        check(decode(encoded(Image.fromarray(layers), kind), max_pixels=PLENTY), expected, 1)
    grey = Image.merge("LA", [Image.fromarray(layers[..., 0]), Image.fromarray(layers[..., 3])])
    check(decode(encoded(grey, "PNG"), max_pixels=PLENTY)[:1].repeat(3, 1, 1), expected[..., :1].repeat(3, 2), 1)


def test_transparent_palette_entry() -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    for kind in ("PNG", "GIF"):
        shown = decode(encoded(image, kind, transparency=1), max_pixels=PLENTY)
        assert shown.permute(1, 2, 0).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]], kind
        assert decode(encoded(image, kind), max_pixels=PLENTY)[:, 0, 1].tolist() == [0, 255, 0], kind


def test_transparent_colour_without_an_alpha_channel() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    shown = decode(encoded(image, "PNG", transparency=(1, 2, 3)), max_pixels=PLENTY)
    assert shown.permute(1, 2, 0).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert Image.open(io.BytesIO(data)).n_frames == 3
        check(decode(data, max_pixels=PLENTY), np.full((8, 8, 3), (255, 0, 0)), 3)


def test_bilevel_image() -> None:
    image = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert decode(encoded(image, "PNG"), max_pixels=PLENTY)[2].tolist() == [[0, 255], [255, 0]]


def test_from_pil_agrees_with_decode() -> None:
    image = Image.fromarray(photo())
    check(from_pil(image), photo(), 0)
    assert torch.equal(from_pil(image), decode(encoded(image, "PNG"), max_pixels=PLENTY))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncated_images_are_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    for part in (0.5, 0.9):
        with pytest.raises(UserError, match="the image data is broken or cut off"):
            decode(data[: int(len(data) * part)], max_pixels=PLENTY)


def test_other_files_are_refused() -> None:
    with pytest.raises(UserError, match="the file is empty"):
        decode(b"", max_pixels=PLENTY)
    for data in (b"plain text", b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00", bytes(1000)):
        with pytest.raises(UserError, match="not an image of a known format"):
            decode(data, max_pixels=PLENTY)


def test_formats_other_than_photographs_are_refused() -> None:
    for kind in ("EPS", "ICO", "PCX", "TGA"):  # Pillow starts Ghostscript to read EPS
        with pytest.raises(UserError, match="not an image of a known format"):
            decode(encoded(Image.fromarray(photo()), kind), max_pixels=PLENTY)
    for kind in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        assert decode(encoded(Image.fromarray(photo()), kind), max_pixels=PLENTY).shape == (3, 48, 32)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_too_large_images_are_refused_by_their_header(kind: str) -> None:
    data = encoded(Image.fromarray(photo(200, 200)), kind)
    with pytest.raises(UserError, match=r"200 x 200 pixels are more than data\.max_pixels=100$"):
        decode(data, max_pixels=100)
    with pytest.raises(UserError, match=r"200 x 200 pixels are more than data\.max_pixels=39999$"):
        decode(data[: len(data) * 3 // 4], max_pixels=39_999)  # truncated pixels: only the header can give the size
    assert decode(data, max_pixels=40_000).shape == (3, 200, 200)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("short_side", "factor"), [(801, 1), (201, 1), (200, 4), (101, 4), (100, 8), (64, 8)])
def test_large_jpegs_are_decoded_at_reduced_size(mode: str, short_side: int, factor: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    data = encoded(Image.fromarray(photo(800, 1000)).convert(mode), "JPEG", quality=95, exif=exif)
    whole = decode(data, max_pixels=PLENTY)
    image = decode(data, max_pixels=PLENTY, short_side=short_side)
    assert tuple(image.shape) == (3, 1000 // factor, 800 // factor)
    if factor == 1:
        assert torch.equal(image, whole)
    difference = (resize(image, 64).float() - resize(whole, 64).float()).abs()
    assert difference.mean() < 1, "the same picture"


def test_other_formats_are_decoded_at_full_size() -> None:
    data = encoded(Image.fromarray(photo(800, 1000)), "PNG")
    assert torch.equal(decode(data, max_pixels=PLENTY, short_side=64), decode(data, max_pixels=PLENTY))


@pytest.mark.parametrize("size", [64, 448])
def test_smallest_crop_is_not_enlarged(size: int) -> None:
    assert smallest_side(size, ()) == size
    side = smallest_side(size, SCALES)
    assert round(side * min(SCALES)) >= size > round((side - 2) * min(SCALES))


# resize ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60), (10, 12), (1, 1), (20, 500)])
def test_resize_keeps_the_whole_picture(height: int, width: int) -> None:
    pixels = photo(height, width)
    view = resize(torch.from_numpy(pixels).permute(2, 0, 1), 32)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR))
    check(view.contiguous(), expected, 2)


# multi_scale_crop -----------------------------------------------------------------------------------------------------

HEIGHT, WIDTH, SIDE = 80, 100, 16
SCALES = (1.0, 0.9, 0.8, 0.7, 0.6)
GRID = torch.stack(  # red = 2.5 x column, green = 3 x row: a crop's mean gives its middle, its slope gives its side
    [
        (torch.arange(WIDTH) * 2.5).expand(HEIGHT, WIDTH),
        (torch.arange(HEIGHT) * 3.0)[:, None].expand(HEIGHT, WIDTH),
        torch.zeros(HEIGHT, WIDTH),
    ]
).to(torch.uint8)


def crop_box(view: Tensor) -> tuple[float, float, float, float, bool]:
    """Return top, left, height, width and mirroring of the crop that a view of `GRID` shows."""
    columns, rows = view[0].double().mean(0) / 2.5, view[1].double().mean(1) / 3
    slopes = [float(line[3:-3].diff().mean()) * SIDE for line in (columns, rows)]
    width, height = abs(slopes[0]), slopes[1]
    assert height > 0, "upside down"
    middle_x, middle_y = float(columns.mean()) + 0.5, float(rows.mean()) + 0.5
    return middle_y - height / 2, middle_x - width / 2, height, width, slopes[0] < 0


def allowed_boxes() -> dict[tuple[int, int, int, int], int]:
    """Return how many of the 19 x 13 choices lead to each (top, left, height, width), from the paper's description."""
    sides = [80, 72, 64, 56, 48]
    boxes: Counter[tuple[int, int, int, int]] = Counter()
    for i, height in enumerate(sides):
        for j, width in enumerate(sides):
            if abs(i - j) > 2:
                continue
            down, right = (HEIGHT - height) / 4, (WIDTH - width) / 4
            for y, x in [
                *((0, 0), (0, 4), (4, 0), (4, 4), (2, 2)),
                *((2, 0), (2, 4), (0, 2), (4, 2), (1, 1), (1, 3), (3, 1), (3, 3)),
            ]:
                boxes[int(y * down), int(x * right), height, width] += 1
    return boxes


def test_crops_are_exactly_the_allowed_ones() -> None:
    boxes = allowed_boxes()
    table = np.array(list(boxes))
    assert sum(boxes.values()) == 19 * 13
    rng = np.random.default_rng(0)
    seen: Counter[tuple[int, ...]] = Counter()
    draws = 4000
    for _ in range(draws):
        *box, mirrored = crop_box(multi_scale_crop(GRID, SIDE, SCALES, rng, flip=False))
        assert not mirrored
        distance = np.abs(table - box).max(1)
        assert distance.min() < 1.3, f"no allowed crop is near {box}"
        seen[tuple(table[distance.argmin()].tolist())] += 1
    assert set(seen) == set(boxes)
    expected = {box: draws * count / 247 for box, count in boxes.items()}
    chi_square = sum((seen[box] - count) ** 2 / count for box, count in expected.items())
    assert chi_square < len(boxes) + 5 * np.sqrt(2 * len(boxes)), "some crops are preferred"


def test_flip() -> None:
    rng = np.random.default_rng(1)
    draws = 600
    mirrored = sum(crop_box(multi_scale_crop(GRID, SIDE, SCALES, rng, flip=True))[4] for _ in range(draws))
    assert abs(mirrored - draws / 2) < 4 * np.sqrt(draws / 4)
    views = {tuple(multi_scale_crop(GRID, SIDE, (), rng, flip=True).flatten().tolist()) for _ in range(40)}
    plain = resize(GRID, SIDE)
    assert views == {tuple(plain.flatten().tolist()), tuple(plain.flip(-1).flatten().tolist())}


def test_without_scales_the_whole_picture_is_resized() -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        assert torch.equal(multi_scale_crop(GRID, SIDE, (), rng, flip=False), resize(GRID, SIDE))


def test_only_the_rng_decides_the_crop() -> None:
    def views(seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        return torch.stack([multi_scale_crop(GRID, SIDE, SCALES, rng, flip=True) for _ in range(5)])

    torch.manual_seed(0)
    first = views(7)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(first, views(7)), "only the given rng may have an effect"
    assert not torch.equal(first, views(8))
    assert len(torch.unique(first, dim=0)) > 1


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (7, 3), (500, 20)])
def test_crop_shape_for_any_image_size(height: int, width: int) -> None:
    image = torch.full((3, height, width), 77, dtype=torch.uint8)
    rng = np.random.default_rng(3)
    for _ in range(30):
        view = multi_scale_crop(image, SIDE, SCALES, rng, flip=True)
        assert view.shape == (3, SIDE, SIDE)
        assert view.dtype == torch.uint8
        assert (view == 77).all(), "a crop left the picture"


def test_crop_sides_are_fractions_of_the_short_side() -> None:
    rng = np.random.default_rng(4)
    for image in (GRID, GRID[:, :60]):
        short = min(image.shape[1:])
        _, _, height, width, _ = crop_box(multi_scale_crop(image, SIDE, (0.5,), rng, flip=False))
        assert height == pytest.approx(short / 2, abs=1.5)
        assert width == pytest.approx(short / 2, abs=1.5)


# normalize ------------------------------------------------------------------------------------------------------------


def test_normalize_every_level() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    levels[1] = 255 - levels[1]
    out = normalize(levels)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert (out.double() - (levels.double() / 255 - mean) / std).abs().max() < 1e-6
    assert IMAGENET_MEAN == (0.485, 0.456, 0.406)
    assert IMAGENET_STD == (0.229, 0.224, 0.225)


def test_normalize_with_other_constants() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    expected = (images.double() / 255 - torch.tensor(mean).double().view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert (normalize(images, list(mean), list(std)).double() - expected).abs().max() < 1e-6
    assert not torch.allclose(normalize(images).double(), expected), "the constants of the previous call were kept"


def test_normalize_serves_training_after_inference_mode() -> None:
    images = torch.full((1, 3, 2, 2), 9, dtype=torch.uint8)
    mean = (0.11, 0.12, 0.13)  # not used before, so that the constants are made here
    with torch.inference_mode():
        first = normalize(images, mean).clone()
    weight = torch.ones((), requires_grad=True)
    (normalize(images, mean) * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(first.sum().item(), rel=1e-6)

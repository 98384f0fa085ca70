"""Known problems of images: unreadable files, copies, missing labels, sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .finding import MAX_SHOWN, DatasetFacts, Finding, ShownImage, plural, shorten

_UNLABELLED = 0.05  # share of a split; COCO has 0.8 %
_ENLARGED = 8  # times: an image enlarged more than this shows almost nothing
_ELONGATED = 4  # long side / short side: from here on the square input distorts much


def unreadable_images(dataset: DatasetFacts) -> Iterator[Finding]:
    """Find images that cannot be read or decoded, by split; an error where they would stop training."""
    for first_row, summary in zip(dataset.first_rows, dataset.summaries, strict=True):
        if not summary.num_unreadable:
            continue
        errors = dataset.images["error"].slice(first_row, summary.num_images)
        rows = np.flatnonzero(pc.not_equal(errors, "").to_numpy()) + first_row
        shown = dataset.show(rows)
        reasons = dataset.images["error"].take(pa.array(rows[:MAX_SHOWN])).to_pylist()
        details = [f"{image.uri} ({reason})" for image, reason in zip(shown, reasons, strict=True)]
        limit = dataset.config.data.max_bad_fraction
        stops = summary.num_unreadable > limit * summary.num_images
        too_many = f"more than data.max_bad_fraction={limit} allows, training would stop"
        outcome = too_many if stops else "training leaves them out"
        yield Finding(
            "error" if stops else "warning",
            f"{plural(summary.num_unreadable, 'image')} of {summary.name} cannot be read"
            f" ({summary.num_unreadable / summary.num_images:.2%})",
            f"download or convert them again, or take them out of the list; {outcome}",
            shorten(details, len(rows)),
            shown,
        )


def copies(dataset: DatasetFacts) -> Iterator[Finding]:
    """Find images with the same bytes: in several splits, with different labels, or merely repeated."""
    sound = pc.equal(dataset.images["error"], "").to_numpy()
    codes = pc.fill_null(dataset.images["digest"].combine_chunks().dictionary_encode().indices, -1).to_numpy()
    codes = np.where(sound, codes, -1)
    has_copy = np.bincount(codes[sound], minlength=1) > 1
    rows = np.flatnonzero(sound & has_copy[codes])
    if not len(rows):
        return
    rows = rows[np.argsort(codes[rows], kind="stable")]  # groups of copies, one after the other
    first = np.flatnonzero(np.diff(codes[rows], prepend=-1))
    length = np.diff(first, append=len(rows))
    split = dataset.split_of(rows)
    in_split = [np.logical_or.reduceat(split == index, first) for index in range(len(dataset.split_names))]
    crossing = np.sum(in_split, 0) > 1
    flat = dataset.samples["target"].take(pa.array(rows)).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    targets = flat.reshape(len(rows), -1)
    differs = (targets != targets[first].repeat(length, 0)).any(1)
    contradicting = np.logical_or.reduceat(differs, first)

    def show(chosen: npt.NDArray[np.bool_]) -> tuple[tuple[str, ...], tuple[ShownImage, ...]]:
        groups = [rows[first[group] :][: length[group]] for group in np.flatnonzero(chosen)[:MAX_SHOWN]]
        lines = [" = ".join(shorten([image.caption for image in dataset.show(group)], len(group))) for group in groups]
        return shorten(lines, _count(chosen)), dataset.show(np.concatenate(groups))

    if crossing.any():
        pairs = [
            f"{dataset.split_names[a]} and {dataset.split_names[b]}: {num_shared}"
            for a, b in itertools.combinations(range(len(in_split)), 2)
            if (num_shared := _count(in_split[a] & in_split[b]))
        ]
        yield Finding(
            "error",
            f"{plural(_count(crossing), 'image')} in more than one split ({', '.join(pairs)})",
            "keep each image in one split: scores on images that were trained on are too high",
            *show(crossing),
        )
    if contradicting.any():
        yield Finding(
            "warning",
            f"{plural(_count(contradicting), 'image')} more than once with different labels",
            "keep the copy with the right labels",
            *show(contradicting),
        )
    plain = ~crossing & ~contradicting
    if plain.any():
        yield Finding(
            "warning",
            f"{plural(_count(plain), 'image')} more than once in the same split,"
            f" {(length[plain] - 1).sum():,} copies too many",
            "keep one copy of each image: copies weigh more than other images, in the loss and in the score",
            *show(plain),
        )


def _count(chosen: npt.NDArray[np.bool_]) -> int:
    return int(np.count_nonzero(chosen))


def unlabelled_images(dataset: DatasetFacts, left_out: pa.Table | None) -> Iterator[Finding]:
    """Find images without a label: in the splits, and left out of them (`left_out`, a column `uri`)."""
    fix = "check that their labels were not forgotten; images that really show none of the labels are worth keeping"
    for first_row, summary in zip(dataset.first_rows, dataset.summaries, strict=True):
        if summary.num_unlabelled:
            yield Finding(
                "warning" if summary.num_unlabelled > _UNLABELLED * summary.num_images else "info",
                f"{plural(summary.num_unlabelled, 'image')} of {summary.name} without a label"
                f" ({summary.num_unlabelled / summary.num_images:.2%})",
                fix,
                *_show_uris(dataset, first_row + summary.unlabelled),
            )
    if left_out is not None and len(left_out):
        uris = left_out["uri"].slice(0, MAX_SHOWN).to_pylist()
        yield Finding(
            "warning" if len(left_out) > _UNLABELLED * len(dataset.samples) else "info",
            f"{plural(len(left_out), 'image')} left out (no label)",
            f"{fix} (data.keep_unlabelled_train, data.keep_unlabelled_eval)",
            shorten(uris, len(left_out)),
            tuple(ShownImage(f"left out: {uri}", uri) for uri in uris),
        )


def sizes(dataset: DatasetFacts) -> Iterator[Finding]:
    """Find images that are too small or too long for the network's square input."""
    width, height = (dataset.images[name].to_numpy() for name in ("width", "height"))
    short, long = np.minimum(width, height), np.maximum(width, height)
    size = dataset.config.data.image_size
    sound = short > 0
    tiny = np.flatnonzero(sound & (short * _ENLARGED < size))
    if len(tiny):
        yield Finding(
            "warning",
            f"{plural(len(tiny), 'image')} enlarged more than {_ENLARGED} times (short side below {size / _ENLARGED:g} pixels)",
            "check whether they show anything; take larger versions, or leave them out",
            *_show_uris(dataset, tiny),
        )
    if sound.any() and np.median(short[sound]) < size:
        yield Finding(
            "info",
            f"half of the images or more are smaller than the network's input (data.image_size={size})",
            "a smaller data.image_size saves time and loses no detail of these images",
        )
    elongated = np.flatnonzero(sound & (long >= _ELONGATED * short))
    if len(elongated):
        yield Finding(
            "info",
            f"{plural(len(elongated), 'image')} at least {_ELONGATED} times as long as wide",
            "they are squeezed into a square for scoring; cut them into parts if their objects matter",
            *_show_uris(dataset, elongated),
        )


def _show_uris(dataset: DatasetFacts, rows: npt.NDArray[np.int64]) -> tuple[tuple[str, ...], tuple[ShownImage, ...]]:
    """Return the details and the images of a finding about these rows."""
    shown = dataset.show(rows)
    return shorten([image.uri for image in shown], len(rows)), shown

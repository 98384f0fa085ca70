"""What is known to go wrong with the images of a data set: unreadable ones, copies, missing labels, sizes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from .finding import SHOWN, Evidence, Finding, Shown, few, plural

_UNLABELLED = 0.05  # share of a split; COCO has 0.8 %
_ENLARGED = 8  # times: an image stretched more than this holds next to nothing
_ELONGATED = 4  # long side / short side, from which on the square input distorts much


def unreadable_images(evidence: Evidence) -> Iterator[Finding]:
    """Images that cannot be read or decoded, by split; an error where training would stop over them."""
    for index, summary in enumerate(evidence.summaries):
        if not summary.num_unreadable:
            continue
        errors = evidence.facts["error"].slice(evidence.start[index], summary.num_images)
        rows = np.flatnonzero(pc.not_equal(errors, "").to_numpy()) + evidence.start[index]
        shown = evidence.show(rows)
        reasons = evidence.facts["error"].take(pa.array(rows[:SHOWN])).to_pylist()
        details = [f"{one.uri} ({reason})" for one, reason in zip(shown, reasons, strict=True)]
        limit = evidence.config.data.max_bad_fraction
        stops = summary.num_unreadable > limit * summary.num_images
        yield Finding(
            "error" if stops else "warning",
            f"{plural(summary.num_unreadable, 'image')} of {summary.name} cannot be read"
            f" ({summary.num_unreadable / summary.num_images:.2%})",
            "download or convert them again, or take them out of the list; "
            + (
                f"more than data.max_bad_fraction={limit} allows, training would stop"
                if stops
                else "training leaves them out"
            ),
            few(details, len(rows)),
            shown,
        )


def copies(evidence: Evidence) -> Iterator[Finding]:
    """Images with the same bytes: across splits, with other labels, or plainly twice."""
    sound = pc.equal(evidence.facts["error"], "").to_numpy()
    codes = pc.fill_null(evidence.facts["digest"].combine_chunks().dictionary_encode().indices, -1).to_numpy()
    codes = np.where(sound, codes, -1)
    often = np.bincount(codes[sound], minlength=1) > 1
    rows = np.flatnonzero(sound & often[codes])
    if not len(rows):
        return
    rows = rows[np.argsort(codes[rows], kind="stable")]  # groups of copies, one after the other
    first = np.flatnonzero(np.diff(codes[rows], prepend=-1))
    length = np.diff(first, append=len(rows))
    split = evidence.split_of(rows)
    crossing = np.minimum.reduceat(split, first) != np.maximum.reduceat(split, first)
    flat = evidence.samples["target"].take(pa.array(rows)).combine_chunks().flatten().to_numpy(zero_copy_only=False)
    targets = flat.reshape(len(rows), -1)
    differing = (targets != targets[first].repeat(length, 0)).any(1)
    contradicting = np.logical_or.reduceat(differing, first)

    def number(chosen: npt.NDArray[np.bool_]) -> int:
        return int(np.count_nonzero(chosen))

    def groups(chosen: npt.NDArray[np.bool_]) -> tuple[tuple[str, ...], tuple[Shown, ...]]:
        picked = [rows[first[group] : first[group] + length[group]] for group in np.flatnonzero(chosen)[:SHOWN]]
        lines = [" = ".join(few([one.caption for one in evidence.show(group)], len(group))) for group in picked]
        return few(lines, number(chosen)), evidence.show(np.concatenate(picked))

    if crossing.any():
        between = [
            f"{one} and {other}: {shared}"
            for position, one in enumerate(evidence.names)
            for index, other in enumerate(evidence.names[position + 1 :], position + 1)
            if (shared := _shared(split, first, (position, index)))
        ]
        yield Finding(
            "error",
            f"{plural(number(crossing), 'image')} in more than one split ({', '.join(between)})",
            "keep each in one split: scores on images that were trained on are too high",
            *groups(crossing),
        )
    if contradicting.any():
        yield Finding(
            "warning",
            f"{plural(number(contradicting), 'image')} more than once with different labels",
            "keep the copy with the right labels",
            *groups(contradicting),
        )
    plain = ~crossing & ~contradicting
    if plain.any():
        extra = int((length[plain] - 1).sum())
        yield Finding(
            "warning",
            f"{plural(number(plain), 'image')} more than once in the same split, {extra:,} copies too many",
            "keep one of each: copies weigh more than other images, in the loss and in the score",
            *groups(plain),
        )


def _shared(split: npt.NDArray[np.int64], first: npt.NDArray[np.int64], pair: tuple[int, int]) -> int:
    """Groups of copies that have an image in both splits."""
    one, other = (np.logical_or.reduceat(split == index, first) for index in pair)
    return int(np.count_nonzero(one & other))


def unlabelled_images(evidence: Evidence, left_out: pa.Table | None) -> Iterator[Finding]:
    """Images without a label: in the splits, and left out of them (`left_out`, a column `uri`)."""
    mend = "check that their labels were not forgotten; images that really show none of the labels are worth keeping"
    for index, summary in enumerate(evidence.summaries):
        if summary.num_unlabelled:
            own = evidence.per_image[evidence.start[index] :][: summary.num_images]
            rows = np.flatnonzero(own == -1) + evidence.start[index]
            shown = evidence.show(rows)
            yield Finding(
                "warning" if summary.num_unlabelled > _UNLABELLED * summary.num_images else "info",
                f"{plural(summary.num_unlabelled, 'image')} of {summary.name} without a label"
                f" ({summary.num_unlabelled / summary.num_images:.2%})",
                mend,
                few([one.uri for one in shown], len(rows)),
                shown,
            )
    if left_out is not None and len(left_out):
        uris = left_out["uri"].slice(0, SHOWN).to_pylist()
        yield Finding(
            "warning" if len(left_out) > _UNLABELLED * len(evidence.samples) else "info",
            f"{plural(len(left_out), 'image')} left out for want of a label",
            f"{mend} (data.keep_unlabelled_train, data.keep_unlabelled_eval)",
            few(uris, len(left_out)),
            tuple(Shown(f"left out: {uri}", uri) for uri in uris),
        )


def sizes(evidence: Evidence) -> Iterator[Finding]:
    """Images too small or too long for the network's square input."""
    width, height = (evidence.facts[name].to_numpy() for name in ("width", "height"))
    short, long = np.minimum(width, height), np.maximum(width, height)
    size = evidence.config.data.image_size
    sound = short > 0
    tiny = np.flatnonzero(sound & (short * _ENLARGED < size))
    if len(tiny):
        yield Finding(
            "warning",
            f"{plural(len(tiny), 'image')} enlarged more than {_ENLARGED} times (short side below {size / _ENLARGED:g} pixels)",
            "look whether they show anything; take larger versions, or leave them out",
            few([one.uri for one in evidence.show(tiny)], len(tiny)),
            evidence.show(tiny),
        )
    if sound.any() and np.median(short[sound]) < size:
        yield Finding(
            "info",
            f"half of the images or more are smaller than the network's input (data.image_size={size})",
            "a smaller data.image_size costs less time and loses nothing of them",
        )
    stretched = np.flatnonzero(sound & (long >= _ELONGATED * short))
    if len(stretched):
        yield Finding(
            "info",
            f"{plural(len(stretched), 'image')} {_ELONGATED} times as long as wide, or more",
            "they are squeezed into a square for scoring; cut them into parts if their objects matter",
            few([one.uri for one in evidence.show(stretched)], len(stretched)),
            evidence.show(stretched),
        )

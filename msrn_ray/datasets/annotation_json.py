"""Reads the JSON and JSON Lines that annotation tools and cloud services export.

FiftyOne classification, mmpretrain, Label Studio (JSON and JSON-MIN), SageMaker Ground Truth, Vertex AI and Azure ML.
"""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ..errors import UserError
from ..io.storage import Location
from .annotations import Annotations, read_whole, vertex_split

_GROUND_TRUTH, _VERTEX, _AZURE = "source-ref", "imageGcsUri", "image_url"


def read_json_export(file: Location, head: str) -> Annotations | None:
    """Return the content of a JSON export. `head` is not used.

    Raises:
        UserError: if the file is damaged, or JSON of another form.
    """
    try:
        content = json.loads(read_whole(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged JSON ({' '.join(str(error).split())[:200]}); export it again") from None
    try:
        if isinstance(content, dict):
            if {"images", "annotations", "categories"} <= {*content}:
                raise UserError(f"{file}: is a COCO file; read it with --data.dataset coco")
            if "classes" in content and isinstance(content.get("labels"), dict):
                return _read_fiftyone(content)
            if "data_list" in content:
                return _read_mmpretrain(content)
        elif isinstance(content, list) and content and all(isinstance(entry, dict) for entry in content):
            return _read_label_studio(content)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise UserError(f"{file}: an entry lacks what its format needs ({error!r}); export it again") from None
    raise UserError(
        f"{file}: is JSON of an unknown form; known are COCO, FiftyOne (classes, labels), Label Studio and mmpretrain"
        " (metainfo, data_list). Write a table with the columns image and labels instead"
    )


def _by_number(values: Any, classes: list[str]) -> list[str]:
    """Return label names of a list, or single value, of numbers or names; a flag is no number."""
    listed = values if isinstance(values, list) else [] if values is None else [values]
    names = []
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError(f"{value!r} is neither the number nor the name of a class")
        if isinstance(value, int) and not 0 <= value < len(classes):
            raise ValueError(f"number {value} is outside of the {len(classes)} classes")
        names.append(classes[value] if isinstance(value, int) else value)
    return names


def _read_fiftyone(content: dict[str, Any]) -> Annotations:
    classes = [str(name) for name in content["classes"]]
    labels = content["labels"]
    return Annotations(
        "FiftyOne classification",
        [*labels],
        [_by_number(row, classes) for row in labels.values()],
        None,
        tuple(classes),
    )


def _read_mmpretrain(content: dict[str, Any]) -> Annotations:
    info = content.get("metainfo") or {}
    classes = [str(name) for name in info.get("classes") or info.get("CLASSES") or ()]
    entries = content["data_list"]
    labels = [_by_number(entry["gt_label"], classes) for entry in entries]
    return Annotations(
        "mmpretrain JSON", [entry["img_path"] for entry in entries], labels, None, tuple(classes) or None
    )


def _read_label_studio(content: list[dict[str, Any]]) -> Annotations:
    images, labels = [], []
    num_unfinished = 0
    for task in content:
        if "data" in task:
            done = [one for one in task["annotations"] if not one.get("was_cancelled")]
            if len(done) > 1:
                raise ValueError(f"task {task.get('id')} has {len(done)} annotations, of which none is the valid one")
            num_unfinished += not done
            if done:
                images.append(_label_studio_image(task["data"]))
                labels.append(_label_studio_choices(done[0]["result"]))
        else:
            images.append(_label_studio_image(task))
            fields = [value for key, value in task.items() if key in ("choice", "choices", "label", "labels")]
            labels.append([label for field in fields for label in _choices(field)])
    note = f"Label Studio: {num_unfinished} tasks without a finished annotation left out"
    return Annotations("Label Studio JSON", images, labels, notes=(note,) if num_unfinished else ())


def _label_studio_image(data: dict[str, Any]) -> str:
    value = str(data.get("image") or data.get("img") or data.get("url") or data["image"])
    parts = urlsplit(value)
    if parts.path.startswith("/data/local-files"):
        return parse_qs(parts.query)["d"][0]
    if parts.path.startswith("/data/upload/") and not parts.scheme:
        # Label Studio puts eight hex digits before the name of a file that was uploaded
        return re.sub(r"^[0-9a-f]{8}-", "", unquote(parts.path).rsplit("/", 1)[-1])
    return value


def _label_studio_choices(result: list[dict[str, Any]]) -> list[str]:
    return [label for region in result for label in _choices(region["value"])]


def _choices(value: Any) -> list[str]:
    if isinstance(value, dict):
        found = value.get("choices") or value.get("rectanglelabels") or value.get("polygonlabels") or ()
        return [str(label) for label in found]
    return [str(label) for label in (value if isinstance(value, list) else [value])]


def read_json_lines_export(file: Location, head: str) -> Annotations | None:
    """Return the content of a JSON Lines export; None if the first line in `head` has no field of one.

    Raises:
        UserError: if a line is damaged, with its number.
    """
    try:
        first = json.loads(head.split("\n", 1)[0])
    except (ValueError, RecursionError):
        return None  # the reader of tables names the damage
    if not isinstance(first, dict):
        return None
    readers = {_GROUND_TRUTH: _ground_truth, _VERTEX: _vertex_line, _AZURE: _azure_line}
    key = next((key for key in readers if key in first), None)
    if key is None:
        return None
    images, labels, splits = [], [], []
    for number, line in enumerate(read_whole(file).split("\n"), 1):
        if not line.strip():
            continue
        try:
            image, present, split = readers[key](json.loads(line))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{file}, line {number}: lacks what its format needs ({error!r}); correct the line"
            ) from None
        images.append(image)
        labels.append(present)
        splits.append(split)
    form = {_GROUND_TRUTH: "Ground Truth manifest", _VERTEX: "Vertex AI JSON Lines", _AZURE: "Azure ML JSON Lines"}[key]
    return Annotations(form, images, labels, splits)


def _ground_truth(line: dict[str, Any]) -> tuple[str, list[str], str]:
    jobs = [key.removesuffix("-metadata") for key in line if key.endswith("-metadata") and key[:-9] in line]
    if len(jobs) != 1:
        raise ValueError(f"{len(jobs)} labelling jobs in a line; keep one")
    values, metadata = line[jobs[0]], line[f"{jobs[0]}-metadata"]
    if "class-map" in metadata:
        return line[_GROUND_TRUTH], [str(metadata["class-map"][str(value)]) for value in values], ""
    return line[_GROUND_TRUTH], [str(metadata["class-name"])], ""


def _vertex_line(line: dict[str, Any]) -> tuple[str, list[str], str]:
    listed = line.get("classificationAnnotations") or [line["classificationAnnotation"]]
    split = (line.get("dataItemResourceLabels") or {}).get("aiplatform.googleapis.com/ml_use", "")
    return line[_VERTEX], [entry["displayName"] for entry in listed], vertex_split(split)


def _azure_line(line: dict[str, Any]) -> tuple[str, list[str], str]:
    label = line["label"]
    labels = [str(name) for name in label] if isinstance(label, list) else [str(label)]
    match = re.fullmatch(r"azureml://.*?/paths/(.+)|AmlDatastore://[^/]+/(.+)", line[_AZURE])
    return (match[1] or match[2]) if match else line[_AZURE], labels, ""

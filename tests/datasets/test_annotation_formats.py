"""Label files that annotation tools and cloud services export, on small made files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from msrn_ray.data_settings import DataSettings
from msrn_ray.datasets.registry import read_published
from msrn_ray.errors import UserError

LABELS = {"a.jpg": ["cup", "dining table"], "b.jpg": [], "c.jpg": ["person"], "d.jpg": ["cup"]}
CLASSES = ["cup", "dining table", "person"]
Writer = Callable[[Path], Path]


def read(file: Path, **settings: str | float) -> dict[str, tuple[set[str], set[str], str]]:
    """Return the present labels, the unknown labels and the split of each image by the name of its file."""
    defaults = {"dataset": "manifest", "test_fraction": 0.0, "keep_unlabelled_train": True}
    published = read_published(DataSettings.model_validate(defaults | {"root": str(file)} | settings))
    found = {}
    for split, table in (("train", published.train), ("val", published.val), ("test", published.held_out)):
        if table is not None:
            for uri, target in zip(table.table["uri"].to_pylist(), table.targets.tolist(), strict=True):
                assert Path(uri).is_file()
                present, unknown = (
                    {n for n, v in zip(table.label_names, target, strict=True) if v == w} for w in (1, -1)
                )
                found[Path(uri).name] = (present, unknown, split)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in LABELS:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    return tmp_path


def _stems() -> dict[str, list[str]]:
    return {Path(name).stem: labels for name, labels in LABELS.items()}


def fiftyone(folder: Path) -> Path:
    labels = {stem: [CLASSES.index(name) for name in names] for stem, names in _stems().items()}
    return save(folder / "labels.json", json.dumps({"classes": CLASSES, "labels": labels}))


def mmpretrain(folder: Path) -> Path:
    entries = [
        {"img_path": f"images/{name}", "gt_label": [CLASSES.index(label) for label in labels]}
        for name, labels in LABELS.items()
    ]
    return save(folder / "train.json", json.dumps({"metainfo": {"classes": CLASSES}, "data_list": entries}))


def label_studio(folder: Path) -> Path:
    tasks = [
        {
            "id": number,
            "data": {"image": f"/data/upload/1/0a1b2c3d-{name}"},
            "annotations": [{"result": [{"type": "choices", "value": {"choices": labels}}] if labels else []}],
        }
        for number, (name, labels) in enumerate(LABELS.items())
    ]
    return save(folder / "project.json", json.dumps(tasks))


def label_studio_min(folder: Path) -> Path:
    tasks = [
        {
            "image": f"/data/local-files/?d=images/{name}",
            "choice": {"choices": labels} if len(labels) != 1 else labels[0],
        }
        for name, labels in LABELS.items()
    ]
    return save(folder / "min.json", json.dumps(tasks))


def cvat(folder: Path) -> Path:
    images = "".join(
        f'<image id="0" name="{name}">' + "".join(f'<tag label="{label}"></tag>' for label in labels) + "</image>"
        for name, labels in LABELS.items()
    )
    names = "".join(f"<label><name>{name}</name></label>" for name in CLASSES)
    return save(
        folder / "annotations.xml",
        f"<annotations><meta><task><labels>{names}</labels></task></meta>{images}</annotations>",
    )


def ground_truth(folder: Path) -> Path:
    lines = [
        {
            "source-ref": f"images/{name}",
            "job": [CLASSES.index(label) for label in labels],
            "job-metadata": {"class-map": {str(CLASSES.index(label)): label for label in labels}},
        }
        for name, labels in LABELS.items()
    ]
    return save(folder / "output.manifest", "\n".join(map(json.dumps, lines)))


def vertex_lines(folder: Path) -> Path:
    lines = [
        {"imageGcsUri": f"images/{name}", "classificationAnnotations": [{"displayName": label} for label in labels]}
        for name, labels in LABELS.items()
        if labels
    ]
    return save(folder / "import.jsonl", "\n".join(map(json.dumps, lines)) + "\n")


def azure(folder: Path) -> Path:
    lines = [{"image_url": f"AmlDatastore://store/images/{name}", "label": labels} for name, labels in LABELS.items()]
    return save(folder / "azure.jsonl", "\n".join(map(json.dumps, lines)))


def vertex_csv(folder: Path) -> Path:
    return save(
        folder / "import.csv",
        "\n".join(",".join(["UNASSIGNED", f"images/{name}", *labels]) for name, labels in LABELS.items()),
    )


def celeba(folder: Path) -> Path:
    names = [name.replace(" ", "_") for name in CLASSES]  # blanks separate the names there
    rows = [
        f"{name} " + "  ".join("1" if label.replace(" ", "_") in row else "-1" for label in names)
        for name, row in underscored()
    ]
    return save(folder / "list_attr_celeba.txt", "\n".join(["4", " ".join(names), *rows, ""]))


def underscored() -> list[tuple[str, list[str]]]:
    return [(name, [label.replace(" ", "_") for label in labels]) for name, labels in LABELS.items()]


def lst(folder: Path) -> Path:
    rows = [
        "\t".join([str(number), *("1" if label in labels else "0" for label in CLASSES), f"images/{name}"])
        for number, (name, labels) in enumerate(LABELS.items())
    ]
    return save(folder / "train.lst", "\n".join(rows))


def save(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "write",
    [fiftyone, mmpretrain, label_studio, label_studio_min, cvat, ground_truth, azure, vertex_csv],
)
def test_export_reads_as_it_was_labelled(folder: Path, write: Writer) -> None:
    assert read(write(folder)) == {name: ({*labels}, set(), "train") for name, labels in LABELS.items()}


def test_vertex_lines_read_as_they_were_labelled(folder: Path) -> None:
    expected = {name: ({*labels}, set(), "train") for name, labels in LABELS.items() if labels}
    assert read(vertex_lines(folder)) == expected


def test_celeba_minus_one_is_absent(folder: Path) -> None:
    file = celeba(folder)
    assert read(file) == {name: ({*labels}, set(), "train") for name, labels in underscored()}
    save(folder / "list_eval_partition.txt", "a.jpg 0\nb.jpg 1\nc.jpg 2\nd.jpg 0\n")
    assert {name: split for name, (_, _, split) in read(file).items()} == dict(
        zip(LABELS, ("train", "val", "test", "train"), strict=True)
    )
    save(folder / "list_eval_partition.txt", "a.jpg 0\n")
    with pytest.raises(UserError, match=r"3 of 4 images have no split \(b.jpg"):
        read(file)


def test_lst_flags_take_names_by_position(folder: Path) -> None:
    file = lst(folder)
    numbers = {
        name: ({str(CLASSES.index(label)) for label in labels}, set(), "train") for name, labels in LABELS.items()
    }
    assert read(file) == numbers
    labels = save(folder / "names.txt", "\n".join(CLASSES))
    assert read(file, labels=str(labels)) == {name: ({*row}, set(), "train") for name, row in LABELS.items()}


def test_open_images_unlisted_labels_are_unknown(folder: Path) -> None:
    header = "ImageID,Source,LabelName,Confidence\n"
    train = save(
        folder / "train-labels.csv", header + "a,verification,/m/1,1\na,verification,/m/2,0\nc,verification,/m/2,1\n"
    )
    save(folder / "class-descriptions.csv", "/m/1,Cup\n/m/2,Person\n")
    assert read(train) == {"a.jpg": ({"Cup"}, set(), "train"), "c.jpg": ({"Person"}, {"Cup"}, "train")}
    save(folder / "validation-labels.csv", header + "d,verification,/m/1,1\n")
    assert read(train)["d.jpg"] == ({"Cup"}, {"Person"}, "val")
    save(folder / "test-labels.csv", header + "a,verification,/m/1,1\n")
    with pytest.raises(UserError, match="image 'a' is in train and in test"):
        read(train)
    save(train, header + "a,verification,/m/1,1\na,crowd,/m/1,0\n")
    with pytest.raises(UserError, match="image 'a' has label 'Cup' as present and as absent"):
        read(train)
    save(train, header + "a,machine,/m/1,0.9\n")
    with pytest.raises(UserError, match=r"row 1: confidence 0\.9"):
        read(train)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.xml", "<annotation><object/></annotation>", r"root <annotation>.*--data\.dataset voc"),
        (
            "x.xml",
            '<!DOCTYPE a [<!ENTITY e "x">]><annotations>&e;</annotations>',
            "declares a document type or entities",
        ),
        ("x.xml", "<annotations><image", r"not an XML file \(unclosed token"),
        ("x.json", "{", "damaged JSON"),
        ("x.json", '{"a": 1}', "JSON of an unknown form"),
        ("x.json", '{"images": [], "annotations": [], "categories": []}', r"--data\.dataset coco"),
        ("x.json", '{"classes": ["cup"], "labels": {"a": [1]}}', "number 1 is outside of the 1 classes"),
        ("x.json", '{"classes": ["cup"], "labels": {"a": [true]}}', "True is neither the number nor the name"),
        ("x.json", '{"classes": ["cup"], "labels": {"a": []}}', "no image has a label"),
        ("x.json", '{"classes": ["cup"], "labels": {}}', "lists no image"),
        ("x.json", '{"classes": ["cup"], "labels": {"nowhere": [0]}}', "1 of its 1 images are missing"),
        (
            "x.json",
            '[{"image": "a.jpg", "choice": "cup"}, {"image": "a.jpg", "choice": "cup"}]',
            "occur more than once",
        ),
        ("x.lst", "0\t1\t0\timages/a.jpg\n1\t1\timages/b.jpg", "line 2: needs a number"),
        ("x.lst", "0\t2\t0\timages/a.jpg", "line 1: holds flags other than 0 and 1"),
        ("x.csv", "training,images/a.jpg,cup\n\nimages/b.jpg,cup", "line 3: does not begin with a split"),
        ("x.csv", "training,images/a.jpg,cup\nunassigned,images/b.jpg,cup", "1 of 2 images have no split"),
        ("x.txt", "2\ncup person\na.jpg 1 -1\n", "says 2 images, but lists 1"),
        ("x.txt", "1\ncup person\na.jpg 1 -1\nb.jpg 1 0\n", "line 4: needs an image and 2 values"),
        (
            "x.manifest",
            '{"source-ref": "images/a.jpg", "j": [7], "j-metadata": {"class-map": {"0": "cup"}}}',
            "line 1: lacks",
        ),
    ],
)
def test_damaged_export_is_refused(folder: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read(save(folder / name, text))


def test_image_of_two_folders_is_refused(folder: Path) -> None:
    (folder / "more").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "more" / "a.jpg")
    with pytest.raises(UserError, match=r"'a' may be images/a\.jpg, more/a\.jpg"):
        read(fiftyone(folder))
    assert read(mmpretrain(folder)).keys() == LABELS.keys(), "a path names one of them"

"""The benchmarks' labels in the order of the authors' checkpoints: VOC and COCO alphabetical by name, the others their own."""

from __future__ import annotations

from .datasets.apparel import APPAREL_LABELS
from .datasets.nuswide import NUSWIDE_LABELS
from .datasets.voc import VOC_LABELS

COCO_LABELS = (
    "airplane", "apple", "backpack", "banana", "baseball bat", "baseball glove", "bear", "bed", "bench", "bicycle",
    "bird", "boat", "book", "bottle", "bowl", "broccoli", "bus", "cake", "car", "carrot", "cat", "cell phone",
    "chair", "clock", "couch", "cow", "cup", "dining table", "dog", "donut", "elephant", "fire hydrant", "fork",
    "frisbee", "giraffe", "hair drier", "handbag", "horse", "hot dog", "keyboard", "kite", "knife", "laptop",
    "microwave", "motorcycle", "mouse", "orange", "oven", "parking meter", "person", "pizza", "potted plant",
    "refrigerator", "remote", "sandwich", "scissors", "sheep", "sink", "skateboard", "skis", "snowboard", "spoon",
    "sports ball", "stop sign", "suitcase", "surfboard", "teddy bear", "tennis racket", "tie", "toaster", "toilet",
    "toothbrush", "traffic light", "train", "truck", "tv", "umbrella", "vase", "wine glass", "zebra",
)  # fmt: skip

LABEL_NAMES: dict[str, tuple[str, ...]] = {
    "voc2007": VOC_LABELS,
    "coco2014": COCO_LABELS,
    "nuswide": NUSWIDE_LABELS,
    "apparel": APPAREL_LABELS,
}

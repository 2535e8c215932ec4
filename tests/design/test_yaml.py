"""YAML means what YAML 1.2 says, and what is written is read back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.design.load import read_json, read_mapping
from plait.design.yaml_core import read_yaml, write_yaml

MEANS = {
    "0755": 755,
    "-007": -7,
    "+12": 12,
    "0o17": 15,
    "0x1f": 31,
    "5e-5": 5e-5,
    "2E3": 2000.0,
    ".5": 0.5,
    "6.": 6.0,
    "-.inf": -math.inf,
    "190:20:30": "190:20:30",
    "12_000": "12_000",
    "on": "on",
    "No": "No",
    "y": "y",
    "True": True,
    "Null": None,
    "~": None,
    "1999-12-31": "1999-12-31",
    "1.2.3": "1.2.3",
    "0b11": "0b11",
    "=": "=",
    "e5": "e5",
}


@pytest.mark.parametrize("text", MEANS)
def test_plain_words_and_numbers(text):
    value = read_yaml(text)
    assert value == MEANS[text]
    assert type(value) is type(MEANS[text])


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(), st.lists))
def test_what_is_written_is_read_back(value):
    again = read_yaml(write_yaml({"key": value}).encode("utf-8").decode())["key"]
    assert again == value
    assert type(again) is type(value)


@pytest.mark.parametrize("text", [*MEANS, "", " a", "a ", "# a", "<<", "a: b", "\x85", "\ud800", "*a", "1e3", "!x"])
def test_text_stays_text(text):
    assert read_yaml(write_yaml({"key": text}))["key"] == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 3", "line 3, column 1: 'a' is given twice, first in line 1"),
        ("a:\n  b: {c: 1,\n   c: 2}", "line 3, column 4: 'c' is given twice, first in line 2"),
        ("a: [1", "line 1"),
        ("a: \x00", "line 1: character U+0000 is no text"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("[" * 5000, "nested too deeply"),
        ("n: " + "7" * 9000, "'77777777777777777777' is no number"),
    ],
)
def test_wrong_yaml_is_one_line_with_its_place(text, said):
    with pytest.raises(ValueError, match=".") as caught:
        read_yaml(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_merged_key_may_be_given_again():
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")["b"] == {"x": 3, "y": 2}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1,\n "a": 2}', "line 2, column 2: 'a' is given twice"),
        ('{"a": [NaN]}', "NaN is not JSON"),
        ('{"a": }', "line 1, column 7"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_wrong_json(text, said):
    with pytest.raises(ValueError, match=".") as caught:
        read_json(text)
    assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"- a\n- b\n", b"a: 1\na: 2\n"])
@pytest.mark.parametrize("name", ["x.yaml", "x.json"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=".") as caught:
        read_mapping(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    (tmp_path / "x.yaml").write_bytes("\ufeffdim: 64\n".encode())
    assert read_mapping(tmp_path / "x.yaml") == {"dim": 64}

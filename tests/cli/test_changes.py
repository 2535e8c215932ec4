import pytest

from plait.cli.changes import read_changes


def test_values_are_yaml():
    assert read_changes(
        ["a=1", "b.c=true", "lr=3e-4", "x=1.5e3", "betas=[0.9, 0.95]", "name=a=b", "clip=null", "s=x y"]
    ) == {
        "a": 1,
        "b.c": True,
        "lr": 3e-4,
        "x": 1.5e3,
        "betas": [0.9, 0.95],
        "name": "a=b",
        "clip": None,
        "s": "x y",
    }


def test_patterns_are_text():
    assert read_changes(["pattern=[M|A]", "design=[M|A]F", "teacher.pattern=A3"]) == {
        "pattern": "[M|A]",
        "design": "[M|A]F",
        "teacher.pattern": "A3",
    }


@pytest.mark.parametrize("argument", ["dim", "=3", "a b=3", "3x=1", "a..b=1"])
def test_what_is_no_change_is_refused(argument):
    with pytest.raises(ValueError, match="expected key=value"):
        read_changes([argument])

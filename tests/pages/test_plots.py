"""Pictures, measured in the SVG that is written."""

import re

import pytest

from plait.pages.plots import bars, decode_times

LONG = [f"a-very-long-model-name-that-nobody-would-choose-{i}" for i in range(6)]


def places(svg: str) -> list[tuple[float, float]]:
    """Where each name of the legend begins, from the left and the top."""
    legend = svg[svg.index('-legend_1"') :]
    found = re.findall(r'<text [^>]*?(?:translate\(| x="|x=")([\d.]+)(?:[ ,]+|" y=")([\d.]+)', legend)
    return [(float(x), float(y)) for x, y in found]


def top(svg: str) -> float:
    """Of the box that the data are drawn in."""
    path = re.findall(r'patch_2">\s*<path d="([^"]*)"', svg)[0]
    return min(float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path))


@pytest.mark.parametrize("names", [["one"], ["transformer", "recurrent", "sequential", "parallel"], LONG])
def test_a_legend_hides_no_data_and_ends_within_the_picture(names: list[str]) -> None:
    svg = decode_times([(name, [256, 8192], [3.0 + i, 5.0 + i]) for i, name in enumerate(names)])
    begun = places(svg)
    assert len(begun) == len(names)
    assert max(y for _, y in begun) < top(svg)
    assert all(
        x + 6 * len(name) < 360 for (x, _), name in zip(begun, names, strict=True)
    )  # 6: an ordinary letter of 11 px


def test_of_bars_that_are_all_of_one_kind_the_other_is_not_named() -> None:
    svg = bars("lifts", "bits", ["A#0"], [0.4], [True], "kept, replaced")
    assert ">kept</text>" in svg
    assert "replaced" not in svg

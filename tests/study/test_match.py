import pytest

from plait.design.count import parameters
from plait.study import match_parameters
from plait.study.demo import VOCAB, demo_study

PATTERNS = ["(AF)4", "(DF)4", "(MF)4", "(DF)3 AF", "([D|A]F)4", "[MF|AF]2 F", "(AF)2 W F"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("budget", [1_500_000, 4_000_000])
def test_sizes_match_within_three_percent(pattern, budget):
    design = match_parameters(pattern, budget, vocab=1_024, dim=128)
    assert abs(parameters(design) / budget - 1) <= 0.03
    assert design.place("F#0").layer.hidden % 8 == 0


def test_only_the_feed_forward_width_gives_way():
    design = match_parameters("(AF)2 G", 3_000_000, vocab=500, dim=128, layers={"G": {"kind": "gelu"}})
    other = match_parameters("AF", 500_000, vocab=500, dim=128)
    assert design.place("A#0").layer == other.place("A#0").layer
    assert design.place("F#0").layer.hidden == design.place("G#0").layer.hidden


def test_what_cannot_be_matched_says_why():
    with pytest.raises(ValueError, match="no feed-forward layer"):
        match_parameters("A4", 1_000_000, vocab=1_024, dim=128)
    with pytest.raises(ValueError, match=r"\+.*% from the 10,000 asked for"):
        match_parameters("(AF)4", 10_000, vocab=1_024, dim=128)


def test_the_demo_differs_in_patterns_alone():
    study = demo_study()
    runs = [study.run(name, VOCAB).to_dict() for name in study.patterns]
    for run in runs:
        design = run.pop("design")
        assert (
            abs(
                parameters(match_parameters(design["pattern"], study.parameters, vocab=VOCAB, dim=128))
                / study.parameters
                - 1
            )
            < 0.01
        )
        del run["folder"]
    assert all(run == runs[0] for run in runs)

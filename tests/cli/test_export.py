"""`plait export` says what it wrote, and what can be done with it."""

import pytest

import plait as library


@pytest.mark.parametrize(
    ("tokenizer", "said", "after"),
    [("bytes", "with its tokenizer", 'generate {out} "The "'), (None, "no tokenizer beside it", "show {out}")],
)
def test_what_to_run_next_runs(plait, tmp_path, tokenizer, said, after):
    model = library.build(library.ModelConfig(vocab=257, dim=64, pattern="AF"))
    library.save(model, tmp_path / "own", tokenizer and library.load_tokenizer(tokenizer))
    out = str(tmp_path / "theirs")
    ran = plait("export", str(tmp_path / "own"), out, "--to", "llama")
    assert ran.code == 0
    assert f"AF: llama, {said}" in ran.out
    assert "next: plait " + after.format(out=out) in ran.err
    if tokenizer is None:
        assert plait("show", out).code == 0
    else:
        assert plait("generate", out, "The ", "--max-tokens", "1").code == 0

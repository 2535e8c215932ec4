"""The state of a whole model: copies, files, and what is refused."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

import plait
from plait.files import write_atomic
from plait.state import ModelState, StaleState

DESIGN = plait.ModelConfig(
    vocab=17, dim=64, pattern="M [A|WF]F D", layers={"W": plait.Attention(window=4), "F": plait.SwiGLU(hidden=8)}
)
TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture
def model():
    return plait.build(DESIGN)


@pytest.fixture
@torch.no_grad()
def state(model):
    return model(TOKENS, model.init_state(2))[1]


def test_names_say_where(state):
    assert sorted(state.tensors()) == [
        "0.conv",
        "0.s",
        "1.0.0.k",
        "1.0.0.v",
        "1.1.0.k",
        "1.1.0.v",
        "3.conv",
        "3.s",
    ]
    assert state.nbytes == sum(x.nbytes for x in state.tensors().values())
    assert state.lengths == (6, 6)
    assert state.batch == 2


def test_fork_shares_no_memory(state):
    copy = state.fork()
    for name, x in state.tensors().items():
        assert torch.equal(x, copy.tensors()[name])
        assert x.data_ptr() != copy.tensors()[name].data_ptr()


def test_a_call_changes_no_state_it_was_given(model, state):
    before = {name: x.clone() for name, x in state.tensors().items() if not name.startswith("1.0.0")}
    with torch.no_grad():
        model(TOKENS, state)
    for name, x in before.items():
        assert torch.equal(state.tensors()[name], x)


def test_detach(model):
    _, state = model(TOKENS, model.init_state(2))
    assert all(x.requires_grad for x in state.tensors().values())
    cut = state.detach()
    assert not any(x.requires_grad for x in cut.tensors().values())
    logits, _ = model(TOKENS, cut)  # and training goes on from there
    logits.sum().backward()


@pytest.mark.parametrize("rows", [[1], [0, 0, 1], [-1, 0]])
def test_select(state, rows):
    picked = state.select(rows)
    assert picked.lengths == (6,) * len(rows)
    for name, x in state.tensors().items():
        assert torch.equal(picked.tensors()[name], x[rows])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([2], "row 2 does not exist; the state has 2 rows"),
        (torch.tensor([0, -3]), "row -3 does not exist; the state has 2 rows"),
        ([], "at least one"),
        (torch.tensor([], dtype=torch.int64), "at least one"),
        (torch.tensor([1.0]), "whole numbers, or one bool for each row; got 1.0"),
        ([float("nan")], "got nan among the rows"),
        (torch.tensor([[0, 1]]), r"got \[0, 1\] among the rows"),
        ([True, 1], "got True among the rows"),
        (torch.tensor([True]), "a mask of 1 bools; the state has 2 rows"),
        ([False, False], "the mask keeps none"),
        (1, "a sequence of rows, such as"),
        ("01", "a sequence of rows, such as"),
    ],
)
def test_select_nothing_that_is_there(state, rows, message):
    with pytest.raises(ValueError, match=message):
        state.select(rows)


@pytest.mark.parametrize(
    "rows",
    [
        *(torch.tensor([1, 0], dtype=kind) for kind in (torch.uint8, torch.int16, torch.int32, torch.int64)),
        *(np.array([-1, 0]), range(1, -1, -1), (np.int64(1), 0), [torch.tensor(1), torch.tensor(0)]),
    ],
    ids=str,
)
def test_rows_of_any_kind(state, rows):
    for name, x in state.tensors().items():
        assert torch.equal(state.select(rows).tensors()[name], x[[1, 0]])


@pytest.mark.parametrize("mask", [[False, True], torch.tensor([False, True]), np.array([False, True])], ids=str)
def test_a_mask_keeps_the_true_rows(state, mask):
    picked = state.select(mask)
    assert picked.lengths == (6,)
    assert torch.equal(picked.tensors()["0.s"], state.tensors()["0.s"][[1]])


def test_a_state_from_inference_mode_goes_on_outside_of_it(model):
    with torch.inference_mode():
        _, state = model(TOKENS, model.init_state(2))
        want, _ = model(TOKENS, state)
    with torch.no_grad():
        assert torch.equal(model(TOKENS, state)[0], want)


@pytest.mark.parametrize(
    "copied", [ModelState.fork, ModelState.detach, lambda s: s.select([0, 1]), lambda s: s.to("cpu")]
)
def test_a_copy_made_in_inference_mode_goes_on_outside_of_it(model, copied):
    with torch.inference_mode():
        _, state = model(TOKENS, model.init_state(2, length=64))
        copy, (want, _) = copied(state), model(TOKENS, state)
    with torch.no_grad():
        got, after = model(TOKENS, copy)
        assert torch.equal(got, want)
        assert model(TOKENS, after)[1].lengths == (18, 18)


def test_files(state, tmp_path):
    path = tmp_path / "chat.state"
    state.save(path)
    loaded = ModelState.load(path)
    assert loaded.lengths == state.lengths
    assert loaded.design == DESIGN.hash
    assert [type(slot) for slot in loaded.slots] == [type(slot) for slot in state.slots]
    for name, x in state.tensors().items():
        assert torch.equal(loaded.tensors()[name], x)
        assert loaded.tensors()[name].dtype == x.dtype
    assert list(tmp_path.iterdir()) == [path]  # nothing temporary is left


def test_a_loaded_state_goes_on_to_the_last_digit(tmp_path):
    """A file's tensors lie at multiples of 8 bytes, and products of such ones end otherwise than of those that torch made."""
    layers = {"S": plait.SLSTM(heads=1, head_dim=10)}
    model = plait.build(plait.ModelConfig(vocab=17, dim=24, pattern="SPSPS", layers=layers))
    tokens = torch.randint(17, (3, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, state = model(tokens, model.init_state(3))
        state.save(tmp_path / "state")
        loaded = ModelState.load(tmp_path / "state")
        assert all(x.data_ptr() % 64 == 0 for x in loaded.tensors().values())
        assert torch.equal(model(tokens, loaded)[0], model(tokens, state)[0])


def test_files_that_are_no_state(state, tmp_path):
    path = tmp_path / "x"
    with pytest.raises(FileNotFoundError, match="no such state file"):
        ModelState.load(path)
    path.write_bytes(b"\x00binary")
    with pytest.raises(ValueError, match="not a readable state file"):
        ModelState.load(path)
    safetensors.torch.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"not a state written by ModelState\.save"):
        ModelState.load(path)
    state.save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cut short"):
        ModelState.load(path)


def test_a_stale_state_cannot_be_saved(model, state, tmp_path):
    with torch.no_grad():
        _, draft = model(TOKENS, state)
        model(TOKENS, state)
    with pytest.raises(StaleState):
        draft.save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("other", [DESIGN.replace(vocab=18), DESIGN.replace(pattern="M [A|WF]F M")])
def test_another_design_refuses_it(state, other):
    with pytest.raises(ValueError, match="belongs to another design"):
        plait.build(other)(TOKENS, state)


@pytest.mark.parametrize("other", [DESIGN.replace(vocab=18), DESIGN.replace(pattern="M")])
def test_states_of_another_design_do_not_join(state, other):
    with pytest.raises(
        ValueError, match=f"join takes .* all of one design; got those of .*{plait.build(other).design.hash}"
    ):
        ModelState.join([state, plait.build(other).init_state()])


def test_nothing_does_not_join():
    with pytest.raises(ValueError, match="join takes one state or more, all of one design; got none"):
        ModelState.join([])


def test_another_batch_refuses_it(model, state):
    with pytest.raises(ValueError, match="the state has 2 rows, but the call has 1"):
        model(TOKENS[:1], state)
    with pytest.raises(ValueError, match="the state has 2 rows, but the call has 3"):
        model(TOKENS.view(1, -1), state, cu_seqlens=torch.tensor([0, 3, 6, 12]))


@pytest.mark.parametrize(("batch", "length"), [(0, 4), (1, -1), (True, 4), (2.0, 4), (1, float("nan")), ("1", 4)])
def test_init_state_of_nothing(model, batch, length):
    with pytest.raises(ValueError, match="init_state: (batch|length) must be a whole number"):
        model.init_state(batch, length)
    with pytest.raises(ValueError, match="state_spec: (batch|length) must be a whole number"):
        model.state_spec(batch, length)


class TestWriteAtomic:
    def test_replaces(self, tmp_path):
        path = tmp_path / "deep" / "file"
        for text in ("one", "two"):
            write_atomic(path, lambda p, text=text: p.write_text(text) and None)
            assert path.read_text() == text

    def test_a_failure_leaves_the_old_file_and_nothing_else(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("old")

        def fail(temporary):
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, fail)
        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]


def test_metadata_is_plain(state, tmp_path):
    """The file can be read without plait."""
    state.save(tmp_path / "x")
    with safetensors.safe_open(tmp_path / "x", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["lengths"]) == [6, 6]
    assert metadata["design"] == DESIGN.hash

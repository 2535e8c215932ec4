"""What callers of transformers hand to a model: read rightly, or refused with a word of what would be right."""

import pytest
import torch
from transformers import AutoTokenizer

import plait
from plait.data import ByteTokenizer
from plait.hub import PlaitCache, PlaitForCausalLM

INTEGERS = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
]
OTHERS = [torch.bool, torch.float32, torch.bfloat16, torch.complex64]
DOCUMENTS = [[3, 9, 27, 40], [7], [11, 2, 11, 2, 11, 2], [5, 5, 6], [8, 0], [1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_every_integer_dtype_are_the_same_ids(hub, dtype):
    model, ids = hub(), torch.tensor([[17, 3, 33, 0, 8]])
    labels = ids.clone()
    want = model(ids, labels=labels)
    got = model(ids.to(dtype), labels=labels.to(dtype))
    assert torch.equal(got.logits, want.logits)
    assert got.loss == want.loss
    options = {"max_new_tokens": 4, "do_sample": False}
    assert model.generate(ids.to(dtype), **options).tolist() == model.generate(ids, **options).tolist()


def test_documents_are_found_whatever_the_default_device_is(hub):
    model, ids, places = hub(), torch.tensor([[17, 3, 33, 0, 8]]), torch.tensor([[0, 1, 0, 1, 2]])
    want = model(ids, position_ids=places).logits
    with torch.device("meta"):
        assert torch.equal(model(ids, position_ids=places).logits, want)


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_ids_that_are_no_integers_are_refused(hub, dtype):
    model, ids = hub(), torch.tensor([[1, 0, 1]])
    for call in (
        lambda: model(ids.to(dtype)),
        lambda: model(ids, labels=ids.to(dtype)),
        lambda: model.generate(ids.to(dtype), max_new_tokens=2),
        lambda: model(ids, position_ids=ids.to(dtype)),
    ):
        with pytest.raises(ValueError, match=r"must be integers of shape \(batch, time\)"):
            call()


@pytest.mark.parametrize("shape", [(1, 0), (0, 4), (0, 0)])
def test_nothing_to_read_is_refused(hub, shape):
    model, nothing = hub(), torch.zeros(shape, dtype=torch.long)
    for call in (lambda: model(nothing), lambda: model.generate(nothing, max_new_tokens=2)):
        with pytest.raises(ValueError, match="at least one row of one token"):
            call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_ids": [[1, 2]]}, "input_ids must be a tensor of integers.*got list"),
        ({"input_ids": torch.arange(4)}, r"got \(4,\)"),
        ({"labels": torch.arange(5)[None]}, "labels must have input_ids' shape"),
        ({"labels": torch.tensor([[1, 2, 41, 3]])}, "label 41 is outside the vocabulary of 41"),
        ({"labels": torch.tensor([[1, -1, 4, 3]])}, "label -1 is outside .* not to be learned is -100"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, r"shape \(batch, time\)"),
        ({"attention_mask": [[1, 1, 1, 1]]}, r"shape \(batch, time\).*list"),
        ({"attention_mask": torch.ones(1, 9)}, "9 columns; expected 4"),
        ({"attention_mask": torch.ones(3, 4)}, "tokens' shape"),
        ({"token_type_ids": torch.zeros(1, 4)}, "does not take token_type_ids"),
        ({"cu_seq_lens_q": torch.tensor([0, 4]), "max_length_q": 4}, "cu_seq_lens_q, max_length_q.*position_ids"),
        ({"cache_position": torch.arange(3, 7)}, "cache_position must be 0 to 3"),
        ({"position_ids": torch.arange(4)[None].flip(1)}, "count each row's tokens"),
        ({"position_ids": torch.arange(4)[None] + 2}, "count each row's tokens"),
        ({"position_ids": torch.tensor([[0, 1, 0, 2]])}, "count each row's tokens"),
        ({"position_ids": torch.arange(3)[None]}, "position_ids must have input_ids' shape"),
        ({"position_ids": torch.tensor([[0, 1, 0, 1]]), "use_cache": True}, "leave no cache"),
    ],
)
def test_what_means_nothing_here_is_refused(hub, options, message):
    with pytest.raises(ValueError, match=message):
        hub()(**({"input_ids": torch.tensor([[4, 3, 2, 1]])} | options))


@pytest.mark.parametrize(
    "mask",
    [
        [1.0, 1.0, 2.0, 2.0],
        [0.0, 0.0, 0.0, -1e9],
        [0.0, 0.0, 0.0, float("-inf")],
        [1.0, float("nan"), 1.0, 1.0],
        [1.0, 0.5, 1.0, 1.0],
        [-1.0, 1.0, 1.0, 1.0],
        [3, 3, 3, 3],
    ],
)
def test_a_mask_of_anything_else_than_one_and_nought_is_refused(hub, mask):
    model, ids, mask = hub(), torch.tensor([[4, 3, 2, 1]]), torch.tensor([mask])
    for call in (lambda: model(ids, mask), lambda: model.model(ids, attention_mask=mask)):
        with pytest.raises(ValueError, match="expected 1 for tokens and 0 for padding"):
            call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float16, torch.float64], ids=str)
def test_a_mask_may_be_of_any_dtype(hub, dtype):
    model, ids = hub(), torch.tensor([[4, 3, 2, 1], [0, 0, 2, 1]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    torch.testing.assert_close(model(ids, mask.to(dtype)).logits, model(ids, mask).logits)


def packed():
    """The documents in two rows of equal width, and positions that start again at each."""
    rows = torch.tensor([sum(DOCUMENTS[:3], []), sum(DOCUMENTS[3:], [])])
    positions = [[i for document in part for i in range(len(document))] for part in (DOCUMENTS[:3], DOCUMENTS[3:])]
    return rows, torch.tensor(positions)


@pytest.mark.parametrize("pattern", ["DF AF", "[M|A]F", "GF"])
def test_packed_documents_are_the_documents_alone(hub, pattern):
    model = hub(pattern)
    rows, positions = packed()
    together = model(rows, position_ids=positions, labels=rows)
    assert together.past_key_values is None
    logits, total, count = [], 0.0, 0
    for document in DOCUMENTS:
        alone = model(torch.tensor([document]), labels=torch.tensor([document]))
        logits.append(alone.logits[0])
        total, count = total + alone.loss * (len(document) - 1), count + len(document) - 1
    torch.testing.assert_close(together.logits.flatten(0, 1), torch.cat(logits), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(together.loss, total / count, rtol=1e-9, atol=1e-9)


def test_positions_that_merely_count_change_nothing(hub):
    model = hub()
    ids, mask = torch.tensor([[9, 9, 4, 3, 2], [7, 6, 5, 4, 3]]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    tokens = mask.cumsum(1) - 1
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    want = model.generate(ids, **options).tolist()
    for positions in (tokens, tokens.masked_fill(mask == 0, 1), torch.arange(5)[None].expand(2, -1)):
        assert model.generate(ids, position_ids=positions, **options).tolist() == want
    cache = PlaitCache()
    for part in torch.arange(5).split([3, 2]):
        model(ids[1:, part], position_ids=part[None], cache_position=part, past_key_values=cache)
    with pytest.raises(ValueError, match="on from where it stands"):
        model(ids[1:, :2], position_ids=torch.arange(2)[None], past_key_values=cache)


def test_a_loss_over_nothing_is_nothing(hub):
    model, ids = hub("DF [M|A]F").train(), torch.arange(8)[None]
    ignored = torch.full_like(ids, -100)
    first = ignored.clone()
    first[0, 0] = 3  # nothing predicts it
    for options in (
        {"labels": ignored},
        {"labels": first},
        {"labels": ignored, "num_items_in_batch": 0},
        {"labels": ignored, "num_items_in_batch": torch.tensor(0)},
    ):
        model.zero_grad()
        loss = model(ids, **options).loss
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model(ids[:, :1], labels=ids[:, :1]).loss == 0


def test_stop_strings_and_what_else_generate_keeps_for_itself(tmp_path):
    model = plait.build(plait.ModelConfig(vocab=257, dim=64, pattern="AF", tie_embeddings=False))
    with torch.no_grad():  # says q for ever
        model.embed.weight[:, 0] = 50
        model.lm_head.weight.zero_()[ord("q"), 0] = 1
    plait.save(model, tmp_path, ByteTokenizer())
    reader, theirs = AutoTokenizer.from_pretrained(tmp_path), PlaitForCausalLM.from_pretrained(tmp_path)
    batch = reader("a", return_tensors="pt")
    output = theirs.generate(**batch, max_new_tokens=9, do_sample=False, stop_strings=["qqq"], tokenizer=reader)
    assert reader.decode(output[0]) == "aqqq"


def test_prompts_padded_on_the_right_are_refused(hub):
    with pytest.raises(ValueError, match="padding_side='left'"):
        hub().generate(
            torch.tensor([[1, 2, 3], [4, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]), max_new_tokens=2
        )


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": None}])
def test_drafts_cannot_be_taken_back(hub, options):
    model = hub()
    options = {name: model if value is None else value for name, value in options.items()}
    with pytest.raises(ValueError, match="a recurrent state cannot be cut back; generate without"):
        model.generate(torch.tensor([[1, 2, 1, 2]]), max_new_tokens=3, do_sample=False, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_recordings(hub):
    model, ids = hub("DF AF", dtype=torch.float32), torch.arange(12)[None]
    for call in (model, model.model):
        with pytest.raises(ValueError, match="use torch.compile, or torch.export for one length"):
            torch.jit.trace(call, (ids,))
    for strict, error in ((False, ValueError), (True, RuntimeError)):  # Dynamo tells a ValueError in one of its own
        with pytest.raises(error, match=r"gradients would be wrong: export after model\.requires_grad_\(False\)"):
            torch.export.export(model.model, (ids,), strict=strict)
    with torch.no_grad():
        once = torch.export.export(model.model, (ids,)).module()
        torch.testing.assert_close(once(ids)[0], model.model(ids)[0])
        with pytest.raises(ValueError, match="any length is not possible with layers D"):
            torch.export.export(model.model, (ids,), dynamic_shapes=({1: torch.export.Dim("t", min=2, max=64)},))


@pytest.mark.parametrize("pattern", ["DF A", "Rw Rf"])
def test_a_recording_of_frozen_weights_is_called_where_gradients_are_on(pattern, tmp_path):
    model = plait.build(plait.ModelConfig(vocab=64, dim=64, pattern=pattern)).requires_grad_(False)
    ids = torch.arange(12)[None]
    torch.export.save(torch.export.export(model, (ids,)), tmp_path / "model.pt2")
    logits, _ = torch.export.load(tmp_path / "model.pt2").module()(ids)
    torch.testing.assert_close(logits, model(ids)[0])

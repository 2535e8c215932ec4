"""Laws of tokenizers: lossless, the same after saving, the same in transformers, streamed = decoded at once."""

import json
import threading

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from plait.data import ByteTokenizer, DataError, NotFound, cached_bpe, load_tokenizer, open_source, train_bpe
from plait.data import texts as texts_of

END = "<|endoftext|>"
BYTE_LEVEL = ["bytes", "bpe"]
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
texts = st.one_of(
    words, st.lists(st.sampled_from(["é", "漢字", "👩‍👩‍👧", END, " ", "\r\n", "\0", "def f(x):"])).map("".join)
)


@pytest.fixture(scope="session")
def metaspace():
    """A tokenizer of the sentencepiece kind: spaces are part of tokens, unknown characters fall back to bytes."""
    vocab = {"</s>": 0, "<unk>": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}, "▁": 258}
    vocab |= {word: number for number, word in enumerate(["a", "b", "▁the", "é"], start=259)}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return inner


@pytest.fixture
def tokenizer(request, bpe, metaspace, tmp_path_factory):
    if request.param != "metaspace":
        return {"bytes": ByteTokenizer(), "bpe": bpe}[request.param]
    folder = tmp_path_factory.mktemp("metaspace")
    metaspace.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


over = pytest.mark.parametrize
anything = settings(deadline=None, max_examples=60, suppress_health_check=[])


@over("kind", BYTE_LEVEL)
@anything
@given(text=texts)
def test_encoding_loses_nothing(bpe, kind, text):
    tokenizer = {"bytes": ByteTokenizer(), "bpe": bpe}[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos not in ids
    assert all(0 <= id < tokenizer.vocab for id in ids)
    assert tokenizer.encode_batch([text, "", text])[0].tolist() == ids
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())


@over("kind", BYTE_LEVEL)
@anything
@given(data=st.data())
def test_streaming_is_decoding_of_any_ids(bpe, kind, data):
    tokenizer = {"bytes": ByteTokenizer(), "bpe": bpe}[kind]
    valid = data.draw(texts)
    noise = data.draw(st.lists(st.integers(0, tokenizer.vocab - 1), max_size=12))
    ids = [*tokenizer.encode(valid), *noise]
    stream = tokenizer.stream()
    parts = [stream.push(id) for id in ids]
    assert "".join(parts) + stream.finish() == tokenizer.decode(ids)
    for count in range(len(ids)):
        tokenizer.decode(ids[:count])  # partial ids never raise


@over("tokenizer", ["bytes", "bpe", "metaspace"], indirect=True)
def test_streaming_gives_text_as_soon_as_it_is_certain(tokenizer):
    stream = tokenizer.stream()
    text = "a the 漢 b"
    ids = tokenizer.encode(text)
    given_so_far = ""
    for count, id in enumerate(ids, start=1):
        given_so_far += stream.push(id)
        if "\ufffd" not in tokenizer.decode(ids[:count]):
            assert given_so_far == tokenizer.decode(ids[:count])
    assert given_so_far + stream.finish() == text
    assert "\ufffd" not in given_so_far


@pytest.fixture(scope="session")
def spaced(metaspace, bpe, tmp_path_factory):
    """Tokenizers by how they treat the space before a word."""
    words = tokenizers.Tokenizer(models.WordPiece(vocab={"[SEP]": 0, "a": 1, "the": 2, "##b": 3}, unk_token="[SEP]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    unigram = tokenizers.Tokenizer(
        models.Unigram([(word, -1.0) for word in ("<unk>", "</s>", "▁", "a", "▁the", "b", "▁a")], 0)
    )
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made = {"bytes": ByteTokenizer(), "bpe": bpe}
    for name, inner in (("metaspace", metaspace), ("wordpiece", words), ("unigram", unigram)):
        folder = tmp_path_factory.mktemp(name)
        inner.save(str(folder / "tokenizer.json"))
        made[name] = load_tokenizer(folder)
    return made


@over("kind", ["bytes", "bpe", "metaspace", "wordpiece", "unigram"])
@anything
@given(data=st.data())
def test_a_stream_after_ids_is_what_its_ids_add_to_their_text(spaced, kind, data):
    tokenizer = spaced[kind]
    before = tokenizer.encode(data.draw(st.sampled_from(["a", "the a", "a the a b", "the the "])))
    ids = tokenizer.encode(data.draw(st.sampled_from(["a b", "the", " the a ", "b漢a"])))
    end = data.draw(st.lists(st.sampled_from([tokenizer.eos]), max_size=1))
    stream = tokenizer.stream(before)
    parts = [stream.push(id) for id in [*end, *ids]]
    assert tokenizer.decode(before) + "".join(parts) + stream.finish() == tokenizer.decode([*before, *ids])
    assert tokenizer.stream(after=before).finish() == ""


HALVES = ["\ud800", "a\udc80b", "漢 \udfff", "\ud83d\ude00"]


@over("tokenizer", ["bytes", "bpe", "metaspace"], indirect=True)
@over("wrong", [*HALVES, None, b"a", 3], ids=range(7))
def test_what_is_no_text_is_refused_in_one_line(tokenizer, wrong):
    for encode in (
        lambda: tokenizer.encode(wrong),
        lambda: tokenizer.encode(wrong, special=True),
        lambda: tokenizer.encode_batch(["a", wrong]),
    ):
        with pytest.raises(
            DataError, match="half of a surrogate pair; expected|not UTF-8; expected|expected str"
        ) as caught:
            encode()
        assert "\n" not in str(caught.value)
        str(caught.value).encode()


@over("tokenizer", ["bytes", "bpe", "metaspace"], indirect=True)
@over("text", ["", "\0", "\ufeffa", "a\0b", "a" * 200_000, "漢" * 50_000], ids=len)
def test_odd_text_is_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode_batch([text])[0].tolist() == tokenizer.encode(text)


def test_a_bpe_of_odd_text():
    assert train_bpe(["a\ud800b", "\ud83d\ude00"], 300).hash == train_bpe(["a\ufffdb", "😀"], 300).hash
    assert train_bpe(["", "\0\ufeff", "b" * 300_000, "\n" * 300_000], 300).vocab > 257  # the square of this: minutes
    with pytest.raises(DataError, match="text is of type NoneType; expected str"):
        train_bpe(["a", None], 300)


@over(
    "size",
    [0, -1, 256, float("nan"), float("inf"), 300.0, True, None, "400", 1 << 40, 10**5000],
    ids=lambda size: type(size).__name__,
)
def test_sizes_that_no_bpe_has(tmp_path, size):
    for make in (lambda: train_bpe(["a"], size), lambda: cached_bpe("stdlib", size, tmp_path)):
        with pytest.raises(DataError, match="a byte-level BPE with vocab=.*: expected ") as caught:
            make()
        assert len(str(caught.value)) < 160
    assert list(tmp_path.iterdir()) == []


def test_a_bpe_is_trained_once_and_found_by_its_text(write, tmp_path):
    write("in/a.txt", "the cat sat on the mat\n" * 9), write("in/b.txt", "the dog\n" * 9)
    cache, made = tmp_path / "cache", []
    threads = [threading.Thread(target=lambda: made.append(cached_bpe(tmp_path / "in", 270, cache))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4
    assert {tokenizer.hash for tokenizer in made} == {train_bpe(texts_of(open_source(tmp_path / "in")), 270).hash}
    (folder,) = cache.glob("[!.]*")
    (tmp_path / "in").rename(tmp_path / "moved")
    assert cached_bpe(tmp_path / "moved", 270, cache).hash == made[0].hash
    assert list(cache.glob("[!.]*")) == [folder]
    (folder / "tokenizer.json").write_bytes(b"half")
    assert cached_bpe(tmp_path / "moved", 270, cache).hash == made[0].hash


@over("tokenizer", ["bytes", "bpe", "metaspace"], indirect=True)
def test_saved_is_the_same_here_and_in_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer

    folder = tmp_path / "saved"
    tokenizer.save(folder)
    loaded = load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert (loaded.hash, loaded.vocab, loaded.eos) == (tokenizer.hash, tokenizer.vocab, tokenizer.eos)
    assert theirs.eos_token_id == tokenizer.eos
    assert len(theirs) == tokenizer.vocab
    for text in ("a the b", " é漢字\n\n  x = 1 ", "naïve 👩‍👩‍👧"):
        ids = tokenizer.encode(text)
        assert loaded.encode(text) == ids
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert not list(folder.glob(".*"))


@over("kind", BYTE_LEVEL)
def test_special_tokens_are_text_unless_asked_for(bpe, kind):
    tokenizer = {"bytes": ByteTokenizer(), "bpe": bpe}[kind]
    ids = tokenizer.encode(f"a{END}b", special=True)
    assert ids == [*tokenizer.encode("a"), tokenizer.eos, *tokenizer.encode("b")]
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(tokenizer.encode(f"a{END}b")) == f"a{END}b"
    assert tokenizer.byte_lengths[tokenizer.eos] == 0


def test_byte_lengths_where_decoding_makes_the_spaces(tmp_path, metaspace):
    metaspace.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    lengths = {token: int(tokenizer.byte_lengths[id]) for token, id in metaspace.get_vocab().items()}
    assert (lengths["▁the"], lengths["a"], lengths["é"], lengths["<0xE6>"], lengths["</s>"]) == (4, 1, 2, 1, 0)

    words = tokenizers.Tokenizer(models.WordPiece(vocab={"[SEP]": 0, "a": 1, "the": 2, "##ing": 3}, unk_token="[SEP]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece()
    words.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).byte_lengths.tolist() == [0, 2, 4, 3]


def test_a_bpe_is_the_same_each_time_and_shorter_than_bytes(bpe):
    lines = ["the cat sat on the mat\n", "the other cat\n"] * 20
    first, second = (train_bpe(iter(lines), 300) for _ in range(2))
    assert first.hash == second.hash != bpe.hash
    assert first.vocab <= 300
    assert len(first.encode(lines[0])) < len(lines[0]) / 2
    assert train_bpe(["ab"], 5000).vocab < 300  # no more merges than the text has
    for wrong, message in ((([], 300), "no text"), ((["a"], 256), "at least 257")):
        with pytest.raises(DataError, match=message):
            train_bpe(*wrong)


def test_where_the_end_of_text_is_said(bpe, tmp_path):
    bpe.save(tmp_path)
    config = tmp_path / "tokenizer_config.json"

    def end():
        return load_tokenizer(tmp_path).eos

    config.write_text(json.dumps({"eos_token": {"content": "a"}}))
    assert end() == bpe.encode("a")[0]
    assert load_tokenizer(tmp_path).byte_lengths[end()] == 0
    config.write_text(json.dumps({"eos_token": "<no such token>"}))
    with pytest.raises(DataError, match="'<no such token>' is not in its vocabulary"):
        end()
    config.unlink()
    assert end() == bpe.eos  # by its usual name
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert end() == 7
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "b"}))
    assert end() == bpe.encode("b")[0]


def test_a_folder_is_kept_as_it_was(bpe, tmp_path):
    bpe.save(tmp_path / "a")
    config = json.loads((tmp_path / "a/tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (tmp_path / "a/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "a/chat_template.jinja").write_text("{{ messages }}")
    load_tokenizer(tmp_path / "a/tokenizer.json").save(tmp_path / "run/tokenizer")
    assert load_tokenizer(tmp_path / "run").hash == bpe.hash
    assert json.loads((tmp_path / "run/tokenizer/tokenizer_config.json").read_text())["model_max_length"] == 77
    assert (tmp_path / "run/tokenizer/chat_template.jinja").read_text() == "{{ messages }}"


def test_padding_and_truncation_saved_in_a_tokenizer_do_not_touch_a_corpus(bpe, tmp_path):
    bpe.save(tmp_path)
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode("one two three four five six") == bpe.encode("one two three four five six")


def test_a_tokenizer_without_tokenizer_json_comes_through_transformers(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    text = "naïve 漢字 </s>"
    ids = tokenizer.encode(text)
    assert tokenizer.eos not in ids
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.byte_lengths[ids].sum()) == len(text.encode())
    assert tokenizer.encode_batch([text])[0].tolist() == ids
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == text
    tokenizer.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").hash == tokenizer.hash


def test_no_code_that_came_with_a_folder_is_offered_to_be_run(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    auto = {"AutoTokenizer": ["theirs.Theirs", None], "AutoConfig": "theirs.Config"}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "theirs", "auto_map": auto}), encoding="utf-8")
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')", encoding="utf-8")
    with pytest.raises(DataError, match="no tokenizer.json, and transformers cannot load this tokenizer"):
        load_tokenizer(tmp_path)
    assert not asked


def test_wrong_tokenizers_say_what_was_expected(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound, match="'byts': no such file.*did you mean 'bytes'"):
        load_tokenizer("byts")
    with pytest.raises(FileNotFoundError, match="no tokenizer in this folder; expected a tokenizer.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a Hugging Face tokenizer.json"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[])).save("tokenizer.json")
    with pytest.raises(DataError, match="no end-of-text token; expected an eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="transformers cannot load this tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_bytes("{}".encode("utf-16"))
    with pytest.raises(DataError, match="tokenizer.json: UTF-16 text; expected UTF-8 text"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="tokenizer_config.json: JSON that cannot be read"):
        load_tokenizer(tmp_path)
    for id in (-1, 257):
        with pytest.raises(DataError, match="0 to 256"):
            ByteTokenizer().decode([id])


def test_marks_of_byte_order_in_a_tokenizers_files(bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path / "saved")
    for path in (tmp_path / "saved").iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    loaded = load_tokenizer("~/saved")
    assert loaded.hash == bpe.hash
    loaded.save("~/again")
    assert load_tokenizer(tmp_path / "again").hash == bpe.hash


def test_ids_may_be_numpy_or_torch_numbers(bpe):
    import torch

    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode("né")
        assert tokenizer.decode(np.array(ids)) == tokenizer.decode(torch.tensor(ids)) == "né"

"""Designs as data: what goes in comes out, defaults follow from dim, and mistakes are named."""

import json
import subprocess
import sys

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import plait
from plait.design import PRESETS, ModelConfig, load_design
from plait.design.layers import KINDS, LETTERS
from plait.design.merges import MERGE_KINDS

sizes = st.integers(1, 4)
layers = {
    "A": st.builds(
        lambda keys, times, dim, **rest: plait.Attention(heads=keys * times, kv_heads=keys, head_dim=2 * dim, **rest),
        sizes,
        sizes,
        sizes,
        window=st.none() | sizes,
        rope=st.none()
        | st.builds(plait.RoPE, theta=st.sampled_from([1e4, 1e6]), fraction=st.sampled_from([0.25, 1.0])),
        qk_norm=st.sampled_from([False, True, "wide"]),
        output_gate=st.booleans(),
        softcap=st.none() | st.just(30.0),
        bias=st.booleans(),
    ),
    "M": st.builds(plait.Mamba2, head_dim=st.sampled_from([16, 32]), state_dim=sizes, conv_bias=st.booleans()),
    "D": st.builds(
        lambda heads, times: plait.GatedDeltaNet(heads=heads, head_dim=8, value_heads=heads * times), sizes, sizes
    ),
    "G": st.builds(
        plait.GRU,
        heads=sizes,
        head_dim=sizes,
        recurrence=st.sampled_from(["diagonal", "heads", "dense"]),
        conv_width=st.none() | sizes,
        gate_bias=st.sampled_from([0.0, 1, (0.0, 3.0), [1, 2]]),
        clip=st.none() | st.just(0.5),
    ),
    "H": st.builds(plait.LSTM, coupled=st.booleans(), peephole=st.booleans(), recurrent_bias=st.booleans()),
    "S": st.builds(plait.SLSTM, output_gate=st.booleans(), solver=st.sampled_from(["shooting", "sequential"])),
    "F": st.one_of(
        *(st.builds(kind, hidden=st.none() | sizes, bias=st.booleans()) for kind in (plait.SwiGLU, plait.GELU))
    ),
}
merges = st.one_of(*(st.builds(kind, branch_norm=st.booleans()) for kind in MERGE_KINDS.values()))
designs = st.builds(
    ModelConfig,
    vocab=sizes,
    dim=st.sampled_from([64, 128, 192]),
    pattern=st.sampled_from(["AF", "(MF)2 [M|A]F", "[MF|A]:gated D", "GF [H|A] S"]),
    layers=st.fixed_dictionaries({}, optional=layers),
    merge=merges,
    norm=st.builds(plait.RMSNorm, zero_centered=st.booleans()),
    tie_embeddings=st.booleans(),
)


def everywhere(design):
    """The design after a trip through each kind of file."""
    data = design.to_dict()
    assert json.loads(json.dumps(data)) == data
    yield ModelConfig.from_dict(data)
    yield ModelConfig.from_dict(json.loads(json.dumps(data)))
    yield ModelConfig.from_dict(yaml.safe_load(yaml.safe_dump(data)))


@given(designs)
@settings(deadline=None)
def test_data_in_is_data_out(design):
    for copy in everywhere(design):
        assert copy == design
        assert copy.hash == design.hash
        assert copy.to_dict() == design.to_dict()


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name, tmp_path):
    design = load_design(name)
    for copy in everywhere(design):
        assert copy == design
    for path, text in (("d.json", json.dumps(design.to_dict())), ("d.yaml", yaml.safe_dump(design.to_dict()))):
        (tmp_path / path).write_text(text)
        assert load_design(tmp_path / path) == design


def test_the_example_of_the_documentation():
    design = plait.ModelConfig(
        vocab=32_000,
        dim=768,
        pattern="((DF)3 AF)6",
        layers={"D": plait.GatedDeltaNet(heads=6, head_dim=128), "A": plait.Attention(heads=12, kv_heads=4)},
    )
    assert len(design.slots) == 48
    assert [slot.address for slot in design.slots[:8]] == ["D#0", "F#0", "D#1", "F#1", "D#2", "F#2", "A#0", "F#3"]
    assert design.place("A#0").layer.head_dim == 64


def test_addresses_count_letters_inside_branches():
    design = ModelConfig(vocab=5, dim=64, pattern="A [M|A]F [M|A] A")
    assert [slot.address for slot in design.slots] == ["A#0", "par#0", "F#0", "par#1", "A#3"]


@pytest.mark.parametrize("dim", range(64, 1025, 64))
@pytest.mark.parametrize("letter", LETTERS)
def test_defaults_fit_any_multiple_of_64(letter, dim):
    layer = ModelConfig(vocab=5, dim=dim, pattern=letter).slots[0].layer
    for name in ("heads", "head_dim", "kv_heads", "hidden", "value_heads", "value_head_dim"):
        if name in layer.__struct_fields__:
            assert getattr(layer, name) > 0


def test_hash_is_of_what_is_built():
    short = ModelConfig(vocab=5, dim=64, pattern="(MF)2")
    assert ModelConfig(vocab=5, dim=64, pattern="MF MF").hash == short.hash
    assert short.replace(layers={"M": plait.Mamba2(heads=2)}).hash == short.hash  # what is derived anyway
    assert short.replace(layers={"A": plait.Attention(heads=2)}).hash == short.hash  # not in the pattern
    plain, other = (plait.GRU(**options) for options in ({}, {"solver": "sequential", "tol": 1e-3, "strict": True}))
    recurrent = short.replace(pattern="G")
    assert recurrent.replace(layers={"G": other}).hash == recurrent.replace(layers={"G": plain}).hash  # how, not what
    assert recurrent.replace(layers={"G": plait.GRU(clip=0.5)}).hash != recurrent.hash
    for change in (
        {"dim": 128},
        {"pattern": "MFF"},
        {"layers": {"M": plait.Mamba2(state_dim=16)}},
        {"tie_embeddings": False},
    ):
        assert short.replace(**change).hash != short.hash


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"vocab": 5, "dim": 64}, "'pattern' is missing"),
        ({"vocab": 5, "dim": 64, "patern": "AF"}, "design: unknown key 'patern'; did you mean 'pattern'?"),
        ({"pattern": "AY"}, "pattern 'AY', column 2: no layer is bound to 'Y'"),
        (
            {"layers": {"A": {"kind": "attention", "head": 4}}},
            "layers.A (attention): unknown key 'head'; did you mean 'heads'?",
        ),
        ({"layers": {"A": {"kind": "atention"}}}, "layers.A: unknown kind 'atention'; did you mean 'attention'?"),
        ({"layers": {"A": {"heads": 4}}}, "layers.A: expected a mapping with a 'kind', one of attention,"),
        ({"layers": {"A": {"kind": "attention", "rope": {"tetha": 1}}}}, "did you mean 'theta'?"),
        ({"merge": "gatet"}, "merge: unknown kind 'gatet'; did you mean 'gated'?"),
        ({"norm": {"epsilon": 1}}, "norm (rms_norm): unknown key 'epsilon'; did you mean 'eps'?"),
        ({"vocab": "many"}, "vocab: expected a whole number, got 'many'"),
        ({"vocab": 0}, "ModelConfig.vocab must be above 0, got 0"),
        ({"dim": 70}, "layer 'A': Attention: dim 70 is not a multiple of head_dim 64, so heads must be given"),
        ({"layers": {"A#0": "gru"}}, "layers: 'A#0' is no letter of a pattern, which is a capital"),
        ({"layers": {"a": "gru"}}, "layers: 'a' is no letter of a pattern"),
        ({"layers": {"AF": "gru"}}, "layers: 'AF' is no letter of a pattern"),
        ({"layers": {"A": {"kind": "attention", "heads": 5}}}, "heads 5 do not divide dim 64"),
        ({"layers": {"A": {"kind": "attention", "heads": 4, "kv_heads": 3}}}, "kv_heads 3 does not divide heads 4"),
        (
            {"layers": {"A": {"kind": "attention", "heads": 2, "head_dim": 7}}},
            "head_dim 7 is odd, which RoPE cannot turn",
        ),
        (
            {"layers": {"A": {"kind": "attention", "rope": {"fraction": 1.5}}}},
            "RoPE.fraction must be in (0, 1], got 1.5",
        ),
        ({"layers": {"A": {"kind": "attention", "prefix": 3}}}, "without one all are seen"),
        ({"layers": {"A": {"kind": "attention", "window": 8, "prefix": -1}}}, "0 or more; got -1"),
        (
            {"layers": {"A": {"kind": "attention", "rope": {"scaling": "dynamic"}}}},
            "'ntk' with the factor of the longest",
        ),
        ({"layers": {"A": {"kind": "attention", "rope": {"scaling": {"kind": "yarm"}}}}}, "did you mean 'yarn'?"),
        (
            {
                "layers": {
                    "A": {
                        "kind": "attention",
                        "rope": {"theta": 1, "scaling": {"kind": "yarn", "factor": 2, "original": 9}},
                    }
                }
            },
            "RoPE.theta must be above 1 for yarn",
        ),
        (
            {"layers": {"A": {"kind": "attention", "rope": {"scaling": {"kind": "llama3", "low": 4}}}}},
            "Llama3.high 4.0 must be above low 4.0",
        ),
        ({"layers": {"A": {"kind": "attention", "temperature": {"every": 0}}}}, "Temperature.every must be above 0"),
        (
            {"pattern": "L", "layers": {"L": {"kind": "latent_attention", "rope_dim": 7}}},
            "rope_dim 7 is odd, which RoPE cannot turn",
        ),
        (
            {"pattern": "L", "layers": {"L": {"kind": "latent_attention", "nope_dim": 48}}},
            "not a multiple of nope_dim 48, so heads must be given",
        ),
        (
            {"pattern": "L", "dim": 48},
            "LatentAttention: dim 48 is not a multiple of 64, so heads and nope_dim must be given",
        ),
        (
            {"pattern": "L", "layers": {"L": {"kind": "latent_attention", "heads": 100}}},
            "LatentAttention: heads 100 are more than dim 64; change heads or give nope_dim",
        ),
        (
            {"pattern": "L", "layers": {"L": {"kind": "latent_attention", "nope_dim": 1}}},
            "rope_dim 1 is odd, which RoPE cannot turn",
        ),
        (
            {"pattern": "M", "layers": {"M": {"kind": "mamba2", "groups": 3, "heads": 4}}},
            "groups 3 does not divide heads 4",
        ),
        (
            {"pattern": "M", "layers": {"M": {"kind": "mamba2", "head_dim": 60}}},
            "not a multiple of head_dim 60; give heads",
        ),
        (
            {"pattern": "D", "layers": {"D": {"kind": "gated_deltanet", "heads": 2, "value_heads": 3}}},
            "heads 2 does not divide value_heads 3",
        ),
        (
            {"pattern": "G", "layers": {"G": {"kind": "gru", "heads": 6}}},
            "GRU: heads 6 do not divide dim 64; change heads or give head_dim",
        ),
        (
            {"pattern": "S", "layers": {"S": {"kind": "slstm", "head_dim": 24}}},
            "not a multiple of head_dim 24, so heads must be given",
        ),
        (
            {"pattern": "G", "layers": {"G": {"kind": "gru", "heads": 3, "head_dim": 8, "projection": "heads"}}},
            "GRU: heads 3 do not divide dim 64, which projection 'heads' needs",
        ),
        (
            {"layers": {"H": {"kind": "lstm", "recurrence": "diag"}}},
            "layers.H (lstm).recurrence: 'diag' does not exist; did you mean 'diagonal'?",
        ),
        ({"layers": {"H": {"kind": "lstm", "clip": -1.0}}}, "layers.H (lstm): LSTM.clip must be above 0"),
        ({"at": {"A#0": {"window": 0}}}, "at.A#0 (attention): Attention.window must be above 0, got 0"),
        ({"layers": {"R": {"kind": "rnn", "gate_bias": 1.0}}}, "RNN has no gate that keeps, so gate_bias must be 0"),
        ({"layers": {"E": {"kind": "moe", "top_k": 9}}}, "MixtureOfExperts.top_k 9 is more than the experts 8"),
        ({"layers": {"E": {"kind": "moe", "groups": 3}}}, "MixtureOfExperts.groups 3 does not divide experts 8"),
        ({"layers": {"E": {"kind": "moe", "groups": 8}}}, "groups 8 leaves one expert in each; give at most 4"),
        ({"layers": {"E": {"kind": "moe", "groups": 4, "top_groups": 5}}}, "top_groups 5 is more than groups 4"),
        (
            {"layers": {"E": {"kind": "moe", "groups": 4, "top_groups": 1, "top_k": 3}}},
            "MixtureOfExperts.top_k 3 is more than the experts in 1 of 4 groups, 2",
        ),
        (
            {"layers": {"E": {"kind": "moe", "shared_gate": True}}},
            "shared_gate is of a shared expert; give shared_hidden",
        ),
        ({"layers": {"E": {"kind": "moe", "z_loss": -1.0}}}, "MixtureOfExperts.z_loss must be between 0 and 1,000"),
        ({"layers": {"E": {"kind": "moe", "router": "softmux"}}}, "'softmux' does not exist; did you mean 'softmax'?"),
        ({"pattern": "S", "dim": 70}, "SLSTM: dim 70 is not a multiple of 64, so heads and head_dim must be given"),
    ],
)
def test_mistakes_are_named(data, message):
    if "missing" not in message and "patern" not in message:
        data = {"vocab": 5, "dim": 64, "pattern": "AF"} | data
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        ModelConfig.from_dict(data)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_constructors_find_the_same_mistakes():
    with pytest.raises(ValueError, match="Attention: unknown key 'head'; did you mean 'heads'"):
        plait.Attention(head=4)
    with pytest.raises(TypeError, match="named values only"):
        plait.Attention(4)
    with pytest.raises(AttributeError):
        plait.Attention().heads = 3


def test_kinds_are_the_tags():
    for kinds in (KINDS, MERGE_KINDS):
        for name, kind in kinds.items():
            assert kind().to_dict() == {"kind": name}


class TestLoad:
    def test_pattern(self):
        assert load_design("(MF)3 AF", dim=768).dim == 768

    def test_overrides_reach_in(self):
        design = load_design("tiny", **{"layers.A.kind": "attention", "layers.A.heads": 4, "norm.eps": 1e-5})
        assert design.place("A#0").layer.heads == 4
        assert design.norm.eps == 1e-5
        assert "layers" not in PRESETS["tiny"]

    def test_override_of_a_number(self):
        with pytest.raises(ValueError, match="'dim' is 128, which has no fields"):
            load_design("tiny", **{"dim.x": 3})

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("tinny", "no preset, file or pattern 'tinny'; did you mean 'tiny'"),
            ("small-hybird", "did you mean 'small-hybrid'"),
            ("(MF", "column 4: missing"),
        ],
    )
    def test_unknown(self, spec, message):
        with pytest.raises(ValueError, match=message.replace("(", r"\(")):
            load_design(spec)

    def test_a_path_is_no_misspelt_preset(self):
        with pytest.raises(FileNotFoundError, match=r"runs/rnu: no such file or folder; expected a preset"):
            load_design("runs/rnu")

    def test_a_pattern_in_brackets_wants_quotes(self, tmp_path):
        (tmp_path / "a.yaml").write_text("pattern: [D|A]F\n")
        with pytest.raises(
            ValueError, match=r"a.yaml: cannot be read as YAML: line 1, .*; a pattern that begins with \[ wants quotes"
        ):
            load_design(tmp_path / "a.yaml")

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="no such file"):
            load_design(tmp_path / "no.yaml")
        for name, text in (("a.yaml", "a: [1"), ("a.json", "{"), ("b.yaml", "3")):
            (tmp_path / name).write_text(text)
            with pytest.raises(ValueError, match=name) as caught:
                load_design(tmp_path / name)
            assert "\n" not in str(caught.value)
        (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
        with pytest.raises(ValueError, match="binary.yaml"):
            load_design(tmp_path / "binary.yaml")

    def test_folder_of_a_saved_model(self, tmp_path):
        data = load_design("tiny").to_dict()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "plait", "design": data}))
        assert load_design(tmp_path) == load_design("tiny")


@pytest.mark.parametrize(
    "script",
    ["import plait", "from plait.design.summary import summary; import plait; summary(plait.load_design('tiny'))"],
)
def test_designs_need_no_torch(script):
    check = "; import sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script + check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_all_names_exist():
    for name in dir(plait):
        getattr(plait, name)
    with pytest.raises(AttributeError, match="no attribute 'biuld'"):
        plait.biuld  # noqa: B018 (the access is the test)

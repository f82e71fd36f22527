"""Which layers a pattern finds, and how a base model is told from another."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForQuestionAnswering,
    WhisperConfig,
    WhisperForAudioClassification,
)
from transformers.pytorch_utils import Conv1D

from sylva_train._checks import ConfigError, TargetError
from sylva_train.config import SylvaConfig
from sylva_train.importance import score
from sylva_train.targets import (
    check_block_size,
    exclusion,
    find_targets,
    fingerprint,
    is_inside,
    is_supported,
    shared_inputs,
    weight_view,
)
from tests.sylva_train.models import ARCHITECTURES, T5, make_batch, make_model

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}

WHISPER = {
    "d_model": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 28,
    "num_mel_bins": 8,
    "max_source_positions": 8,
}

#: linear layers of each backbone: per layer, and outside the layers
LINEAR = {
    "bert": 2 * 6 + 1,
    "roberta": 2 * 6,
    "gpt2": 2 * 4,
    "gpt2-classifier": 2 * 4,
    "llama": 2 * 7,
    "qwen2": 2 * 7,
    "mistral": 2 * 7,
    "t5": 2 * 6 + 2 * 10,
}


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("bert", [["query", "key", "value"]]),
        ("llama", [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]),
        ("gpt2", []),
    ],
)
def test_layers_that_read_one_tensor_are_found(name, groups):
    model = make_model(name)
    found = shared_inputs(model, make_batch(name))
    ends = [[layer.rpartition(".")[2] for layer in names] for names in found]
    assert ends == groups * 2  # in each of the two layers
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_is_the_backbone_without_the_head(name):
    model = make_model(name)
    found = find_targets(model)
    assert len(found) == LINEAR[name]
    head = ARCHITECTURES[name][2]
    assert not any(layer.startswith(head) for layer in found)
    order = [n for n, _ in model.named_modules()]
    assert list(found) == sorted(found, key=order.index)
    assert find_targets(model, None).keys() == found.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_patterns_are_endings_of_names(name):
    model = make_model(name)
    patterns = ARCHITECTURES[name][3]
    found = find_targets(model, patterns)
    for layer in find_targets(model, "all-linear"):
        fits = any(layer.endswith(f".{p}") for p in patterns)
        assert (layer in found) == fits


def nested():
    """Names that are endings, and beginnings, of others."""
    block = nn.ModuleDict({"q": nn.Linear(4, 4), "xq": nn.Linear(4, 4)})
    return nn.ModuleDict({"q": nn.Linear(4, 4), "block": block, "blocks": nn.ReLU()})


def test_a_name_is_not_the_ending_of_a_word():
    model = nested()
    assert list(find_targets(model, ["q"])) == ["q", "block.q"]
    assert list(find_targets(model, ["block.q"])) == ["block.q"]
    assert list(find_targets(model, ["xq"])) == ["block.xq"]
    assert list(find_targets(model, r"block\..*")) == ["block.q", "block.xq"]
    assert list(find_targets(model, "q")) == ["q"]
    assert list(find_targets(model, ["q"], ["block.q"])) == ["q"]
    assert list(find_targets(model, "all-linear", r".*\.x.*")) == ["q", "block.q"]
    assert is_inside("head.dense", ["head"])
    assert is_inside("a.myhead", ["head"])  # as PEFT does
    assert not is_inside("a.header", ["head"])
    assert not is_inside("a", None)


def test_a_pattern_that_finds_nothing_says_what_there_is():
    with pytest.raises(TargetError, match="'classifier', 'dense', 'key'"):
        find_targets(make_model("bert"), ["quarry"])
    with pytest.raises(TargetError, match="`exclude_modules`"):
        find_targets(nested(), ["q"], ["q"])
    with pytest.raises(TargetError, match="no linear layer at all"):
        find_targets(nn.Sequential(nn.ReLU()))


@pytest.mark.parametrize("pattern", [["pooler"], "pooler", "all-linear"])
def test_leaving_out_what_is_not_there_is_refused(pattern):
    model = make_model("bert")
    assert "pooler.dense" in str(list(find_targets(model)))
    with pytest.raises(TargetError, match="matches no linear layer"):
        find_targets(model, exclude_modules=pattern)
    assert "pooler" not in str(list(find_targets(model, exclude_modules=r".*pooler.*")))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["query", "valeu"]},
        {"target_modules": ["query", "value"], "exclude_modules": ["query", "valeu"]},
    ],
)
def test_a_misspelt_name_among_others_is_warned_of(options):
    config = SylvaConfig(importance="magnitude", block_size=8, **options)
    with pytest.warns(UserWarning, match="'valeu', which no module"):
        score(make_model(), config=config)


def test_a_pattern_that_is_no_regular_expression_is_refused():
    with pytest.raises(ConfigError, match=r"'\(a' is not a regular expression"):
        find_targets(nested(), "(a")


def test_a_match_that_cannot_hold_blocks_is_named():
    with pytest.raises(TargetError, match=r"word_embeddings`, a Embedding"):
        find_targets(make_model("bert"), ["word_embeddings"])
    assert not find_targets(make_model("bert")).keys() & {"bert.embeddings"}


def test_tied_weights_are_refused():
    model = GPT2LMHeadModel(
        GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=8)
    )
    assert "lm_head" not in find_targets(model)
    with pytest.raises(TargetError, match=r"tied weights.*tie_word_embeddings=False"):
        find_targets(model, ["lm_head"])


def test_only_dense_floating_point_weights_are_supported():
    integer = nn.Linear(4, 4)
    integer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), False)
    normed = parametrizations.weight_norm(nn.Linear(4, 4))
    attention = nn.MultiheadAttention(4, 1)
    assert is_supported(nn.Linear(4, 4))
    assert is_supported(Conv1D(4, 4))
    assert not any(
        map(is_supported, [integer, normed, attention.out_proj, nn.Conv1d(4, 4, 1)])
    )
    with pytest.raises(TargetError, match="0"):
        find_targets(nn.Sequential(integer), ["0"])
    assert not find_targets(nn.ModuleList([attention, nn.Linear(2, 2)])).keys() & {
        "0.out_proj"
    }


def test_a_weight_view_is_out_by_in_and_shares_memory():
    for module in (nn.Linear(3, 5), Conv1D(5, 3)):
        view = weight_view(module)
        assert view.shape == (5, 3)
        x = torch.randn(2, 3)
        bias = module.bias.detach()
        assert torch.allclose(module(x).detach(), x @ view.T + bias, atol=1e-6)
        view.zero_()
        assert not module.weight.any()


def test_a_block_fits_its_layer():
    targets = {"a": nn.Linear(8, 3), "b": nn.Linear(2, 9)}
    check_block_size(targets, 2)
    with pytest.raises(ConfigError, match=r"`a` of shape \(3, 8\) and 1 other.*most 2"):
        check_block_size(targets, 4)
    with pytest.raises(ConfigError, match=r"`b` of shape \(9, 2\); take at most 2"):
        check_block_size(targets, 3)
    gates = {f"{i}.gate": nn.Linear(8, 1) for i in range(30)}
    with pytest.raises(
        ConfigError, match=r"s; or leave .*`exclude_modules=\['gate'\]`"
    ):
        check_block_size(gates | {"a": nn.Linear(8, 8)}, 2)


def test_layers_are_left_out_by_endings_that_no_other_has():
    names = ["0.mlp.gate", "1.mlp.gate", "0.k", "1.k", "1.v"]
    assert exclusion(names[:2], names) == "`exclude_modules=['gate']`"
    some = exclusion(["1.k", "1.v"], names)
    assert some == "`exclude_modules=['1.k', 'v']`"
    assert find_targets(
        nn.ModuleDict(
            {"0": nn.ModuleDict({"k": nn.Linear(2, 2)}), "k": nn.Linear(2, 2)}
        ),
        exclude_modules=["0.k"],
    ).keys() == {"k"}
    assert exclusion(["mlp.0.0"], ["mlp.0.0", "a"]) == "`exclude_modules=['mlp.0.0']`"
    many = [f"layers.{i}.gate{i}" for i in range(15)]
    stay = [f"layers.{i}.k" for i in range(15)]
    assert exclusion(many, [*many, *stay]).endswith("'gate11']` and 3 more")


def test_a_tower_is_left_out_by_its_name():
    """Its layers are called like the language model's, and there may be hundreds."""

    def tower():
        return nn.ModuleList(nn.ModuleDict({"k": nn.Linear(2, 2)}) for _ in range(13))

    model = nn.ModuleDict(
        {"text": tower(), "vision": nn.ModuleDict({"tower": tower()})}
    )
    targets = find_targets(model)
    lost = [name for name in targets if name.startswith("vision")]
    advice = exclusion(lost, targets)
    assert advice == r'`exclude_modules=r"vision\..*"`'
    pattern = advice.split('"')[1]
    assert set(find_targets(model, exclude_modules=pattern)) == set(targets) - set(lost)


@pytest.mark.parametrize(
    ("kind", "config", "head"),
    [
        (
            CLIPForImageClassification,
            lambda: CLIPConfig(vision_config=TOWER),
            "classifier",
        ),
        (T5ForQuestionAnswering, lambda: T5Config(**T5), "qa_outputs"),
        (
            WhisperForAudioClassification,
            lambda: WhisperConfig(**WHISPER, classifier_proj_size=8),
            "projector",
        ),
        (
            WhisperForAudioClassification,
            lambda: WhisperConfig(**WHISPER, classifier_proj_size=8),
            "classifier",
        ),
    ],
)
def test_a_head_is_one_where_the_class_holds_parts_of_its_backbone(kind, config, head):
    """Their `base_model_prefix` names nothing that they have."""
    model = kind(config())
    assert model.base_model is model
    assert head in dict(model.named_modules())
    assert head not in find_targets(model)
    assert fingerprint(model) == fingerprint(copy_with_new(model, head))


def test_a_language_model_inside_another_keeps_its_head():
    """It was chosen for blocks, or refused as tied, where the outer class names none."""
    text = {"vocab_size": 40, "encoder_hidden_size": 16, "max_position_embeddings": 16}
    config = BlipConfig(vision_config=TOWER, text_config=TOWER | text)
    model = BlipForConditionalGeneration(config)
    assert model.get_output_embeddings() is None
    found = find_targets(model)
    assert "text_decoder.bert.encoder.layer.0.output.dense" in found
    assert "vision_model.encoder.layers.0.mlp.fc1" in found
    assert not [name for name in found if "predictions" in name]
    head = "text_decoder.cls.predictions.transform.dense"
    assert fingerprint(model) == fingerprint(copy_with_new(model, head))


def test_what_has_its_weight_from_the_head_is_of_the_head():
    """D-FINE's decoder has the detector's layers, made anew for other classes."""
    model = nn.ModuleDict({"model": nn.ModuleDict(), "head": nn.Linear(4, 4)})
    model["model"].update({"k": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    model["model"]["head"].weight = model["head"].weight
    object.__setattr__(model, "base_model", model["model"])
    assert find_targets(model).keys() == {"model.k"}


def test_what_a_model_without_linear_layers_has_is_named():
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "embedding_size": 8}
    model = ResNetForImageClassification(ResNetConfig(**sizes))
    with pytest.raises(
        TargetError,
        match=r"end in '1', and belong to the task's head.* of Conv2d cannot",
    ):
        find_targets(model)
    with pytest.raises(
        TargetError, match="'all-linear'; it has no linear layer at all"
    ):
        find_targets(nn.ReLU())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(4, 4), r"itself a Linear.*`nn\.Sequential\(model\)`"),
        (lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 4))), "is in TorchScript"),
        (lambda: nn.Sequential(nn.LazyLinear(4)), r"`0\.weight` has no shape yet: run"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64)),
            "'all-linear'; weights of Linear cannot hold blocks",
        ),
    ],
)
def test_odd_modules_are_refused_for_what_they_are(make, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lazy modules and TorchScript are old
        model = make()
    with pytest.raises(TargetError, match=words):
        score(model, config=SylvaConfig(importance="magnitude", block_size=4))


def copy_with_new(model, head):
    copied = copy.deepcopy(model)
    nn.init.normal_(copied.get_submodule(head).weight)
    return copied


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fingerprint_is_of_the_base_not_of_the_head(name):
    model, head = make_model(name), ARCHITECTURES[name][2]
    first = fingerprint(model, [head])
    assert first == fingerprint(make_model(name), [head])
    assert first != fingerprint(make_model(name, seed=1), [head])
    for parameter in model.get_submodule(head).parameters():
        parameter.data += 1
    assert fingerprint(model, [head]) == first
    if name != "t5":  # whose entry here is not a head
        assert fingerprint(model) == first


def test_any_bit_that_bfloat16_keeps_counts():
    model = make_model("bert")
    first = fingerprint(model)
    assert fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == first
    query = model.bert.encoder.layer[1].attention.self.query
    with torch.no_grad():
        query.weight[3, 4] *= 1.02
    assert fingerprint(model) != first
    assert fingerprint(model, ["self.query"]) == fingerprint(
        make_model("bert"), ["self.query"]
    )
    with torch.no_grad():
        query.weight.copy_(
            make_model("bert").bert.encoder.layer[1].attention.self.query.weight.t()
        )
    assert fingerprint(model) != first


def test_one_backbone_under_two_heads_of_the_same_body():
    config = BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, num_labels=2,
    )  # fmt: skip
    torch.manual_seed(0)
    two = BertForSequenceClassification(config)
    config = copy.deepcopy(config)
    config.num_labels = 5
    five = BertForSequenceClassification(config)
    five.bert.load_state_dict(two.bert.state_dict())
    assert fingerprint(two) == fingerprint(five)
    # Other names, so another base: an adapter would not find its layers.
    assert fingerprint(two.bert) != fingerprint(two)
    assert "cls.predictions.decoder" not in find_targets(BertForMaskedLM(config))
    assert find_targets(BertModel(config)).keys() == {
        name.removeprefix("bert.") for name in find_targets(two)
    }


def test_shapes_and_integers_count_and_meta_tensors_are_survived():
    a, b = nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False)
    b.weight.data = a.weight.data.reshape(2, 3)
    assert fingerprint(a) != fingerprint(b)
    norm = nn.BatchNorm1d(2)
    first = fingerprint(norm)
    norm.num_batches_tracked += 1
    assert fingerprint(norm) != first
    assert fingerprint(nn.Linear(2, 3, device="meta")) != fingerprint(nn.Linear(2, 3))

"""What models of other architectures do: odd calls, inputs, weights and losses."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from sylva_train._checks import ConfigError, TargetError
from sylva_train.config import SylvaConfig, TrainingConfig
from sylva_train.curvature import loss_units
from sylva_train.curvature.collect import Collector
from sylva_train.importance import score
from sylva_train.layers import embed, embedded_layers
from sylva_train.masks import LayerMask
from sylva_train.targets import find_targets, shared_inputs
from sylva_train.training import train
from sylva_train.tuner import load_adapter, save_adapter
from tests.sylva_train.models import (
    DECODER,
    ENCODER,
    LENGTH,
    VOCABULARY,
    dense_blocks,
    random,
    random_masks,
    same,
    snapshot,
)
from tests.sylva_train.scored import blocked

OPTIONS = {"block_size": 4, "samples": 10, "levels": 1, "rank": 4}
OPT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "ffn_dim": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "word_embed_proj_dim": 16,
}
DISTILBERT = {
    "vocab_size": VOCABULARY,
    "dim": 16,
    "hidden_dim": 28,
    "n_layers": 2,
    "n_heads": 2,
    "max_position_embeddings": 16,
}


class Small(nn.Module):
    """Two layers and a head of four classes; ``forward`` is each test's own."""

    def __init__(self, run, **parts: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.head = (nn.Linear(8, n) for n in (8, 8, 4))
        self.register_buffer("table", torch.zeros(5, 8))
        self.queries = nn.Parameter(torch.zeros(5, 8))
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)
        self.table.copy_(random((5, 8), seed=99))
        for seed, parameter in enumerate(self.parameters()):
            parameter.data = random(parameter.shape, seed=seed) / 2

    def forward(self, x):
        return self.head(self.run(self, x))


DATA = [
    {"x": random((5, 8), seed=n), "labels": torch.tensor([0, 1, 2, 3, n])}
    for n in (0, 1)
]


class Batches(list):
    """Batches for `train`, in one order."""

    def epoch(self, epoch, start=0):  # noqa: ARG002
        return iter(self[start:])


def loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def scored(model, batches=DATA, **options):
    options = {"importance": "gradient"} | OPTIONS | options
    function = loss if "x" in batches[0] else None
    return score(model, batches, SylvaConfig(**options), loss=function)


def prompted(*, mask):
    """Sentences of which some tokens have no label, and a padded one."""
    ids = torch.randint(2, VOCABULARY, (3, LENGTH), generator=torch.manual_seed(1))
    labels = ids.clone()
    labels[:, :2], labels[0, -2:] = -100, -100
    attention = torch.ones_like(ids)
    attention[0, -2:] = 0
    batch = {"input_ids": ids, "labels": labels}
    return [batch | ({"attention_mask": attention} if mask else {})]


def question():
    """Positions of answers; the padding is among what they are chosen from."""
    (batch,) = prompted(mask=True)
    del batch["labels"]
    ends = {"start_positions": torch.arange(3), "end_positions": torch.arange(1, 4)}
    return [batch | ends]


CASES = {
    # its layers are named after a decoder
    "opt": (tf.OPTForCausalLM, tf.OPTConfig(**OPT), prompted(mask=True)),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig(**DECODER), prompted(mask=False)),
    "mlm": (tf.BertForMaskedLM, tf.BertConfig(**ENCODER), prompted(mask=False)),
    "questions": (
        tf.DistilBertForQuestionAnswering, tf.DistilBertConfig(**DISTILBERT), question(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_no_token_that_has_a_gradient_is_taken_for_padding(name):
    kind, options, batches = CASES[name]
    torch.manual_seed(0)
    model = kind(options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # or attention hardly tells one token from another
    scores = scored(model, batches)
    model(**batches[0]).loss.backward()
    assert loss_units(model, batches[0]) > 0
    for layer, found in scores.items():
        gradient = model.get_submodule(layer).weight.grad
        expected = blocked(gradient.abs().double(), 4)
        scale = float(expected.max())
        torch.testing.assert_close(
            found.blocks(4), expected, rtol=1e-3, atol=1e-4 * scale
        )


@pytest.mark.parametrize(
    "name", ["cross_attn.key_proj", "encoder_attn.v_proj", "crossattention.c_attn"]
)
def test_keys_of_cross_attention_are_the_encoders(name):
    """By what they are called in ProphetNet, in BART and in a GPT-2 with an encoder."""
    collector = Collector({}, SylvaConfig(), frozenset())
    mask = torch.tensor([[1, 1, 0]])
    batch = {"attention_mask": mask, "labels": torch.tensor([[1, -100, -100]])}
    collector.start(batch, 1, seq2seq=True)
    rows = collector.rows(f"decoder.layers.0.{name}", torch.zeros(1, 3, 4))
    assert torch.equal(rows, mask.bool())


def test_no_cache_for_generation_is_filled_while_scoring():
    """RWKV's is written in place, and evaluation mode asks for it."""
    options = {"rescale_every": 0, "context_length": LENGTH}
    names = ("vocab_size", "hidden_size", "num_hidden_layers")
    options |= {name: DECODER[name] for name in names}
    model = tf.RwkvForCausalLM(tf.RwkvConfig(**options)).eval()
    (batch,) = prompted(mask=False)
    scores = scored(model, [batch], target_modules=["receptance"])
    assert model.config.use_cache is True
    model(**batch, use_cache=False).loss.backward()
    for layer, found in scores.items():
        gradient = model.get_submodule(layer).weight.grad.abs().double()
        torch.testing.assert_close(
            found.blocks(4), blocked(gradient, 4), rtol=1e-4, atol=1e-8
        )


def test_no_cache_for_generation_is_filled_while_training():
    """xLSTM's is written in place, in training mode too."""
    sizes = {"hidden_size": 32, "num_heads": 2, "chunk_size": 4, "qk_dim_factor": 1.0}
    options = sizes | {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    model = tf.xLSTMForCausalLM(tf.xLSTMConfig(**options)).eval()
    batches = Batches(prompted(mask=False))
    embed(model, random_masks(model, ["q", "proj_down"], block_size=4))
    assert len(train(model, batches, TrainingConfig(steps=2)).history) == 2
    assert model.config.use_cache is True


@pytest.mark.parametrize("name", ["table", "queries"])
def test_a_layer_that_reads_a_tensor_of_the_model_leaves_it_as_it_was(name):
    model = Small(lambda m, x: m.a(x) * m.b(getattr(m, name)))
    tensor = getattr(model, name)
    flag, before = tensor.requires_grad, snapshot(model)
    model.queries.grad = torch.ones(5, 8)
    scores = scored(model)
    assert tensor.requires_grad is flag
    assert model.table.grad is None
    assert torch.equal(model.queries.grad, torch.ones(5, 8))
    assert same(before, snapshot(model))
    sum(loss(model, batch) * 0.5 for batch in DATA).backward()
    expected = blocked(model.b.weight.grad.abs().double(), 4)
    torch.testing.assert_close(scores["b"].blocks(4), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("more", ["a", "b"])
def test_a_layer_that_is_called_once_more_shares_no_factor(more):
    """As projections of DeBERTa and LongT5 are, on positions and on global tokens."""

    def run(model, x):
        y = model.a(x) * model.b(x)
        return y + getattr(model, more)(model.table)

    options = {"importance": "kfac-natural", "curvature": "dense"}
    together = scored(Small(run), **options)
    for name in "ab":
        alone = scored(Small(run), target_modules=[name], **options)
        assert torch.equal(alone[name].blocks(4), together[name].blocks(4))
    groups = shared_inputs(Small(run), {"x": DATA[0]["x"]}, ["a", "b"])
    assert not groups


def test_a_layer_may_be_called_by_the_name_of_its_argument():
    model = Small(lambda m, x: m.b(input=m.a(input=x).tanh()))
    plain = Small(lambda m, x: m.b(m.a(x).tanh()))
    scores, expected = scored(model), scored(plain)
    for name, layer in expected.items():
        assert torch.equal(scores[name].blocks(4), layer.blocks(4))
    masks = random_masks(model, ["a", "b"], block_size=4)
    loss(plain, DATA[0]).backward()
    wrapped = peft.get_peft_model(
        Small(lambda m, x: m.b(input=m.a(input=x).tanh())), SylvaConfig(masks=masks)
    )
    for embedded in (embed(model, masks), wrapped):
        loss(embedded, DATA[0]).backward()
        for name, layer in embedded_layers(embedded).items():
            own = name.rpartition(".")[2]
            dense = dense_blocks(plain.get_submodule(own).weight.grad, masks[own])
            torch.testing.assert_close(layer.sylva_values["default"].grad, dense)


@pytest.mark.parametrize("tokens", ["expand", "reduce"])
def test_an_image_is_a_sequence_of_its_pixels(tokens):
    """ConvNeXt's layers read (samples, height, width, channels)."""

    def run(model, x, *shape):
        tokens = x[:, None] * torch.linspace(-1, 2, 6)[:, None]
        return model.a(tokens.unflatten(1, shape)).flatten(1, -2).tanh().sum(1)

    options = {"importance": "kfac-natural", "curvature": "dense", "tokens": tokens}
    one, two = (
        scored(
            Small(lambda m, x, s=shape: run(m, x, *s)), target_modules=["a"], **options
        )
        for shape in ((6,), (2, 3))
    )
    torch.testing.assert_close(one["a"].blocks(4), two["a"].blocks(4))


def test_a_loss_that_no_scored_layer_is_in_is_refused():
    def run(model, x):
        with torch.no_grad():
            return model.a(x)

    with pytest.raises(ConfigError, match="does not depend on any layer"):
        scored(Small(run), target_modules=["a"])


@pytest.mark.parametrize("rule", ["kfac", "kfac-natural", "kfac-block"])
def test_a_layer_whose_gradients_vanish_does_not_stop_the_others(rule):
    """As of attention that is saturated: their squares are no numbers of float32."""
    model = Small(lambda m, x: m.b(x) + 1e-21 * m.a(x))
    scores = scored(model, importance=rule)
    assert not scores["a"].blocks(4).any()
    assert scores["b"].blocks(4).any()


def test_pytorchs_encoder_is_scored_with_padding():
    """Its fast path does not call the layers, and is left as it was."""
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def run(model, x):
        padding = torch.tensor([[False, False, True]]).expand(len(x), -1)
        tokens = x[:, None] * torch.tensor([1.0, -1.0, 2.0])[:, None]
        return model.encoder(tokens, src_key_padding_mask=padding)[:, 0]

    model = Small(run, encoder=nn.TransformerEncoder(block, 2)).eval()
    enabled = torch.backends.mha.get_fastpath_enabled()
    scores = scored(model, target_modules=["linear1", "linear2"])
    assert torch.backends.mha.get_fastpath_enabled() is enabled
    model.train()
    sum(loss(model, batch) * 0.5 for batch in DATA).backward()
    for name, found in scores.items():
        expected = blocked(model.get_submodule(name).weight.grad.abs().double(), 4)
        torch.testing.assert_close(found.blocks(4), expected, rtol=1e-4, atol=1e-7)


def test_weights_in_the_same_memory_are_tied():
    model = Small(lambda m, x: m.b(m.a(x)))
    model.b.weight.data = model.a.weight.data
    with pytest.raises(TargetError, match="shared with"):
        scored(model)


def test_hooks_that_change_what_comes_out_are_the_users():
    model, plain = (Small(lambda m, x: m.b(m.a(x).tanh())) for _ in range(2))
    for one in (model, plain):
        one.a.register_forward_hook(lambda _, args, y: y * 2 + args[0])
        one.b.register_forward_pre_hook(lambda _, args: (args[0] * 3,))
    sum(loss(plain, batch) * 0.5 for batch in DATA).backward()
    for name, found in scored(model).items():
        gradient = plain.get_submodule(name).weight.grad.abs().double()
        torch.testing.assert_close(
            found.blocks(4), blocked(gradient, 4), rtol=1e-4, atol=1e-7
        )


def test_a_layer_with_a_forward_pass_put_in_takes_no_rule_of_products():
    model = Small(lambda m, x: m.b(m.a(x)))
    model.a.forward = lambda x: F.linear(x, model.a.weight).tanh()
    with pytest.raises(
        TargetError, match="`a`, a Linear, has a forward pass of its own"
    ):
        scored(model)
    assert set(scored(model, importance="magnitude")) == {"a", "b", "head"}


def test_models_of_images_and_text_predict_the_next_token():
    model = nn.Module()
    model.__class__ = type("LlavaForConditionalGeneration", (nn.Module,), {})
    batch = {"labels": torch.tensor([[1, 2, 3], [1, 2, -100]])}
    assert loss_units(model, batch) == 3
    model.config = tf.T5Config()
    assert loss_units(model, batch) == 5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (tf.BartForCausalLM, tf.BartConfig),
        (tf.XLNetLMHeadModel, tf.XLNetConfig),
        (tf.BertGenerationDecoder, tf.BertGenerationConfig),
        (tf.LlamaForCausalLM, tf.LlamaConfig),
        (tf.BertForMaskedLM, tf.BertConfig),
    ],
)
def test_the_label_of_a_first_token_counts_where_the_model_counts_it(kind, options):
    small = {"vocab_size": VOCABULARY, "d_model": 16, "hidden_size": 16, "n_layer": 1}
    small |= {"decoder_layers": 1, "num_hidden_layers": 1, "intermediate_size": 16}
    heads = {"n_head": 2, "num_attention_heads": 2, "decoder_attention_heads": 2}
    rest = {"decoder_ffn_dim": 16, "d_inner": 16, "bos_token_id": 1, "eos_token_id": 1}
    model = kind(options(**small, **heads, **rest)).eval()
    ids = torch.randint(2, VOCABULARY, (2, LENGTH), generator=torch.manual_seed(0))
    for place in range(2):
        labels = torch.full_like(ids, -100)
        labels[0, place] = ids[0, place]
        batch = {"input_ids": ids, "labels": labels}
        with torch.no_grad():
            counts = bool(model(**batch).loss.isfinite())
        assert loss_units(model, batch) == counts


def test_a_block_of_layers_may_have_several_names(tmp_path):
    """As where depth is a loop: what is in one place is in all."""

    def run(model, x):
        for layer in model.layers:
            x = x + layer(x)
        return x

    def make():
        block = nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        return Small(run, layers=nn.ModuleList([block, block])).eval()

    names = ["layers.0.0"]
    scores = scored(make(), target_modules=names)
    plain = make()
    sum(loss(plain, batch) * 0.5 for batch in DATA).backward()
    gradient = plain.layers[1][0].weight.grad
    expected = blocked(gradient.abs().double(), 4)
    torch.testing.assert_close(scores[names[0]].blocks(4), expected, rtol=1e-4, atol=0)
    masks = random_masks(make(), names, block_size=4)
    wrapped = peft.get_peft_model(make(), SylvaConfig(masks=masks))
    for model in (embed(make(), masks), wrapped):
        sum(loss(model, batch) * 0.5 for batch in DATA).backward()
        (layer,) = embedded_layers(model).values()
        torch.testing.assert_close(
            layer.sylva_values["default"].grad, dense_blocks(gradient, masks[names[0]])
        )
        with torch.no_grad():
            layer.sylva_values["default"].add_(0.1)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(make(), tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(model(DATA[0]["x"]), loaded(DATA[0]["x"]))


def test_a_layer_in_two_places_is_tied():
    model = Small(lambda m, x: m.b(m.a(x)))
    model.c = nn.Sequential(model.a)
    with pytest.raises(TargetError, match=r"of `a` is shared with `c\.0\.weight`"):
        scored(model)


def test_a_layer_in_a_plain_list_is_refused():
    """Blocks put in its place would not run: Mask2Former's heads go through such a list."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
            for i, layer in enumerate(self.layers):
                self.add_module(str(i), layer)

    model = nn.ModuleDict({"a": nn.Linear(8, 8), "listed": Listed()})
    words = r"`listed\.0` is .* with `listed\.layers\[0\].*out \(`.*listed\.1'"
    with pytest.raises(TargetError, match=words):
        find_targets(model)
    assert set(find_targets(model, exclude_modules=["listed.0", "listed.1"])) == {"a"}
    with pytest.raises(TargetError, match=r"with `listed\.layers\[0\]"):
        embed(model, {"listed.0": LayerMask((8, 8), 4, torch.tensor([[0, 0]]))})

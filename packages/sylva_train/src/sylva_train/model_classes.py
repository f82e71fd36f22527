"""What the class of a model of `transformers` tells of its labels."""

from __future__ import annotations

from torch import nn

__all__ = ["UNSHIFTED", "class_name", "is_causal", "is_encoder_decoder"]

#: Language models that take each label for the token at its own place, as they are called
#: in `transformers`: the label of a first token counts.
UNSHIFTED = {
    "BartForCausalLM", "BigBirdPegasusForCausalLM", "BlenderbotForCausalLM",
    "BlenderbotSmallForCausalLM", "CpmAntForCausalLM", "FlaubertWithLMHeadModel",
    "MBartForCausalLM", "MarianForCausalLM", "MvpForCausalLM", "PLBartForCausalLM",
    "PegasusForCausalLM", "ProphetNetForCausalLM", "TrOCRForCausalLM",
    "WhisperForCausalLM", "XLMWithLMHeadModel", "XLNetLMHeadModel",
}  # fmt: skip
#: Causal ones whose name does not say so.
CAUSAL = {
    "BertGenerationDecoder", "EvollaForProteinText2Text", "NemotronH_Omni_Reasoning_V3",
    "ReformerModelWithLMHead",
}  # fmt: skip


def class_name(model: nn.Module) -> str:
    """Return the name of a model's own class, which tells what its labels are."""
    model = getattr(model, "_orig_mod", model)  # `torch.compile` wraps it
    base = getattr(model, "get_base_model", lambda: model)()  # and PEFT
    return type(base).__name__


def is_causal(model: nn.Module) -> bool:
    """Whether a model predicts each token from those before it, as its class's name says.

    Those that read images as well are called as encoder-decoders are.
    """
    name = class_name(model)
    with_images = name.endswith("ForConditionalGeneration")
    return (
        name.endswith(("ForCausalLM", "LMHeadModel"))
        or name in CAUSAL
        or (with_images and not is_encoder_decoder(model))
    )


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model makes its decoder's input from the labels, shifted."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False))

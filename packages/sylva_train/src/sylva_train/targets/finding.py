"""Finding the layers that a pattern names, and what speaks against a layer."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from sylva_train._checks import ConfigError, TargetError
from sylva_train.options import EVERYTHING

from .experts import stacked_experts
from .weights import holders, is_plain, is_supported, weight_view

__all__ = [
    "check_block_size",
    "check_tied",
    "exclusion",
    "find_targets",
    "head_names",
    "is_inside",
    "matches",
    "tied_weights",
    "warn_of_others",
    "warn_of_strays",
]


def matches(name: str, patterns: str | Iterable[str] | None) -> bool:
    """Whether a module's name fits: whole-name regex, or a list of name endings."""
    if patterns is None:
        return False
    if isinstance(patterns, str):
        try:
            return re.fullmatch(patterns, name) is not None
        except re.error as error:
            msg = f"{patterns!r} is not a regular expression: {error}."
            raise ConfigError(msg) from error
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def is_inside(name: str, endings: Iterable[str] | None) -> bool:
    """Whether a module, or one that holds it, has a name with one of the endings.

    PEFT finds ``modules_to_save`` by the bare ending of a name, without a dot before it.
    """
    ends = tuple(endings or ())
    return any(holder.endswith(ends) for holder in holders(name))


#: What `transformers` calls the heads of classes that hold their backbone's parts directly,
#: as CLIPForImageClassification and T5ForQuestionAnswering do.
HEADS = {"class_predictor", "classifier", "ctc_head", "qa_outputs", "score"}
#: Names that an error lists at most.
MOST_NAMES = 12
#: Part of the matrices that may be outside of linear layers without a warning: patches'
#: convolutions and tables of positions are less.
FEW_OTHERS = 0.2


def head_names(model: nn.Module) -> set[str]:
    """Names of modules that belong to the task's head rather than to the backbone.

    A language model inside another model has a head of its own. A linear layer that has its
    weight from a head's, as in the decoder of D-FINE, is of the head.
    """
    heads, linear = set(), {}
    for name, part in model.named_modules():
        if part is model or output_embeddings(part) is not None:
            heads |= {f"{name}.{own}" if name else own for own in own_heads(part)}
        if is_supported(part):
            linear[name] = id(part.weight)
    weights = {linear[name] for name in heads & linear.keys()}
    return heads | {name for name, weight in linear.items() if weight in weights}


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that maps a language model's tokens to the vocabulary."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def own_heads(model: nn.Module) -> set[str]:
    """Names of the modules of a model's own head, not of models' inside."""
    output = output_embeddings(model)
    heads = {n for n, m in model.named_modules() if n and m is output}
    backbone = getattr(model, "base_model", model)
    if backbone is not model:
        inside = {id(module) for module in backbone.modules()}
        return heads | {
            n for n, m in model.named_modules() if n and id(m) not in inside
        }
    children = dict(model.named_children())
    outside = HEADS & children.keys() if hasattr(model, "base_model_prefix") else set()
    models = {n for n, m in children.items() if hasattr(m, "base_model_prefix")}
    if outside and models:
        # Those are the backbone: Whisper's classifier has a projector beside it.
        outside = children.keys() - models
    return heads | {
        n for n, _ in model.named_modules() if n.partition(".")[0] in outside
    }


def tied_weights(model: nn.Module) -> dict[int, list[str]]:
    """Names of the parameters that are in each place of the memory.

    Those of a block of layers that a model has under several names, as where depth is a
    loop, count once: what is put in the place of one of its layers is in all. Not so in a
    list that is no `ModuleList`, which is a place of its own.
    """
    places: dict[int, list[str]] = {}
    slots = [("", model)]
    for name, holder in model.named_modules():  # each module once
        start = f"{name}." if name else ""
        slots += [
            (start + child, m) for child, m in holder._modules.items() if m is not None
        ]
        slots += [
            (f"{start}{attribute}[{i}]", m)
            for attribute, value in vars(holder).items()
            if type(value) in {list, tuple}
            for i, m in enumerate(value)
            if isinstance(m, nn.Module)
        ]
    for name, module in slots:
        for own, parameter in module._parameters.items():
            if parameter is not None:
                path = f"{name}.{own}" if name else own
                places.setdefault(place_of(parameter), []).append(path)
    return places


def place_of(parameter: torch.Tensor) -> int:
    """Return what is the same for parameters of one place in the memory, and them alone."""
    # On the meta device there is no memory: all are at 0, and views at their offset.
    return id(parameter) if parameter.is_meta else parameter.data_ptr() or id(parameter)


def sharers(name: str, module: nn.Module, tied: Mapping[int, list[str]]) -> list[str]:
    """Names of the parameters that are a layer's weight, by `tied_weights`, but its own."""
    return [n for n in tied[place_of(module.weight)] if n != f"{name}.weight"]  # type: ignore[arg-type]


def check_tied(
    layers: Mapping[str, nn.Module],
    tied: Mapping[int, list[str]],
    targets: Iterable[str] = (),
) -> None:
    """Raise `TargetError` if another module uses the weight of a layer, by `tied_weights`.

    ``targets`` are all layers, of which some might be left out.
    """
    shared = {n: found for n, m in layers.items() if (found := sharers(n, m, tied))}
    if shared:
        name, others = next(iter(shared.items()))
        more = f" and {len(others) - 5} others" if len(others) > 5 else ""
        out = exclusion(shared, targets) if targets else "`target_modules`"
        msg = (
            f"the weight of `{name}` is shared with"
            f" {', '.join(f'`{s}`' for s in others[:5])}{more}"
            " (tied weights): training blocks of it would silently change both, or only one"
            f" of them. Leave {'such layers' if targets else 'the layer'} out"
            f" ({out}), or untie it first (an output embedding by"
            " `config.tie_word_embeddings=False`, a list of layers by `nn.ModuleList`)."
        )
        raise TargetError(msg)


def warn_of_strays(model: nn.Module, option: str, patterns: object) -> None:
    """Warn of names in a list that no module has, where others of the list match."""
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        return
    names = [name for name, _ in model.named_modules()]
    strays = [p for p in patterns if not any(matches(name, [p]) for name in names)]
    if strays:
        warnings.warn(
            f"`{option}` has {', '.join(map(repr, strays))}, which no module of this"
            f" {type(model).__name__} is called.",
            stacklevel=4,
        )


def warn_of_others(model: nn.Module) -> None:
    """Warn where ``"all-linear"`` leaves out much of a backbone's matrices.

    Experts of a mixture are often stored as stacks of matrices, not as linear layers, and
    attention may hold its matrices itself.
    """
    heads, linear = head_names(model), 0
    others: dict[str, int] = {}
    for name, module in model.named_modules():
        if name in heads or isinstance(module, nn.Embedding):
            continue
        sizes = {
            n: p.numel()
            for n, p in module._parameters.items()
            if p is not None and p.dim() > 1
        }
        if is_supported(module) and is_plain(module):
            linear += sum(sizes.values())
        else:
            others |= {f"{name}.{n}": size for n, size in sizes.items()}
    total = linear + sum(others.values())
    if sum(others.values()) > FEW_OTHERS * total:
        largest = max(others, key=others.__getitem__)
        kind = type(model.get_submodule(largest.rpartition(".")[0])).__name__
        warnings.warn(
            f'"all-linear" is {linear / total:.0%} of the weight matrices of this'
            f" {type(model).__name__}: the others, like `{largest}` of a {kind}, belong to"
            " no linear layer and will not be trained."
            + (
                " `sylva_train.split_experts(model)` makes linear layers of experts."
                if stacked_experts(model)
                else ""
            ),
            stacklevel=4,
        )


def find_targets(
    model: nn.Module,
    target_modules: list[str] | str | None = "all-linear",
    exclude_modules: list[str] | str | None = None,
) -> dict[str, nn.Module]:
    """Find the layers that a pattern names.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; `transformers` models tell their head from their backbone.
    target_modules : list of str or str
        Names or name endings, a regular expression on whole names, or
        ``"all-linear"``: every `torch.nn.Linear` and ``Conv1D`` of the backbone, but
        subclasses with a forward pass of their own.
    exclude_modules : list of str or str, optional
        Layers to leave out, in the same form.

    Returns
    -------
    dict of str to torch.nn.Module
        The layers by name, in the model's order.

    Raises
    ------
    TargetError
        If nothing matches, or no linear layer is excluded where some should be, a match
        is not a linear layer with a dense weight, or its weight is tied to another
        module's.
    ConfigError
        If a regular expression is none.
    """
    if is_supported(model):
        msg = (
            f"the model is itself a {type(model).__name__}, and a layer with blocks is put"
            " in the place of one inside a model: wrap it (`nn.Sequential(model)`)."
        )
        raise TargetError(msg)
    everything = target_modules in EVERYTHING
    heads = head_names(model) if everything else set()
    found, excluded = {}, False
    for name, module in model.named_modules():
        if matches(name, exclude_modules):
            excluded |= is_supported(module)
            continue
        if everything:
            if is_supported(module) and is_plain(module) and name not in heads:
                found[name] = module
        elif matches(name, target_modules):
            if not is_supported(module):
                msg = (
                    f"`target_modules` matches `{name}`, a {type(module).__name__}; only"
                    " torch.nn.Linear and transformers' Conv1D with a dense"
                    " floating-point weight can hold trainable blocks."
                )
                raise TargetError(msg)
            found[name] = module
    endings = sorted(
        {n.rpartition(".")[2] for n, m in model.named_modules() if is_supported(m)}
    )
    if exclude_modules and found and not excluded:
        msg = (
            f"`exclude_modules`={exclude_modules!r} matches no linear layer of this"
            f" {type(model).__name__}; they end in {', '.join(map(repr, endings))}."
        )
        raise TargetError(msg)
    if not found:
        raise no_target(model, target_modules, exclude_modules, endings)
    check_tied(found, tied_weights(model), found)
    return found


def no_target(
    model: nn.Module,
    target_modules: list[str] | str | None,
    exclude_modules: list[str] | str | None,
    endings: list[str],
) -> TargetError:
    """Return the error of patterns that leave no layer, and say what layers there are."""
    kind, rest = type(model).__name__, ""
    if endings:
        rest = f"; its linear layers end in {', '.join(map(repr, endings))}"
    everything = target_modules in EVERYTHING
    if everything and not exclude_modules:
        weights = {
            type(m).__name__
            for m in model.modules()
            if not (is_supported(m) or isinstance(m, nn.Embedding))
            if any(p is not None and p.dim() > 1 for p in m._parameters.values())
        }
        if endings:
            rest += ", and belong to the task's head or compute more than a product"
        if weights:
            rest += f"; weights of {', '.join(sorted(weights)[:3])} cannot hold blocks"
    outside = (
        f" outside `exclude_modules`={exclude_modules!r}" if exclude_modules else ""
    )
    return TargetError(
        f"no layer of this {kind} matches `target_modules`={target_modules!r}{outside}"
        f"{rest or '; it has no linear layer at all'}."
    )


def exclusion(names: Iterable[str], targets: Iterable[str]) -> str:
    """Say how to leave layers out: the shortest endings that no other target has.

    Where those are many, as of a vision tower whose layers are called like the language
    model's, by the modules that hold no other target.
    """
    names = list(names)
    others = [name.split(".") for name in set(targets).difference(names)]
    # Every ending that is taken by a layer which is to stay, and every module that holds one.
    taken = {".".join(parts[i:]) for parts in others for i in range(len(parts))}
    inhabited = {".".join(parts[:i]) for parts in others for i in range(len(parts))}
    endings: dict[str, None] = {}
    modules: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        own = (".".join(parts[i:]) for i in reversed(range(len(parts))))
        around = (".".join(parts[:i]) for i in range(1, len(parts)))
        # Numbers alone, as of a `Sequential`'s layer, say nothing.
        said = (e for e in own if e not in taken and any(map(str.isalpha, e)))
        endings[next(said, name)] = None
        holder = next((h for h in around if h not in inhabited), None)
        whole = re.escape(name) if holder is None else rf"{re.escape(holder)}\..*"
        modules[whole] = None
    if len(endings) > MOST_NAMES >= len(modules):
        return f'`exclude_modules=r"{"|".join(modules)}"`'
    more = len(endings) - MOST_NAMES
    listed = ", ".join(map(repr, list(endings)[:MOST_NAMES]))
    return f"`exclude_modules=[{listed}]`" + (f" and {more} more" if more > 0 else "")


def check_block_size(
    targets: dict[str, nn.Module], block_size: int, *, named: bool = True
) -> dict[str, nn.Module]:
    """Return the layers that have room for a block.

    Those without are left out with a warning unless they were ``named``.

    Raises
    ------
    ConfigError
        If a layer that was named has no room, or none at all has.
    """
    small = {
        name: tuple(weight_view(module).shape)
        for name, module in targets.items()
        if block_size > min(weight_view(module).shape)
    }
    if not small:
        return targets
    name, shape = next(iter(small.items()))
    least = min(min(s) for s in small.values())
    words = f"`block_size` {block_size} is larger than `{name}` of shape {shape}" + (
        f" and {len(small) - 1} other layers" if len(small) > 1 else ""
    )
    some = len(small) < len(targets)
    if some and not named:
        warnings.warn(f"{words}, which will not be trained.", stacklevel=4)
        return {name: m for name, m in targets.items() if name not in small}
    msg = (
        words
        + (f"; take at most {least}" if least > 1 else "")
        + (f"; or leave them out: {exclusion(small, targets)}." if some else ".")
    )
    raise ConfigError(msg)

"""Which layers of a model Sylva works on, and their weights as (out, in) matrices."""

from .experts import join_experts, split_experts, stacked_experts
from .finding import (
    check_block_size,
    check_tied,
    exclusion,
    find_targets,
    head_names,
    is_inside,
    matches,
    tied_weights,
    warn_of_others,
    warn_of_strays,
)
from .identity import fingerprint
from .inputs import Calls, input_owners, is_same, layer_input, shared_inputs
from .weights import (
    as_matrix,
    check_weights,
    is_packed,
    is_patched,
    is_plain,
    is_sharded,
    is_supported,
    loaded_weight,
    stands_for_others,
    weight_device,
    weight_view,
)

__all__ = [
    "Calls",
    "as_matrix",
    "check_block_size",
    "check_tied",
    "check_weights",
    "exclusion",
    "find_targets",
    "fingerprint",
    "head_names",
    "input_owners",
    "is_inside",
    "is_packed",
    "is_patched",
    "is_plain",
    "is_same",
    "is_sharded",
    "is_supported",
    "join_experts",
    "layer_input",
    "loaded_weight",
    "matches",
    "shared_inputs",
    "split_experts",
    "stacked_experts",
    "stands_for_others",
    "tied_weights",
    "warn_of_others",
    "warn_of_strays",
    "weight_device",
    "weight_view",
]

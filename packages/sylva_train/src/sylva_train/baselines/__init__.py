"""What users would otherwise run: full fine-tuning, PEFT's methods, a pruner, a probe.

Each method turns a pretrained model into one whose trainable parameters are its own;
the training loop is the same for all of them.
"""

from .adapting import Adapted, Method, adapt, parse_method
from .block_sparse import BlockSparseLinear, make_block_sparse
from .probing import probe
from .rivals import lora_config, prune, shira_config, supertuning_config
from .serial import SerialAdapter, add_serial_adapters

__all__ = [
    "Adapted",
    "BlockSparseLinear",
    "Method",
    "SerialAdapter",
    "adapt",
    "add_serial_adapters",
    "lora_config",
    "make_block_sparse",
    "parse_method",
    "probe",
    "prune",
    "shira_config",
    "supertuning_config",
]

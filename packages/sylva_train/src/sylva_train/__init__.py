"""Fine-tune only the most important blocks of a pretrained model.

`score` a model's weights on a few labelled samples, `select` the blocks that matter,
`embed` them in the dense weights and train those: no extra forward work, gradients and
optimizer state for the blocks alone. With PEFT: ``peft.get_peft_model(model,
SylvaConfig(masks=masks))``; importing this package is what registers the tuner there.
"""

import sys
from importlib.metadata import version

# Help and errors of options on the command line need not wait seconds for PyTorch; its
# commands import what they call. All others get everything, and PEFT gets its tuner.
if "sylva_command" not in sys.modules:
    from ._checks import (
        AdapterError,
        ConfigError,
        DataError,
        ModelError,
        NonFiniteError,
        OutputExistsError,
        SylvaError,
        TargetError,
    )
    from .checkpoint import CheckpointError
    from .comparison import Comparison, compare, load_results
    from .config import SylvaConfig, TaskConfig, TrainingConfig
    from .config_files import load_config
    from .data import Loader, TextDataset, load_data
    from .evaluation import evaluate
    from .importance import LayerScores, Scores, score
    from .layers import SparseEmbeddedLinear, embed, merge, sync, unload
    from .masks import LayerMask, Masks
    from .optimizer import SparseAdamW
    from .overlaps import agreement
    from .pretrained import PooledClassifier, load_model, load_tokenizer
    from .report import markdown_table, summary_table, write_report
    from .selection import select
    from .targets import join_experts, shared_inputs, split_experts
    from .training import TrainResult, train
    from .tuner import SylvaModel, inspect_adapter, load_adapter, save_adapter
    from .workflow import (
        evaluate_folder,
        finetune,
        load_folder,
        load_task,
        merge_folder,
        predict,
        predict_file,
        read_run,
        score_file,
    )

__version__ = version("sylva-train")

__all__ = [
    "AdapterError",
    "CheckpointError",
    "Comparison",
    "ConfigError",
    "DataError",
    "LayerMask",
    "LayerScores",
    "Loader",
    "Masks",
    "ModelError",
    "NonFiniteError",
    "OutputExistsError",
    "PooledClassifier",
    "Scores",
    "SparseAdamW",
    "SparseEmbeddedLinear",
    "SylvaConfig",
    "SylvaError",
    "SylvaModel",
    "TargetError",
    "TaskConfig",
    "TextDataset",
    "TrainResult",
    "TrainingConfig",
    "agreement",
    "compare",
    "embed",
    "evaluate",
    "evaluate_folder",
    "finetune",
    "inspect_adapter",
    "join_experts",
    "load_adapter",
    "load_config",
    "load_data",
    "load_folder",
    "load_model",
    "load_results",
    "load_task",
    "load_tokenizer",
    "markdown_table",
    "merge",
    "merge_folder",
    "predict",
    "predict_file",
    "read_run",
    "save_adapter",
    "score",
    "score_file",
    "select",
    "shared_inputs",
    "split_experts",
    "summary_table",
    "sync",
    "train",
    "unload",
    "write_report",
]

"""Fine-tune 5% of MiniLM's weights in steps: score, select, embed, train, save.

``python examples/finetune_minilm.py`` takes a handful of steps on a CPU, offline, to
show the calls; ``--limit 4000 --steps 250 --samples 256`` trains a useful classifier.
Needs ``sylva-train[demo]``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import sylva_train as sylva


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--limit", type=int, default=64, help="training sentences")
    options.add_argument("--samples", type=int, default=16, help="sentences to score")
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--output", type=Path, help="folder for the adapter")
    options = options.parse_args()

    data = sylva.load_data("e2e-rating", limit=options.limit)
    held_out = sylva.load_data("e2e-rating", split="validation", limit=options.limit)
    model, tokenizer = sylva.load_model("minilm", labels=data.label_names)
    loader = sylva.Loader(data, tokenizer, batch_size=16, max_length=64, shuffle=True)
    eval_loader = sylva.Loader(held_out, tokenizer, batch_size=64, max_length=64)

    # 1. How much does each weight matter for this task? The model stays as it is.
    config = sylva.SylvaConfig(density=0.05, samples=options.samples, rank=8)
    scores = sylva.score(model, loader, config)

    # 2. Take the best twentieth of each layer's 32 × 32 blocks.
    masks = sylva.select(scores, density=0.05, block_size=32)
    print(masks)

    # 3. Make those blocks, and the new head, trainable in place; train.
    sylva.embed(model, masks, modules_to_save=["classifier"])
    training = sylva.TrainingConfig(steps=options.steps, lr=1e-3)
    result = sylva.train(model, loader, training, eval_loader=eval_loader)
    for record in result.history[:: max(1, options.steps // 10)]:
        print(f"step {record['step']:4d}   loss {record['loss']:.4f}")
    print(f"validation accuracy {result.metrics['accuracy']:.3f}")

    # 4. The adapter holds the blocks and the head; the base model is not in it.
    with tempfile.TemporaryDirectory() as folder:
        path = options.output or Path(folder) / "adapter"
        sylva.save_adapter(model, path, config=config)
        size = (path / "adapter_model.safetensors").stat().st_size
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        print(f"adapter {size / 1e6:.1f} MB, model in memory {whole / 1e6:.1f} MB")

        # 5. Load it into a fresh base: the same weights, the same predictions.
        again, _ = sylva.load_model("minilm", labels=data.label_names)
        sylva.load_adapter(again, path)
        metrics = sylva.evaluate(again, eval_loader)
        print(f"loaded again: accuracy {metrics['accuracy']:.3f}")


if __name__ == "__main__":
    main()

"""Sylva as a PEFT method: `get_peft_model`, transformers' Trainer, and back from disk.

``python examples/peft_trainer.py`` takes a few steps on a CPU, offline. Needs
``sylva-train[demo]``.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import sylva_train as sylva


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--limit", type=int, default=64, help="training sentences")
    options.add_argument("--samples", type=int, default=16, help="sentences to score")
    options.add_argument("--steps", type=int, default=4)
    options = options.parse_args()

    data = sylva.load_data("e2e-rating", limit=options.limit)
    base, tokenizer = sylva.load_model("minilm", labels=data.label_names)
    loader = sylva.Loader(data, tokenizer, batch_size=16, max_length=64, shuffle=True)

    config = sylva.SylvaConfig(
        density=0.05, samples=options.samples, rank=8, modules_to_save=["classifier"]
    )
    scores = sylva.score(base, loader, config)
    config.masks = sylva.select(scores, config.density, config.block_size)
    model = get_peft_model(base, config)
    model.print_trainable_parameters()

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=16,
            learning_rate=1e-3,
            logging_steps=max(1, options.steps // 4),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=loader.examples,
            data_collator=loader.collate,
        )
        trainer.train()
        model.save_pretrained(folder)

        # Anyone with the base model and the folder has the fine-tuned model.
        again, _ = sylva.load_model("minilm", labels=data.label_names)
        again = PeftModel.from_pretrained(again, folder)

    batch = {
        name: tensor.to(model.device) for name, tensor in next(iter(loader)).items()
    }
    with torch.no_grad():
        ours = model.eval()(**batch).logits
        theirs = again.eval().to(model.device)(**batch).logits
    print("largest difference after loading:", float((ours - theirs).abs().max()))


if __name__ == "__main__":
    main()

"""Pretrain a small LLaMA-architecture model, with its own tokenizer, on plain text.

``python examples/pretrain_llama.py OUTPUT`` takes some minutes on a CPU, offline, and
leaves a folder that `sylva_train.load_model` and `transformers` read: a model that is
small but real, for trying fine-tuning where no model hub is in reach.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sylva_train as sylva

TEXT = (
    Path(__file__).parents[1] / "benchmarks" / "data" / "tinyshakespeare" / "input.txt"
)


def make_tokenizer(
    texts: list[str], vocabulary: int, length: int
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary; no text at all is unknown to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=length,
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("output", type=Path)
    options.add_argument("--text", type=Path, default=TEXT, help="plain text file")
    options.add_argument("--limit", type=int, help="paragraphs to take at most")
    options.add_argument("--steps", type=int, default=1000)
    options.add_argument("--batch-size", type=int, default=16)
    options.add_argument("--length", type=int, default=128, help="tokens of a text")
    options.add_argument("--vocabulary", type=int, default=2048)
    options.add_argument("--hidden", type=int, default=256)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--lr", type=float, default=3e-3)
    options.add_argument("--seed", type=int, default=0)
    options = options.parse_args()

    data = sylva.load_data(options.text, task="causal-lm", limit=options.limit)
    tokenizer = make_tokenizer(data.texts, options.vocabulary, options.length)
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden,
            # Two and two thirds of the width, as LLaMA has it, in multiples of 64.
            intermediate_size=-(-8 * options.hidden // 192) * 64,
            num_hidden_layers=options.layers,
            num_attention_heads=max(1, options.hidden // 32),
            max_position_embeddings=options.length,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    held = max(1, len(data) // 20)
    loaders = [
        sylva.Loader(
            data.subset(part),
            tokenizer,
            options.batch_size,
            max_length=options.length,
            shuffle=True,
            seed=options.seed,
            pack=True,
        )
        # The last paragraphs are other scenes than the first.
        for part in (range(len(data) - held), range(len(data) - held, len(data)))
    ]
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.1f} million weights, {len(loaders[0])} batches an epoch")
    training = sylva.TrainingConfig(
        steps=options.steps,
        lr=options.lr,
        weight_decay=0.1,
        schedule="cosine",
        eval_every=max(1, options.steps // 5),
        seed=options.seed,
    )

    def show(record: dict[str, float]) -> None:
        if "score" in record:
            print(
                f"step {record['step']:5.0f}   training loss {record['loss']:.3f}  "
                f" held-out perplexity {record['score']:.1f}",
                flush=True,
            )

    sylva.train(model, loaders[0], training, eval_loader=loaders[1], callbacks=[show])
    model.save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    print(f"saved to {options.output}")


if __name__ == "__main__":
    main()

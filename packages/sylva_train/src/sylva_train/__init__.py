"""Fine-tune only the most important blocks of a pretrained model."""

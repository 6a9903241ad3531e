"""Training: data, labels, the paper's stages, LoRA, evaluation, and the recipe of a small model."""

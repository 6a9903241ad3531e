"""Training: data, labels, the paper's stages, LoRA, evaluation, and the recipe of the bundled model."""

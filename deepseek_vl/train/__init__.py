"""Training: the paper's stages, batches and labels, LoRA, evaluation, and the commands."""

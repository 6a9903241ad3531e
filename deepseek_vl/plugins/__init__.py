"""How other engines run the model."""

"""The OpenAI-compatible HTTP API: `python -m deepseek_vl.serve.api`."""

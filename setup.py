"""Packaging of deepseek_vl."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "deepseek_vl/__init__.py").read_text(encoding="utf-8")).group(1)

CAPTION = ["pyarrow>=17"]  # Parquet
GGUF = ["gguf>=0.19"]
GPU = ["torchao>=0.18"]
GRADIO = ["gradio>=6.10"]  # the first whose gr.HTML tells its script of new values
RAY = ["ray[data]>=2.49,<2.64"]
STRUCTURED = ["llguidance>=1.3"]  # answers of a given form
SERVE = [*STRUCTURED, "fastapi>=0.115", "prometheus-client>=0.21", "pydantic>=2.9", "uvicorn>=0.32"]
TRAIN = ["matplotlib>=3.9", "peft>=0.18", "pyarrow>=17", "tensorboard>=2.18"]  # pyarrow for data in Parquet

setup(
    name="deepseek_vl",
    version=VERSION,
    description="DeepSeek-VL on today's PyTorch and transformers: vision-language chat with the published checkpoints",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE-CODE"],
    packages=find_packages(include=["deepseek_vl", "deepseek_vl.*"]),
    package_data={"deepseek_vl": ["bundled/*/*", "serve/web/*.css", "serve/web/*.js"]},
    entry_points={
        "console_scripts": [
            "deepseek-vl-caption=deepseek_vl.caption:main",
            "deepseek-vl-chat=deepseek_vl.serve.cli:main",
        ],
        "vllm.general_plugins": ["deepseek_vl=deepseek_vl.plugins.vllm:register"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",  # transformers reads `.bin` weights from this version on
        "transformers>=5.0",
        "timm>=1.0.21",  # the first to build on the meta device
        "accelerate>=1.7",
        "attrdict>=2.0.1",
        "einops>=0.8",
        "httpx>=0.28",
        "pillow>=12.3",
        "prompt_toolkit>=3.0.48",
        "psutil>=6",
        "rich>=13.9",
        "safetensors>=0.8",
        "sentencepiece>=0.2",
    ],
    extras_require={
        "test": [
            *CAPTION,
            *GGUF,
            *GRADIO,
            *SERVE,
            *TRAIN,
            "hypothesis>=6.100",
            "import-linter>=2.17",
            "ipykernel>=6.29",
            "jsonschema>=4.23",
            "nbclient>=0.10",
            "onnxruntime>=1.20",
            "onnxscript>=0.5",
            "openai>=1.60",
            "pexpect>=4.9",
            "playwright>=1.49",
            "pyte>=0.8.2",
            "pytest>=8",
            "pytest-xdist>=3.8",
            "ruff>=0.14",
            "schemathesis>=4.10",
            "trl>=1.16",
        ],
        "caption": CAPTION,
        "gguf": GGUF,
        "gpu": GPU,
        "gradio": GRADIO,
        "ray": RAY,
        "serve": SERVE,
        "structured": STRUCTURED,
        "train": TRAIN,
    },
)

"""What importing and installing the package does, and does not do."""

import subprocess
import sys

import pytest
from conftest import ROOT

import deepseek_vl


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True, cwd=ROOT
    )


@pytest.mark.parametrize("module", ["deepseek_vl", "deepseek_vl.models", "deepseek_vl.serve.inference"])
def test_import_is_silent_and_changes_nothing_global(module: str) -> None:
    result = run_python(
        f"""
import builtins, collections, sys, warnings
import torch, transformers
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, StoppingCriteria
def state():
    return (dir(builtins), dir(collections), list(warnings.filters), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_num_threads(), torch.random.get_rng_state().tolist(), sys.excepthook, sys.displayhook)
before = state()
import {module}
assert state() == before
assert not torch.cuda.is_initialized()
"""
    )
    assert (result.stdout, result.stderr) == ("", "")


def test_importing_the_package_leaves_the_network_for_later() -> None:
    """It costs little on top of torch and transformers."""
    result = run_python(
        """
import sys
import deepseek_vl
print(sorted({"torch", "transformers", "timm", "PIL", "deepseek_vl.models"} & set(sys.modules)))
deepseek_vl.VLChatProcessor
print(sorted({"deepseek_vl.models", "timm"} & set(sys.modules)))
"""
    )
    assert result.stdout.splitlines() == ["[]", "['deepseek_vl.models']"]


def test_every_exported_name_is_there() -> None:
    for name in deepseek_vl.__all__:
        assert getattr(deepseek_vl, name).__name__ == name
    assert set(deepseek_vl.__all__) <= set(dir(deepseek_vl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = deepseek_vl.nothing

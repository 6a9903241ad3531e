"""The README's Python snippets run, in order and in one session, as in a notebook."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_the_snippets_run(siglip_checkpoint: Path) -> None:
    """On a small checkpoint instead of the published one."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 4
    program = "\n".join(snippets)
    assert "deepseek-ai/deepseek-vl-1.3b-chat" in program
    program = program.replace("deepseek-ai/deepseek-vl-1.3b-chat", str(siglip_checkpoint))
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("parameters")

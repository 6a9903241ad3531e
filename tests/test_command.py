"""What the commands share: the garbage collector while they start, and packages that are not installed."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_vl.command_line import starting


@pytest.fixture(autouse=True)
def thawed():
    yield
    gc.unfreeze()


def test_what_a_program_starts_with_is_not_searched_for_garbage() -> None:
    assert gc.isenabled()
    with starting():
        assert not gc.isenabled()
        kept = [[]]
    assert gc.isenabled()
    assert not any(found is kept for found in gc.get_objects())  # frozen: the collector does not see it
    later = [[]]
    assert any(found is later for found in gc.get_objects())


def test_a_start_that_fails_leaves_the_collector_as_it_was() -> None:
    with pytest.raises(ValueError, match="no such model"), starting():
        kept = [[]]
        raise ValueError("no such model")
    assert gc.isenabled()
    assert any(found is kept for found in gc.get_objects())


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    try:
        with starting():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("module", "package", "extra", "arguments"),
    [
        ("deepseek_vl.serve.app_deepseek", "gradio", "gradio", ["--model_path", "tiny", "--port", "0"]),
        ("deepseek_vl.serve.api", "uvicorn", "serve", ["--model_path", "tiny", "--port", "0"]),
        ("deepseek_vl.train.lora", "peft", "train", ["--adapter", "it", "--output", "new"]),
        ("deepseek_vl.train.evaluate", "matplotlib", "train",
         ["--model_path", "tiny", "--data", "data.jsonl", "--output", "new"]),
    ],
)  # fmt: skip
def test_a_package_that_is_not_installed_is_said_in_one_line(
    module: str, package: str, extra: str, arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "data.jsonl").write_text('{"messages": [{"role": "user", "content": "Hi"}, '
                                         '{"role": "assistant", "content": "Hi"}]}\n')  # fmt: skip
    code = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_module({module!r}, run_name='__main__')"
    for given, expected in ((["--help"], 0), (arguments, 1)):
        result = subprocess.run(
            [sys.executable, "-c", code, *given], capture_output=True, text=True, cwd=tmp_path, timeout=120
        )
        assert result.returncode == expected, result.stderr
    said = result.stderr.splitlines()[-1]
    assert f"error: this needs the package {package}: pip install '.[{extra}]'" in said
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "new").exists()

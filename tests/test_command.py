"""`starting`: no garbage collection while a command starts."""

import gc

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

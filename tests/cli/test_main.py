"""The command line itself: every command has help with an example, and bad words are refused."""

from __future__ import annotations

import pytest

from mmkernels.cli.main import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"mmkernels {command}" in capsys.readouterr().out.split("example", 1)[1]


@pytest.mark.parametrize("words", [[], ["fly"], ["doctor", "--nothing"]])
def test_bad_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and "mmkernels" in capsys.readouterr().err

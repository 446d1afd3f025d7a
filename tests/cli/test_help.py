"""`--help` of every command: each option is described, and its default is stated."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import pytest

from pipeline.cli import parser as pipeline_parser
from vitdet.cli import parser as vitdet_parser

EMPTY = (None, False, "", 0, [], (), argparse.SUPPRESS)


def commands_of(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parsers of all subcommands, recursively."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in below:
        assert len(action._choices_actions) == len(action.choices)  # each has a help text
        for child in action.choices.values():
            yield from commands_of(child)
    if not below:
        yield parser


@pytest.mark.parametrize("root", [vitdet_parser, pipeline_parser])
def test_each_option_has_help_that_states_its_default(
    root: Callable[[], argparse.ArgumentParser],
) -> None:
    commands = list(commands_of(root()))
    assert len(commands) >= 5
    for command in commands:
        text = " ".join(command.format_help().split())
        assert text.startswith(f"usage: {command.prog}")
        assert command.description, command.prog
        for action in command._actions:
            place = f"{command.prog} {'/'.join(action.option_strings) or action.dest}"
            if action.help == argparse.SUPPRESS:
                continue
            assert action.help, place
            if action.default not in EMPTY:
                assert "(default: " in action.help, f"{place}: {action.help}"

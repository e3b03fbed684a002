"""Parses `svc` commands from pages and deploy files without running them."""

import click

from svc.cli import group


def usage_error(words: list[str]) -> str | None:
    """Return why `svc` rejects a command, option or argument among these words, or None if it accepts them."""
    command: click.Command = group
    context: click.Context | None = None
    try:
        while isinstance(command, click.Group) and (words or not command.invoke_without_command):
            # A group caches the help option of its first context, so contexts have their parents, as in a real run.
            context = click.Context(command, context, **command.context_settings)
            _, words, _ = command.make_parser(context).parse_args(words)  # the group's own options come first
            name, *words = words or [""]
            subcommand = command.get_command(context, name)
            if subcommand is None:
                return f"no command {name!r}"
            command = subcommand
        command.make_context(command.name, words, **group.context_settings)
    except click.UsageError as error:
        return error.format_message()
    return None

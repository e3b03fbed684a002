"""Training files as OpenAI publishes them, see tests/data/openai_cookbook."""

from pathlib import Path

_FOLDER = Path(__file__).parent / "data" / "openai_cookbook"


def published(*, toy: int = 0, drone: int = 0) -> str:
    """Return a training file with the first lines of each published file.

    Args:
        toy: number of lines of short conversations.
        drone: number of lines with tools and calls.
    """
    counts = {"toy_chat_fine_tuning.jsonl": toy, "drone_training.jsonl": drone}
    lines = {name: (_FOLDER / name).read_text("utf-8").splitlines(keepends=True) for name in counts}
    return "".join("".join(lines[name][:count]) for name, count in counts.items())

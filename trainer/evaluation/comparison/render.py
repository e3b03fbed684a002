"""Shows a comparison on the terminal, or outputs it as JSON with all answers."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from svc.evaluation.comparison import DifferentAnswers, Direction, MetricComparison
from svc.evaluation.metrics.tokens import Nll
from svc.evaluation.results import ExampleResult
from svc.terminal import output
from trainer.evaluation.answer_limit import REFERENCE_FACTOR, SPARE_TOKENS
from trainer.evaluation.comparison.job import Answers, Compared
from trainer.evaluation.comparison.model import LocalModel, Model

_MAX_SHOWN = 160
"""Maximum number of characters shown for each text."""
_VERDICTS = {
    Direction.BETTER: "[green]B is better[/green]",
    Direction.WORSE: "[red]B is worse[/red]",
    Direction.UNDECIDED: "no significant difference",
    Direction.DIFFERENT: "differs",
}


def print_compared(compared: Compared) -> None:
    """Print a comparison to stdout."""
    comparison, questions = compared.comparison, compared.questions
    for letter, model, answers in zip("AB", compared.models, compared.answers, strict=True):
        output.print(f"[bold]{letter}[/bold]  {escape(str(model))}{'  (stored answers)' if answers.kept else ''}")
    output.print(f"{comparison.examples} examples from {escape(questions.origin)}, {_limit(questions.max_tokens)}\n")
    table = Table("", "A", "B", "B - A", "", box=None)
    for figures in comparison.metrics.values():
        table.add_row(*_row(figures))
    output.print(table)
    for name, reason in comparison.left_out.items():
        output.print(f"[dim]{escape(name)} was not computed: {escape(reason)}[/dim]")
    primary, tally = comparison.metrics[comparison.primary], comparison.tally
    by = escape(tally.metric)
    output.print(f"\nBy {escape(primary.title)}: [bold]{_VERDICTS[comparison.direction]}[/bold] (95%)")
    output.print(
        f"By {by}, B wins {tally.wins}, loses {tally.losses}, ties {tally.ties}; sign test p = {tally.p_value:.2g}"
    )
    if judge := compared.judge:
        output.print(
            f"Judge {judge.model} at {judge.url}: B wins {judge.win_rate} of {judge.pairs} pairs "
            f"(ties count half); share of pairs judged the same in both orders: {judge.agreement}",
            markup=False,
            soft_wrap=True,
        )
    if comparison.different:
        count = len(comparison.different)
        output.print(
            f"\nThe {count} examples whose answers differ most, ranked by {by} and then by the number of edits "
            "between them:"
        )
    for example in comparison.different:
        _print_example(example, tally.metric)


def _limit(max_tokens: int | None) -> str:
    if max_tokens is not None:
        return f"answers of at most {max_tokens} tokens"
    return f"answers of at most {REFERENCE_FACTOR:g} times the length of their reference plus {SPARE_TOKENS} tokens"


def _row(compared: MetricComparison) -> tuple[str, ...]:
    verdict = "" if compared.direction is Direction.UNDECIDED else _VERDICTS[compared.direction]
    figures = (str(estimate) for estimate in (compared.first, compared.second, compared.difference))
    return escape(compared.title), *(escape(figure) for figure in figures), verdict


def _print_example(shown: DifferentAnswers, metric: str) -> None:
    lead = "tie" if shown.gain == 0 else f"{'B' if shown.gain > 0 else 'A'} by {abs(shown.gain):.3g} {metric}"
    output.print(f"\n[bold]{shown.place + 1}[/bold]  {escape(lead)}, {shown.edits} edits", soft_wrap=True)
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 2))
    for title, text in (("asked", shown.asked), ("right", shown.reference), ("A", shown.first), ("B", shown.second)):
        table.add_row(f"[dim]{title}[/dim]", escape(_short(text)))
    output.print(table)


def _short(text: str) -> str:
    """Return the text on one line, truncated to the maximum length."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}…"


def everything(compared: Compared) -> dict[str, Any]:
    """Return all metrics of a comparison, and each model's answer to each example."""
    likely = Nll.name in compared.comparison.metrics
    first, second = compared.answers
    rows = zip(compared.questions.examples, first.results, second.results, strict=True)
    return {
        "a": _model(compared.models[0], first),
        "b": _model(compared.models[1], second),
        "data": compared.questions.origin,
        "max_tokens": compared.questions.max_tokens,
        "direction": compared.comparison.direction.value,
        **compared.comparison.model_dump(mode="json"),
        "judge": compared.judge and compared.judge.model_dump(mode="json"),
        "answers": [
            {"example": example.as_dict(), "a": _result(one, likely=likely), "b": _result(other, likely=likely)}
            for example, one, other in rows
        ],
    }


def _model(model: Model, answers: Answers) -> dict[str, Any]:
    revision = model.revision if isinstance(model, LocalModel) else None
    return {"name": str(model), "revision": revision, "kept": answers.kept}


def _result(result: ExampleResult, *, likely: bool) -> dict[str, Any]:
    """Convert a result to JSON values. Likelihoods are included only if they are known for both models."""
    return result.model_dump(mode="json", exclude={"scores"} if likely else {"scores", "nll", "scored", "logprob"})

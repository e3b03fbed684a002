"""A version's parity report as one HTML page that needs nothing else: tables, and a picture of the differences."""

from collections.abc import Iterable, Sequence
from html import escape

from svc.registry.parity import Differences, ParityReport

PARITY_PAGE = "parity.html"
"""In the version's reference folder."""
_WIDTH, _HEIGHT, _MARGIN = 860, 160, 46
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 58rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; margin: 1rem 0 2rem } th, td { text-align: left; padding: .25rem 1rem .25rem 0;
border-bottom: 1px solid #ddd; vertical-align: top } .failed { color: #b00020; font-weight: 600 }
.passed { color: #0a6b2d } svg { background: #fafafa; border: 1px solid #ddd } figcaption { color: #555 }
"""


def parity_page(name: str, report: ParityReport) -> str:
    """The page.

    Args:
        name: of the model.
    """
    failed = len(report.failed)
    verdict = f"{failed} of {len(report.checks)} checks failed" if failed else f"All {len(report.checks)} checks passed"
    parts = [
        f"<h1>{escape(name)}: is what was trained what is served?</h1>",
        f"<p>{verdict}. {report.examples} held-out examples were compared token by token; it took "
        f"{report.seconds:.0f} s.</p>",
        _table(
            ("check", "", "found", "expected"),
            (
                (escape(check.name), _verdict(passed=check.passed), escape(check.found), escape(check.expected))
                for check in report.checks
            ),
        ),
        "<h2>Differences, token by token</h2>",
        "<p>Log-probability of each token of the held-out answers, given all before it: the second less the first.</p>",
        *(_figure(text, differences) for text, differences in report.differences.items()),
        "<h2>On the engine</h2>",
        _speed(report),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Parity of {escape(name)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _verdict(*, passed: bool) -> str:
    return '<span class="passed">passed</span>' if passed else '<span class="failed">failed</span>'


def _speed(report: ParityReport) -> str:
    rows = []
    for format, speed in report.speed.items():
        memory = f"{speed.memory_bytes / 2**20:.0f} MiB" if speed.memory_bytes is not None else "unknown"
        tokens = (f"{streams} at once: {found}" for streams, found in speed.tokens_per_second.items())
        load = str(speed.load_seconds) if speed.load_seconds else "only by a new engine"
        others = f"{speed.others_share:.0%}"
        rows.append((format.value, load, str(speed.first_token_seconds), "<br>".join(tokens), memory, others))
    header = (
        "format",
        "load in place, s",
        "first token, s",
        "tokens/s",
        "memory",
        "processors used by others",
    )
    return _table(header, rows)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of HTML."""
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _figure(text: str, differences: Differences) -> str:
    """One dot for each token, in the order of the examples; a taller axis where differences are larger."""
    values = differences.all
    reach = max(differences.largest, 0.01)
    middle, scale = _HEIGHT / 2, (_HEIGHT / 2 - 12) / reach
    step = (_WIDTH - _MARGIN - 8) / max(1, len(values))
    dots = "".join(
        f'<circle cx="{_MARGIN + step * (at + 0.5):.1f}" cy="{middle - scale * value:.1f}" r="1.6" fill="#2458b3"/>'
        for at, value in enumerate(values)
    )
    labels = "".join(
        f'<text x="4" y="{middle - scale * value + 4:.1f}" font-size="11">{value:+.2f}</text>'
        for value in (reach, 0.0, -reach)
    )
    line = f'<line x1="{_MARGIN}" x2="{_WIDTH}" y1="{middle}" y2="{middle}" stroke="#999"/>'
    diverges = "never"
    if differences.diverges_at is not None:
        example, token = differences.diverges_at
        diverges = f"at example {example + 1}, token {token + 1}"
    caption = (
        f"{differences.mean:.4f} nats a token in the mean, {differences.largest:.3f} at most; negative log-likelihood "
        f"{differences.shift:+.4f}; the likeliest token is the same in {differences.agreement:.1%}, other first: "
        f"{diverges}"
    )
    return (
        f"<figure><h3>{escape(text)}</h3>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" role="img">'
        f"{line}{dots}{labels}</svg>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )

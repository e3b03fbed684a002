"""Which label an answer gives, found as the data check finds the labels of references."""

from svc.dataset.checks.labels import find_label
from svc.dataset.text.plain_text import normal


def label_of(answer: str) -> str:
    """The label, spacing and case aside: of JSON with one value in it, that value; of any other answer its text.

    An answer that is no label has its text as one, which no reference has: it counts as a class that is wrong.
    """
    return normal(find_label(answer) or answer)

"""Whoever waits for an end hears of it once, at once, and no more after he has gone."""

from svc.one_shot_event import OneShotEvent


def test_whoever_listens_hears_of_the_end() -> None:
    signal, heard = OneShotEvent(), list[str]()
    signal.listen(lambda: heard.append("one"))
    signal.listen(lambda: heard.append("two"))
    assert not signal.ended
    error = ValueError()
    signal.end(error)
    assert (signal.ended, signal.error, heard) == (True, error, ["one", "two"])


def test_it_ends_once() -> None:
    signal, heard = OneShotEvent(), list[str]()
    signal.listen(lambda: heard.append("one"))
    signal.end()
    signal.end(ValueError())
    assert (signal.error, heard) == (None, ["one"])


def test_who_comes_after_the_end_hears_of_it_at_once() -> None:
    signal, heard = OneShotEvent(), list[str]()
    signal.end()
    signal.listen(lambda: heard.append("one"))
    assert heard == ["one"]


def test_who_has_gone_hears_nothing() -> None:
    signal, heard = OneShotEvent(), list[str]()

    def listener() -> None:
        heard.append("one")

    signal.listen(listener)
    signal.forget(listener)
    signal.end()
    assert heard == []


def test_who_goes_when_he_hears_keeps_nobody_else_from_hearing() -> None:
    signal, heard = OneShotEvent(), list[str]()

    def first() -> None:
        signal.forget(first)

    signal.listen(first)
    signal.listen(lambda: heard.append("second"))
    signal.end()
    assert heard == ["second"]

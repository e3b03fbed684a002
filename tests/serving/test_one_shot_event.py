"""Tests that every listener is called once and immediately, and is not called after it was removed."""

from serving.one_shot_event import OneShotEvent


def test_one_shot_event_calls_all_callbacks() -> None:
    signal, heard = OneShotEvent(), list[str]()
    signal.listen(lambda: heard.append("one"))
    signal.listen(lambda: heard.append("two"))
    assert not signal.ended
    error = ValueError()
    signal.end(error)
    assert (signal.ended, signal.error, heard) == (True, error, ["one", "two"])


def test_one_shot_event_fires_only_once() -> None:
    signal, heard = OneShotEvent(), list[str]()
    signal.listen(lambda: heard.append("one"))
    signal.end()
    signal.end(ValueError())
    assert (signal.error, heard) == (None, ["one"])


def test_callback_added_after_the_event_has_fired_is_called_immediately() -> None:
    signal, heard = OneShotEvent(), list[str]()
    signal.end()
    signal.listen(lambda: heard.append("one"))
    assert heard == ["one"]


def test_removed_callback_is_not_called() -> None:
    signal, heard = OneShotEvent(), list[str]()

    def listener() -> None:
        heard.append("one")

    signal.listen(listener)
    signal.forget(listener)
    signal.end()
    assert heard == []


def test_callback_removing_itself_does_not_prevent_later_callbacks() -> None:
    signal, heard = OneShotEvent(), list[str]()

    def first() -> None:
        signal.forget(first)

    signal.listen(first)
    signal.listen(lambda: heard.append("second"))
    signal.end()
    assert heard == ["second"]

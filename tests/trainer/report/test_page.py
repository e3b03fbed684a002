"""Tests that the report page is complete, safe and independent of its environment."""

import itertools
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine as Store

from svc.dataset.schema.example import ChatExample
from svc.evaluation.comparison import Direction
from svc.evaluation.finding import Advice, Finding, FindingKind
from svc.evaluation.forgetting import Forgetting
from svc.evaluation.intervals import Interval
from svc.evaluation.preference import PairScores, PreferenceReport
from svc.registry.manifest import Manifest
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.settings.rollout import RolloutSettings
from svc.store.audit import Action, AuditEntry
from svc.store.database import open_database
from svc.store.desired import change_desired
from svc.store.rollouts import RolloutOutcome, add_rollout_step, begin_rollout, end_rollout, store_signals
from svc.version import Format, Target, VersionId
from tests.builders.actors import ANN
from tests.builders.judged_versions import LABELS, TEXTS, JudgedVersions, right
from tests.builders.signals import LOSS
from tests.svc.chats import chat
from tests.svc.registry.parity import make_parity
from trainer.report.judged import BASE, ModelComparison
from trainer.report.page import duration, report_page, say_verdict
from trainer.report.report import gather_report

pytestmark = pytest.mark.slow

ANSWERS = {BASE: right(LABELS, 10), "merged": right(LABELS, 50), "gptq": right(LABELS, 45)}
SCRIPT = "<script>alert(1)</script>"
_VOID = {"meta", "use", "path", "link", "br", "img"}


class Page(HTMLParser):
    """The elements of a page as parsed by a browser."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.ids: Counter[str] = Counter()
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids.update(value for name, value in attrs if name == "id" and value)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_truncated_answers_are_counted_and_marked_in_the_report(versions: JudgedVersions) -> None:
    report = gather_report(versions.registry, versions.publish(LABELS, {"merged": right(LABELS, 0)}).id)
    results = list(report.judged.results["merged"])
    results[2] = results[2].model_copy(update={"finish_reason": "length"})
    cut = replace(report, judged=replace(report.judged, results={"merged": results[:3]}))
    whole, marked = Page(report_page(report)), section(report_page(cut), "worst")
    assert "cut off at the limit" in whole.text
    assert "truncated at the token limit" not in whole.text
    assert marked.count("truncated at the token limit") == 1


NOISE = Finding(
    kind=FindingKind.LABEL_NOISE,
    what="two answers to one prompt",
    advice=Advice(key="data.train", value="drop line 7"),
    rule="one prompt, one answer",
)
_SHARE = Interval(value=0.5, low=0.4, high=0.6)
FORGETTING = Forgetting(
    questions="general.jsonl",
    fingerprint="f",
    examples=60,
    before=_SHARE,
    after=_SHARE,
    difference=_SHARE,
    nll_before=_SHARE,
    nll_after=_SHARE,
    nll_difference=_SHARE,
    lost=3,
    gained=1,
)


def page_of(versions: JudgedVersions, made: Manifest) -> str:
    """Return the report page of a version."""
    return report_page(gather_report(versions.registry, made.id))


def section(page: str, name: str) -> str:
    """Return a section of the page by name."""
    [found] = re.findall(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
    return str(found)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, tracking: Tracking, run: str) -> str:
    """Return the report page of a version that has all files."""
    versions = JudgedVersions(Registry(tmp_path_factory.mktemp("page") / "models", tracking), "report-page", run)
    return page_of(versions, versions.publish(LABELS, ANSWERS))


def test_report_page_is_well_formed_and_every_link_has_a_target(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert max(parsed.ids.values()) == 1
    links = {value for _, name, value in parsed.attributes if name in ("href", "xlink:href")}
    assert links <= {f"#{name}" for name in parsed.ids}


def test_report_page_loads_no_external_resources_and_runs_no_scripts(page: str) -> None:
    parsed = Page(page)
    assert not parsed.tags.keys() & {"script", "iframe", "object", "embed", "link", "img", "form", "base"}
    assert not [
        name for _, name, _ in parsed.attributes if name.startswith("on") or name in ("src", "srcset", "action")
    ]
    assert not re.findall(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", page)
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    assert "script-src" not in policy


ATTACKS = [
    SCRIPT,
    '"><img src=x onerror=alert(1)>',
    "</div></section></main><style>*{display:none}</style>",
    "{{ 7*7 }}{% include 'style.css' %}",
    "</title><svg onload=alert(1)>",
    "&lt;script&gt;",
]


def test_model_and_user_text_is_escaped_in_the_report(versions: JudgedVersions) -> None:
    plain = versions.publish(LABELS[:20], {BASE: ["net"] * 20, "merged": ["x"] * 20}, failed=("x",))
    other = Page(page_of(versions, plain))
    for attack in ATTACKS:
        examples = [chat(f"{attack} {place}", (attack[:40], "net")[place % 2]) for place in range(20)]
        answers = {BASE: [attack] * 20, "merged": [attack] * 10 + ["net"] * 10}
        manifest = versions.publish(
            examples, answers, failed=(attack,), recipe={"name": attack}, libraries={attack: attack}
        )
        found = Page(page_of(versions, manifest))
        assert found.open == []
        assert attack in found.text
        assert found.tags.keys() <= other.tags.keys(), f"{attack} added elements"
        assert not [name for _, name, _ in found.attributes if name.startswith("on")]


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=3, max_size=5))
def test_report_page_is_well_formed_for_arbitrary_answers(versions: JudgedVersions, texts: list[str]) -> None:
    examples = [chat(f"q {place}", "a") for place in range(len(texts))]
    assert Page(page_of(versions, versions.publish(examples, {"merged": texts}))).open == []


def test_report_truncates_a_long_answer_with_a_note(versions: JudgedVersions) -> None:
    answers = ["z" * 300_000, *(example.answer for example in TEXTS[1:])]
    page = page_of(versions, versions.publish(TEXTS, {"merged": answers}))
    assert len(page) < 200_000
    assert "296,000 more characters are not shown" in page


def test_empty_and_blank_answers_are_marked_in_the_report(versions: JudgedVersions) -> None:
    page = page_of(versions, versions.publish(TEXTS[:4], {"merged": ["", "\n ", "x", "y"]}))
    assert page.count(">empty<") == page.count(">only white space<") > 0


def test_rendering_the_report_again_gives_identical_bytes(versions: JudgedVersions) -> None:
    manifest = versions.publish(LABELS, ANSWERS)
    assert page_of(versions, manifest) == page_of(versions, manifest)


def test_report_sections_are_ordered_by_importance(versions: JudgedVersions) -> None:
    answers = {BASE: right(LABELS, 10), "merged": ["x", *right(LABELS, 50)[1:]]}
    manifest = versions.publish(
        LABELS,
        answers,
        findings=(NOISE,),
        forgetting={Format.GPTQ: FORGETTING},
        base_preference=PreferenceReport.of(PairScores(chosen=(-1.0,) * 4, rejected=(-2.0,) * 4)),
    )
    page = page_of(versions, manifest)
    wanted = "diagnosis metrics labels training worst lost side-by-side preferences forgetting parity data made"
    assert re.findall(r'<section id="([^"]*)"', page) == wanted.split()
    assert "data.train: drop line 7" in section(page, "diagnosis")
    assert "3 lost, 1 gained" in section(page, "forgetting")
    assert "4 held-out pairs" in section(page, "preferences")
    assert '<th scope="col">gptq</th>' in section(page, "forgetting")


def tried(store: Store, version: VersionId, reason: str = "better") -> None:
    """Store a rollout of a version, and one of another version."""
    first = Target(VersionId(version.name, version.number + 1), Format.GPTQ)
    seen = change_desired(store, None, first, None)
    entry = AuditEntry(Action.PROMOTE, str(version), ANN, reason)
    for candidate, why in (
        (version, "invalid JSON 30.0% instead of 0.0%"),
        (VersionId(version.name, 9), "another loss"),
    ):
        begun = begin_rollout(store, seen, Target(candidate, Format.GPTQ), RolloutSettings(canary=(5, 100)), entry)
        add_rollout_step(store, begun.id, "canary: the candidate serves 5% of clients")
        store_signals(store, begun.id, (LOSS,))
        end_rollout(store, begun.id, RolloutOutcome.ROLLED_BACK, why)


def test_report_shows_the_measurements_and_outcome_of_each_rollout_of_the_version(
    versions: JudgedVersions, tmp_path: Path
) -> None:
    made = versions.publish(LABELS, ANSWERS)
    store = open_database(tmp_path)
    tried(store, made.id, SCRIPT)
    html = report_page(gather_report(versions.registry, made.id, store))
    parsed, shown = Page(html), Page(section(html, "rollouts")).text
    assert parsed.open == [] and "script" not in parsed.tags
    assert f"Rollout 1, instead of {versions.name}@2: rolled back" in shown
    assert f"by user:ann: {SCRIPT}" in shown
    assert "UTC: invalid JSON 30.0% instead of 0.0%" in shown
    assert "canary: the candidate serves 5% of clients" in shown
    assert re.search(r"invalid\s*0\.000\s*0\.300\s*0\.100\s*0\.500\s*0\.01\s*90\s*failed", shown)
    assert "another loss" not in shown and "Rollout 2" not in shown


def test_report_of_a_version_without_rollouts_has_no_rollout_section(versions: JudgedVersions, tmp_path: Path) -> None:
    made = versions.publish(LABELS, ANSWERS)
    assert 'id="rollouts"' not in report_page(gather_report(versions.registry, made.id, open_database(tmp_path)))


def test_report_says_when_no_training_fault_was_found(versions: JudgedVersions) -> None:
    page = page_of(versions, versions.publish(LABELS, ANSWERS, findings=()))
    assert "No rule found a fault in the training" in section(page, "diagnosis")


def test_sections_without_data_are_omitted_from_the_report(versions: JudgedVersions) -> None:
    page = page_of(versions, versions.publish(TEXTS, {}, parity=None))
    assert re.findall(r'<section id="([^"]*)"', page) == ["diagnosis", "training", "data", "made"]
    assert "only an adapter is registered" in page


def test_failed_check_is_shown_at_the_top_of_the_report(versions: JudgedVersions) -> None:
    manifest = versions.publish(LABELS, ANSWERS, failed=("gptq lost 0.1",), parity=make_parity("template"))
    head, _, rest = page_of(versions, manifest).partition("<main>")
    assert "failed check:</span> gptq lost 0.1" in head
    assert "parity checks passed" not in head
    assert '<span class="bad">failed</span>' in section(rest, "parity")


def test_every_report_plot_has_a_text_alternative(page: str) -> None:
    labels = [value for tag, name, value in Page(page).attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == Page(page).tags["svg"] == 6
    assert all(len(label) > 20 for label in labels)


def test_report_headings_do_not_skip_a_level(page: str) -> None:
    levels = [int(level) for level in re.findall(r"<h(\d)", page)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_every_report_table_has_a_caption_and_its_own_scroll_area(page: str) -> None:
    tags = Page(page).tags
    assert tags["table"] == tags["caption"] == page.count('<div class="scroll" tabindex="0"><table')


def test_report_shows_all_turns_of_a_prompt(versions: JudgedVersions) -> None:
    from svc.dataset.schema.example import Message, Role

    turns = (Message(Role.SYSTEM, "be brief"), Message(Role.USER, "what is it?"), Message(Role.ASSISTANT, "a tool"))
    page = page_of(versions, versions.publish([ChatExample(turns)] * 2, {"merged": ["a tool", "x"]}))
    assert "complete prompt, 2 turns" in page
    assert "be brief" in page


def test_side_by_side_example_shows_the_answers_of_all_models(versions: JudgedVersions) -> None:
    answers = {BASE: right(LABELS, 0), "merged": right(LABELS, 60), "gptq": right(LABELS, 60)}
    first, *_ = re.findall(
        r"<article.*?</article>",
        section(page_of(versions, versions.publish(LABELS, answers)), "side-by-side"),
        re.DOTALL,
    )
    said = Page(first).text
    assert [said.count(text) for text in ("none of them", "✓ exact")] == [1, 2]
    assert re.findall(r'class="name">(\w+)<', first) == ["reference", BASE, "merged", "gptq"]


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (("merged", BASE, Direction.BETTER), "The merged model is better than its base: accuracy 0.500 [0.400, 0.600]"),
        (("gptq", "merged", Direction.WORSE), "The gptq model is worse than the merged model: accuracy"),
        (
            ("gptq", "merged", Direction.UNDECIDED),
            "No significant difference between the gptq model and the merged model",
        ),
    ],
)
def test_report_verdict_is_written_as_a_sentence(verdict: tuple[str, str, Direction], said: str) -> None:
    estimate, change = Interval(value=0.5, low=0.4, high=0.6), Interval(value=-0.1, low=-0.2, high=0.0)
    sentence = say_verdict(ModelComparison(*verdict, estimate, estimate, change), "accuracy")
    assert sentence.startswith(said)
    assert sentence.endswith("a change of −0.100 [−0.200, +0.000].")  # noqa: RUF001 - the sign is meant


@pytest.mark.parametrize(("seconds", "said"), [(9.6, "10 s"), (150, "2 min"), (3 * 3600 + 300, "3 h 5 min")])
def test_report_shows_durations_in_a_suitable_unit(seconds: float, said: str) -> None:
    assert duration(seconds) == said

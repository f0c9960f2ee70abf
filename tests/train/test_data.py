"""Training data: what is read, what is refused and how clearly, how it is split, encoded and padded."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from molora.errors import DataError
from molora.train.data import (
    Collator,
    LabelMap,
    Task,
    encode_classification,
    encode_generation,
    load_tasks,
    parse_spec,
    read_rows,
    split,
)
from molora.train.rows import parse_hub
from tests.tiny import EOS, PAD, tiny_bert_classifier, tiny_llama, tiny_t5


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def plain(rows):
    return [{k: v for k, v in row.items() if k != "where"} for row in rows]


def classification(name="news", count=8, labels=("good", "bad")):
    rows = [
        {"text": f"film {i}", "label": labels[i % len(labels)], "where": f"{name} line {i + 1}"} for i in range(count)
    ]
    return Task(name, rows, "classification")


# ---- reading ----


# Stubs stand in for the two packages, whose __init__ may import more for their own names.
STUBS = """
import sys, types
for name, path in {"molora": "molora", "molora.train": "molora/train"}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
"""


def in_another_process(code, **env):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", STUBS + code]
    done = subprocess.run(command, cwd=root, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_reading_needs_no_torch():
    code = """
import molora.train.data
print([name for name in ("torch", "transformers", "datasets") if name in sys.modules])
"""
    assert in_another_process(code) == "[]"


def test_jsonl(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        '{"text": "x", "label": 1, "more": 2}\n\n{"text": "y\u2028z", "label": true}\r\n',
    )
    rows = read_rows(path)
    assert plain(rows) == [{"text": "x", "label": "1"}, {"text": "y\u2028z", "label": "true"}]
    assert [row["where"] for row in rows] == [f"{path} line 1", f"{path} line 3"]


def test_json_list_and_json_lines_under_the_name_json(tmp_path):
    rows = [{"prompt": "p", "answer": "a"}, {"prompt": "q", "answer": ""}]
    assert plain(read_rows(write(tmp_path / "a.json", json.dumps(rows, indent=1)))) == rows
    assert plain(read_rows(jsonl(tmp_path / "b.json", rows))) == rows


def test_csv_with_byte_order_mark_quotes_and_lines_counted_in_the_file(tmp_path):
    path = write(tmp_path / "a.csv", b'\xef\xbb\xbftext,label\r\n"one, two\nthree",x\r\n\r\nfour,y\r\n')
    rows = read_rows(path)
    assert plain(rows) == [{"text": "one, two\nthree", "label": "x"}, {"text": "four", "label": "y"}]
    assert [row["where"] for row in rows] == [f"{path} line 2", f"{path} line 5"]


def test_plain_text_pairs_and_mapped_columns(tmp_path):
    assert plain(read_rows(jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": ""}]))) == [
        {"text": "x"},
        {"text": ""},
    ]
    path = jsonl(tmp_path / "b.jsonl", [{"premise": "x", "then": "y", "gold": "no", "text": "unused"}])
    fields = {"text": "premise", "text_pair": "then", "label": "gold"}
    assert plain(read_rows(path, fields=fields)) == [{"text": "x", "text_pair": "y", "label": "no"}]


def test_kind_can_be_said(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "l", "prompt": "p", "answer": "a"}])
    assert plain(read_rows(path)) == [{"prompt": "p", "answer": "a"}]
    assert plain(read_rows(path, kind="classification")) == [{"text": "x", "label": "l"}]
    assert plain(read_rows(path, kind="lm")) == [{"text": "x"}]


GOOD = '{"text": "x", "label": "l"}\n'
BAD = {
    "bad json": ("a.jsonl", GOOD + '{"text": "x", }\n', r"a\.jsonl line 2: bad JSON at column 15"),
    "cut json": ("a.jsonl", GOOD + '{"text": "x', r"a\.jsonl line 2: bad JSON"),
    "bad json list": ("a.json", '[\n{"text": "x"},\n]', r"a\.json: bad JSON at line [23] column"),
    "deep json": ("a.jsonl", GOOD + "[" * 100_000 + "\n", r"a\.jsonl line 2: bad JSON"),
    "huge number": ("a.jsonl", GOOD + "9" * 5000 + "\n", r"a\.jsonl line 2: "),
    "not an object": (
        "a.jsonl",
        GOOD + '["x", "l"]\n',
        r"a\.jsonl line 2: a row must be an object .* not list",
    ),
    "not a list": ("a.json", '"x"', r"a\.json: must hold a list of rows, not string 'x'"),
    "row of a list": (
        "a.json",
        '[{"text": "x"}, 3]',
        r"a\.json row 2: a row must be an object .* not number 3",
    ),
    "missing label": (
        "a.jsonl",
        GOOD + '{"text": "x", "lable": "l"}\n',
        r"line 2: field 'label' is missing.*'lable'",
    ),
    "missing text": (
        "a.jsonl",
        GOOD + '{"label": "l"}\n',
        r"line 2: field 'text' is missing.*text=their_name",
    ),
    "null text": (
        "a.jsonl",
        GOOD + '{"text": null, "label": "l"}\n',
        r"line 2: field 'text' must be a string, not null",
    ),
    "number text": (
        "a.jsonl",
        GOOD + '{"text": 5, "label": "l"}\n',
        r"line 2: field 'text' must be .* not number 5",
    ),
    "list label": (
        "a.jsonl",
        GOOD + '{"text": "", "label": ["l"]}\n',
        r"line 2: field 'label' must be .* not list",
    ),
    "float label": (
        "a.jsonl",
        GOOD + '{"text": "", "label": 1.5}\n',
        r"line 2: field 'label' must be .* number 1\.5",
    ),
    "null label": (
        "a.jsonl",
        GOOD + '{"text": "", "label": null}\n',
        r"line 2: field 'label' must be .* not null",
    ),
    "empty label": ("a.csv", "text,label\nx,l\ny,\n", r"a\.csv line 3: field 'label' is empty"),
    "late pair": (
        "a.jsonl",
        GOOD + '{"text": "x", "label": "l", "text_pair": "y"}',
        r"line 2: field 'text_pair' is here",
    ),
    "lost pair": (
        "a.jsonl",
        '{"text": "", "label": "l", "text_pair": ""}\n' + GOOD,
        r"line 2: field 'text_pair' is mis",
    ),
    "other kind": ("a.jsonl", GOOD + '{"prompt": "x", "answer": "l"}\n', r"line 2: field 'text' is missing"),
    "no kind": (
        "a.jsonl",
        '{"headline": "x"}\n',
        r"line 1: columns 'headline' are no kind.*needed: text \+ label",
    ),
    "surrogate": (
        "a.jsonl",
        GOOD + '{"text": "\\ud800", "label": "l"}\n',
        r"line 2: field 'text' is not valid Unicode",
    ),
    "encoding": (
        "a.jsonl",
        GOOD.encode() + b'{"text": "caf\xe9"}\n',
        r"a\.jsonl line 2: not UTF-8 \(byte 0xe9\)",
    ),
    "empty": ("a.jsonl", " \n", r"a\.jsonl: the file is empty"),
    "empty list": ("a.json", "[]", r"a\.json: no rows"),
    "header only": ("a.csv", "text,label\n", r"a\.csv: no rows"),
    "ragged": (
        "a.csv",
        "text,label\nx,l\nx,y,l\n",
        r"a\.csv line 3: 3 cells where the header has 2 \(text, label\)",
    ),
    "open quote": ("a.csv", 'text,label\nx,l\n"x,l\n', r"a\.csv line 3: bad CSV"),
    "twice": ("a.csv", "text,text\nx,l\n", r"a\.csv line 1: the header names a column twice"),
    "long cell": ("a.csv", "text,label\n" + "x" * 200_000 + ",l\n", r"a\.csv line 2: bad CSV: field larger"),
    "ending": (
        "a.parquet",
        "x",
        r"a\.parquet: cannot read '\.parquet' files; use \.jsonl, \.json, \.csv, or hf:",
    ),
    "no ending": ("data", "x", r"data: cannot read a name without an ending"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_one_clear_line(case, tmp_path):
    name, text, message = BAD[case]
    with pytest.raises(DataError, match=message) as error:
        read_rows(write(tmp_path / name, text))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_a_missing_file_names_its_neighbour(tmp_path):
    jsonl(tmp_path / "news.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match=r"new\.jsonl: no such file; did you mean 'news\.jsonl'\?$"):
        read_rows(str(tmp_path / "new.jsonl"))
    with pytest.raises(DataError, match=r"zzzzzz\.csv: no such file$"):
        read_rows(str(tmp_path / "zzzzzz.csv"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder\.jsonl: cannot be read"):
        read_rows(str(tmp_path / "folder.jsonl"))


def test_unknown_options(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="'lable' is no field of molora; did you mean 'label'"):
        read_rows(path, fields={"lable": "x"})
    with pytest.raises(DataError, match="kind of data 'classify' is unknown"):
        read_rows(path, kind="classify")
    # A mapped column that is absent must not quietly change the kind of data.
    message = r"line 1: no column for field 'label' \('topic'\); columns here: 'text'$"
    with pytest.raises(DataError, match=message):
        read_rows(path, fields={"label": "topic"})
    path = jsonl(tmp_path / "b.jsonl", [{"headline": "x"}, {"text": "x"}])
    with pytest.raises(DataError, match=r"line 2: field 'text' \(column 'headline'\) is missing"):
        read_rows(path, fields={"text": "headline"})


# ---- the Hub ----


@pytest.mark.parametrize(
    ("source", "parts"),
    {
        "hf:imdb": ("imdb", None, "train"),
        "hf:imdb:test": ("imdb", None, "test"),
        "hf:imdb:train[:1000]": ("imdb", None, "train[:1000]"),
        "hf:imdb:train+test": ("imdb", None, "train+test"),
        "hf:glue:sst2": ("glue", "sst2", "train"),
        "hf:glue:sst2:validation[10%:20%]": ("glue", "sst2", "validation[10%:20%]"),
        "hf:org/name::holdout": ("org/name", None, "holdout"),
    }.items(),
)
def test_hub_names(source, parts):
    assert parse_hub(source) == parts


@pytest.mark.parametrize("source", ["hf:", "hf::x", "hf:a:b:c:d", "hf:a:b:"])
def test_bad_hub_names(source):
    with pytest.raises(DataError, match=r"is not hf:name"):
        parse_hub(source)


def test_hub_offline_is_one_clear_error():
    with pytest.raises(
        DataError, match=r"hf:molora/none: cannot load dataset 'molora/none' .*HF_HUB_OFFLINE is set"
    ) as e:
        read_rows("hf:molora/none")
    assert "\n" not in str(e.value)


def test_hub_rows_with_class_names_and_hidden_labels(monkeypatch):
    import datasets

    def load(name, config, split):
        assert (name, config, split) == ("org/news", "small", "test")
        features = datasets.Features(
            {"title": datasets.Value("string"), "label": datasets.ClassLabel(names=["sport", "tech"])}
        )
        return datasets.Dataset.from_dict({"title": ["x", "y", "z"], "label": [1, 0, -1]}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"hf:org/news:small:test row 3: field 'label' must be .* not null"):
        read_rows("hf:org/news:small:test", fields={"text": "title"})
    assert plain(read_rows("hf:org/news:small:test", fields={"text": "title"}, kind="lm")) == [
        {"text": "x"},
        {"text": "y"},
        {"text": "z"},
    ]


# ---- tasks ----


def test_tasks_keep_the_order_given(tmp_path):
    a = jsonl(tmp_path / "zebra.jsonl", [{"text": "x", "label": "l"}])
    b = jsonl(tmp_path / "ant.jsonl", [{"text": "y", "label": "m"}])
    tasks = load_tasks([a, f"bug={b}"])
    assert [(task.name, task.kind, len(task.rows)) for task in tasks] == [
        ("zebra", "classification", 1),
        ("bug", "classification", 1),
    ]


def test_all_problems_of_the_tasks_at_once(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", [{"text": "x", "label": "l"}])
    b = jsonl(tmp_path / "b.jsonl", [{"prompt": "x", "answer": "l"}])
    with pytest.raises(DataError) as error:
        load_tasks([a, f"a={b}", str(tmp_path / "none.csv"), "bad name=x.csv"])
    text = str(error.value)
    assert "task name 'a' is given 2 times" in text
    assert "one run takes one kind of data, but a is classification, a is generation" in text
    assert "none.csv: no such file" in text
    with pytest.raises(DataError, match=r"^data: .*task name 'a' is given 2 times"):
        load_tasks([a, a])
    with pytest.raises(DataError, match=r"one kind of data, but a is classification, b is generation"):
        load_tasks([a, b])
    with pytest.raises(DataError, match="no data given"):
        load_tasks([])


def test_specs(tmp_path, monkeypatch):
    assert parse_spec("news=data/x.csv") == ("news", "data/x.csv")
    assert parse_spec("runs=1/news.csv") == ("runs", "1/news.csv")
    assert parse_spec("data/runs=1/news.csv") == ("news", "data/runs=1/news.csv")
    assert parse_spec("data/news.v2.jsonl") == ("news.v2", "data/news.v2.jsonl")
    assert parse_spec("hf:org/ag_news:train") == ("ag_news", "hf:org/ag_news:train")
    assert parse_spec("t=hf:glue:sst2") == ("t", "hf:glue:sst2")
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "x=1.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match="'x=1' cannot be a task name"):
        parse_spec("x=1.jsonl")
    with pytest.raises(DataError, match="'news=' names no data"):
        parse_spec("news=")


# ---- labels ----


def test_label_ids_are_consecutive_per_task_and_do_not_depend_on_row_order():
    tasks = [classification("b", labels=("10", "9", "2")), classification("a", labels=("x", "good/bad"))]
    labels = LabelMap.from_tasks(tasks)
    assert labels.names == ["b/2", "b/9", "b/10", "a/good/bad", "a/x"]
    assert len(labels) == 5
    assert (labels.slice("b"), labels.slice("a")) == (slice(0, 3), slice(3, 5))
    assert (labels.task_id("b"), labels.task_id("a")) == (0, 1)
    assert labels.encode("b", 10) == labels.encode("b", "10") == 2
    assert [labels.encode(*labels.decode(i)) for i in range(5)] == list(range(5))
    for task in tasks:
        random.shuffle(task.rows)
    assert LabelMap.from_tasks(tasks) == labels


def test_unseen_labels_and_tasks():
    labels = LabelMap.from_tasks([classification()])
    message = r"news\.csv line 7: label .goood. of task .news. was unseen at training.* mean .good.*bad, good"
    with pytest.raises(DataError, match=message):
        labels.encode("news", "goood", "news.csv line 7")
    with pytest.raises(DataError, match="task 'new' was not trained; did you mean 'news'"):
        labels.slice("new")
    with pytest.raises(DataError, match="label id 2 is out of range"):
        labels.decode(2)
    with pytest.raises(DataError, match="task 'one' has fewer than two labels"):
        LabelMap.from_tasks([classification("one", labels=("x",))])
    with pytest.raises(DataError, match="task 't' is lm data and has no labels"):
        LabelMap.from_tasks([Task("t", [{"text": "x"}], "lm")])


def test_label_map_file(tmp_path, monkeypatch):
    labels = LabelMap.from_tasks([classification("b", labels=("é", "x")), classification("a")])
    path = tmp_path / "labels.json"
    labels.save(path)
    assert LabelMap.load(path) == labels
    assert list(LabelMap.load(path).labels) == ["b", "a"]

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            LabelMap.from_tasks([classification("c")]).save(path)
    assert LabelMap.load(path) == labels, "a failed save must leave the old file"
    assert os.listdir(tmp_path) == ["labels.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"format": 2}',
        '{"format": 1, "labels": {"a": "xy"}}',
        '{"format": 1, "labels": {"a": ["x", "x"]}}',
        "\xff",
    ],
)
def test_bad_label_map_files(text, tmp_path):
    path = tmp_path / "labels.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=r"labels\.json: "):
        LabelMap.load(path)
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        LabelMap.load(tmp_path / "none.json")


# ---- the split ----


def test_split_is_stratified_repeatable_and_complete():
    rows = [{"text": str(i), "label": "ab"[i % 5 == 0]} for i in range(100)]
    train, held = split(rows, 0.2, seed=3)
    assert (len(train), len(held)) == (80, 20)
    assert sum(row["label"] == "b" for row in held) == 4
    assert sorted([*train, *held], key=lambda r: int(r["text"])) == rows
    assert [int(r["text"]) for r in train] == sorted(int(r["text"]) for r in train)
    assert split(rows, 0.2, seed=3) == (train, held)
    assert split(rows, 0.2, seed=4) != (train, held)
    assert split(rows, 0.0, seed=3) == (rows, [])


def test_split_is_the_same_in_every_process():
    code = """
from molora.train.tasks import split
rows = [{'text': str(i), 'label': 'abc'[i % 3]} for i in range(30)]
print(*(row['text'] for row in split(rows, 0.3, 1)[1]))
"""
    first = in_another_process(code, PYTHONHASHSEED="1")
    assert len(first.split()) == 9
    assert in_another_process(code, PYTHONHASHSEED="2") == first


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.35, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("sizes", [(1, 9), (2, 2, 2), (1, 1, 1, 3), (50, 1), (3,)])
def test_no_label_of_the_evaluation_part_is_unseen(fraction, sizes):
    rows = [{"text": "x", "label": str(label)} for label, size in enumerate(sizes) for _ in range(size)]
    train, held = split(rows, fraction, seed=0)
    assert held and len(train) + len(held) == len(rows)
    assert {row["label"] for row in train} == {str(label) for label in range(len(sizes))}


def test_split_without_labels_and_bad_fractions():
    rows = [{"prompt": str(i), "answer": "x"} for i in range(10)]
    train, held = split(rows, 0.3, seed=0)
    assert (len(train), len(held)) == (7, 3)
    for fraction in (-0.1, 1.0, 2):
        with pytest.raises(DataError, match=f"eval_fraction {fraction} is out of range"):
            split(rows, fraction, seed=0)
    with pytest.raises(DataError, match="1 rows with 1 labels are too few"):
        split(rows[:1], 0.5, seed=0)


# ---- encoding ----


def test_classification_is_encoded_in_order_with_task_and_label_ids(tokenizer):
    tasks = [classification("b", 3), classification("a", 2, ("x", "y"))]
    labels = LabelMap.from_tasks(tasks)
    data = encode_classification(tasks, tokenizer, labels, max_length=16)
    assert sorted(data.column_names) == ["attention_mask", "input_ids", "labels", "task_ids"]
    assert data["task_ids"][:] == [0, 0, 0, 1, 1]
    assert data["labels"][:] == [1, 0, 1, 2, 3]
    assert data[0]["input_ids"] == tokenizer("film 0")["input_ids"]
    # A part of the tasks keeps its ids, as in evaluation.
    assert encode_classification(tasks[1:], tokenizer, labels, max_length=16)["task_ids"][:] == [1, 1]


def test_classification_cuts_and_pairs(tokenizer):
    rows = [{"text": "film " * 50, "text_pair": "book", "label": x} for x in ("x", "y")]
    pair, single = Task("pair", rows, "classification"), classification()
    labels = LabelMap.from_tasks([pair, single])
    data = encode_classification([pair, single], tokenizer, labels, max_length=12)
    assert len(data[0]["input_ids"]) == 12
    book = tokenizer.convert_tokens_to_ids("book")
    assert data[0]["input_ids"][-1] == book and book not in data[2]["input_ids"]
    if "token_type_ids" in tokenizer.model_input_names:
        assert len(data[2]["token_type_ids"]) == len(data[2]["input_ids"])


def test_encoding_refuses_what_it_cannot_do(tokenizer):
    task = classification()
    labels = LabelMap.from_tasks([task])
    unseen = Task("news", [{"text": "x", "label": "new", "where": "b.csv line 2"}], "classification")
    with pytest.raises(DataError, match=r"b\.csv line 2: label 'new' of task 'news' was unseen at training"):
        encode_classification([unseen], tokenizer, labels, 16)
    with pytest.raises(DataError, match="task 'news' is classification data; needed here: generation or lm"):
        encode_generation([task], tokenizer, 16)
    with pytest.raises(DataError, match="no rows to encode"):
        encode_generation([], tokenizer, 16)
    with pytest.raises(DataError, match="max_length 1 is too short"):
        encode_classification([task], tokenizer, labels, 1)


def generation(pairs, name="qa"):
    rows = [{"prompt": p, "answer": a, "where": f"qa.csv line {i}"} for i, (p, a) in enumerate(pairs, start=2)]
    return Task(name, rows, "generation")


def test_generation_supervises_the_answer_and_its_end_only(tokenizer, recwarn):
    data = encode_generation([generation([("what is it ?", "a good film")])], tokenizer, 32)
    prompt, answer = (
        tokenizer("what is it ?")["input_ids"],
        tokenizer.encode("a good film", add_special_tokens=False),
    )
    assert data[0]["input_ids"] == [*prompt, *answer, EOS]
    assert data[0]["labels"] == [-100] * len(prompt) + [*answer, EOS]
    assert data[0]["attention_mask"] == [1] * len(data[0]["input_ids"])
    assert not recwarn.list


def test_generation_reports_what_it_leaves_out_and_cuts(tokenizer):
    task = generation([("the " * 9, "yes"), ("what ?", "one two three four five six one two"), ("who ?", "no")])
    with pytest.warns(UserWarning) as caught:
        data = encode_generation([task], tokenizer, 8)
    text = str(caught[0].message)
    assert "task 'qa': 1 of 3 rows have prompts that leave no room in 8 tokens and were left out" in text
    assert "qa.csv line 2" in text
    assert "task 'qa': 1 of 3 rows are longer than 8 tokens and were cut (first: qa.csv line 3)" in text
    assert len(data) == 2
    assert len(data[0]["input_ids"]) == 8 and data[0]["labels"][-1] != EOS
    assert data[1]["labels"][-1] == EOS
    assert all(any(label != -100 for label in row["labels"]) for row in data)
    with pytest.raises(DataError, match="no row is left to train on with max_length 3: task 'qa': 3 of 3"):
        encode_generation([task], tokenizer, 3)


def test_generation_takes_the_end_off_prompts(tokenizer):
    from tokenizers import processors

    ends = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.backend_tokenizer.post_processor = ends
    row = encode_generation([generation([("what ?", "yes")])], tokenizer, 32)[0]
    assert row["input_ids"].count(EOS) == 1
    # An encoder-decoder's encoder wants that end, and its labels have a side of their own.
    row = encode_generation([generation([("what ?", "yes")])], tokenizer, 32, encoder_decoder=True)[0]
    assert row["input_ids"] == tokenizer("what ?")["input_ids"]
    assert row["labels"] == [tokenizer.convert_tokens_to_ids("yes"), EOS]


def test_lm_text_is_cut_into_pieces_and_nothing_is_lost(tokenizer):
    rows = [
        {"text": "one two three four five six", "where": "a"},
        {"text": " ", "where": "wiki.jsonl line 2"},
    ]
    with pytest.warns(UserWarning, match=r"1 of 2 rows are empty and were left out \(first: wiki\.jsonl line 2\)"):
        data = encode_generation([Task("wiki", rows, "lm")], tokenizer, 3)
    ids = [i for row in data for i in row["input_ids"]]
    assert ids == [*tokenizer(rows[0]["text"])["input_ids"], EOS]
    assert [len(row["input_ids"]) for row in data] == [3, 3, 2]
    assert all(row["labels"] == row["input_ids"] for row in data)


def test_generation_task_ids_of_a_part_of_the_tasks(tokenizer):
    part = [generation([("what ?", "yes")], name="b")]
    assert encode_generation(part, tokenizer, 16)["task_ids"][:] == [0]
    assert encode_generation(part, tokenizer, 16, task_names=["a", "b"])["task_ids"][:] == [1]
    with pytest.raises(DataError, match="task 'b' was not trained"):
        encode_generation(part, tokenizer, 16, task_names=["a"])


def test_a_tokenizer_without_an_end_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="has no eos token"):
        encode_generation([generation([("what ?", "yes")])], tokenizer, 16)
    tokenizer.pad_token = None
    with pytest.raises(DataError, match="neither a pad nor an eos token"):
        Collator(tokenizer)


# ---- batches ----


def test_classification_batch_trains_a_model(tokenizer):
    tasks = [classification("b", 3), classification("a", 2, ("x", "y"))]
    tasks[0].rows[0]["text"] = "a good film and a bad book"
    labels = LabelMap.from_tasks(tasks)
    data = encode_classification(tasks, tokenizer, labels, max_length=16)
    batch = Collator(tokenizer)([data[i] for i in range(5)])
    task_ids = batch.pop("task_ids")
    assert task_ids.dtype == torch.long and task_ids.tolist() == [0, 0, 0, 1, 1]
    assert batch["labels"].shape == (5,) and batch["labels"].dtype == torch.long
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, 8)
    assert (batch["input_ids"][1, 3:] == PAD).all() and (batch["attention_mask"][1, 3:] == 0).all()
    assert torch.isfinite(tiny_bert_classifier(num_labels=len(labels))(**batch).loss)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_batch_pads_labels_with_the_tokens(tokenizer, side):
    tokenizer.padding_side = side
    task = generation([("what is it ?", "a good film"), ("who ?", "no")])
    data = encode_generation([task], tokenizer, 32)
    batch = Collator(tokenizer, pad_to_multiple_of=8)([data[0], data[1]])
    assert batch["labels"].shape == batch["input_ids"].shape == (2, 16)
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    supervised = batch["labels"] != -100
    assert torch.equal(batch["labels"][supervised], batch["input_ids"][supervised])
    assert supervised.sum(1).tolist() == [4, 2]
    assert batch.pop("task_ids").tolist() == [0, 0]

    # Padding changes nothing: the batch's loss is the mean over both rows' own target tokens.
    model = tiny_llama()
    alone = [model(**{k: torch.tensor([row[k]]) for k in batch}).loss * n for row, n in zip(data, (4, 2), strict=True)]
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    torch.testing.assert_close(model(**batch, position_ids=position_ids).loss, sum(alone) / 6, rtol=1e-5, atol=1e-6)


def test_a_missing_pad_token_is_replaced_in_a_copy(tokenizer):
    tokenizer.pad_token = None
    data = encode_generation([generation([("what is it ?", "a good film"), ("who ?", "no")])], tokenizer, 32)
    batch = Collator(tokenizer)([data[0], data[1]])
    assert tokenizer.pad_token is None
    assert (batch["attention_mask"] == 0).any() and (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_encoder_decoder_batch_trains_a_model(tokenizer):
    task = generation([("what is it ?", "a good film"), ("who ?", "no")])
    data = encode_generation([task], tokenizer, 32, encoder_decoder=True)
    batch = Collator(tokenizer)([data[0], data[1]])
    batch.pop("task_ids")
    assert batch["input_ids"].shape == (2, 5) and batch["labels"].shape == (2, 4)
    assert torch.isfinite(tiny_t5()(**batch).loss)

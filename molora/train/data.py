"""From rows to batches: tokenised data sets with labels and task ids, and the collator that pads them.

The reading itself is in rows.py (files and Hub datasets) and tasks.py (tasks, labels, the split); their
public names can be imported from here too.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from molora.errors import DataError, did_you_mean
from molora.train.rows import Row, read_rows
from molora.train.tasks import LabelMap, Task, kind_of, load_tasks, parse_spec, split

if TYPE_CHECKING:
    import datasets
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Collator",
    "LabelMap",
    "Row",
    "Task",
    "encode_classification",
    "encode_generation",
    "kind_of",
    "load_tasks",
    "parse_spec",
    "read_rows",
    "split",
]

IGNORE = -100  # the label that transformers' losses leave out


def encode_classification(
    tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, label_map: LabelMap, max_length: int
) -> datasets.Dataset:
    """Tokenise classification tasks into one data set, in order; longer texts are cut at `max_length` tokens.

    Returns:
        columns `input_ids` and `attention_mask` (list of int per row), `labels` (int, an id of `label_map`)
        and `task_ids` (int, the task's position in `label_map`, so that a part of the tasks keeps its ids);
        also `token_type_ids` when a task has text pairs and the tokenizer tells them apart.

    Raises:
        DataError: a task of another kind or unseen at training, a label unseen at training.
    """
    import datasets

    _check_tasks(tasks, ("classification",), max_length)
    pairs = any("text_pair" in row for task in tasks for row in task.rows)
    names = ["input_ids", "attention_mask"]
    if pairs and "token_type_ids" in tokenizer.model_input_names:
        names.append("token_type_ids")
    columns: dict[str, list[Any]] = {name: [] for name in (*names, "labels", "task_ids")}
    for task in tasks:
        task_id = label_map.task_id(task.name)
        for row in task.rows:
            columns["labels"].append(label_map.encode(task.name, row["label"], row.get("where")))
            columns["task_ids"].append(task_id)
        # Whether rows have a text_pair is the same for all rows of a task (see read_rows).
        first = [row["text"] for row in task.rows]
        second = [row["text_pair"] for row in task.rows if "text_pair" in row] or None
        tokens = tokenizer(first, second, truncation=True, max_length=max_length) if first else {}
        for name in names:
            columns[name] += tokens.get(name, [])
    return datasets.Dataset.from_dict(columns)


def encode_generation(
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    encoder_decoder: bool = False,
    task_names: Sequence[str] | None = None,
) -> datasets.Dataset:
    """Tokenise generation or lm tasks into one data set, in order.

    A generation row becomes prompt + answer + eos with the prompt's labels at -100; nothing is put between
    prompt and answer, so a space or line end belongs into the data. An answer that is too long is cut; a row
    whose prompt leaves no room for any answer token is left out; both are counted in a UserWarning. An lm
    row becomes its text + eos, in consecutive pieces of `max_length` tokens, every token supervised.

    Args:
        max_length: tokens per row, prompt and answer together; each of the two for an encoder-decoder.
        encoder_decoder: the prompt goes to `input_ids` and the answer to `labels`, with no shared positions.
        task_names: the task names of training in their order, when `tasks` may be a part of them; by default
            ids are positions in `tasks`.

    Returns:
        columns `input_ids`, `attention_mask`, `labels` (lists of int) and `task_ids` (int).

    Raises:
        DataError: a task of another kind or not in `task_names`, a tokenizer without eos, or no row left.
    """
    import datasets

    _check_tasks(tasks, ("generation", "lm"), max_length)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"tokenizer {type(tokenizer).__name__} has no eos token, so an answer could never end; "
            "set tokenizer.eos_token"
        )
    order = list(task_names) if task_names is not None else [task.name for task in tasks]
    columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], "task_ids": []}
    notes: list[str] = []
    for task in tasks:
        if task.name not in order:
            raise DataError(f"task '{task.name}' was not trained{did_you_mean(task.name, order)}")
        if encoder_decoder and task.kind == "lm":
            raise DataError(f"task '{task.name}' is lm data; an encoder-decoder needs prompt and answer")
        encoded, note = _encode_task(task, tokenizer, max_length, encoder_decoder)
        notes += note
        for ids, labels in encoded:
            columns["input_ids"].append(ids)
            columns["attention_mask"].append([1] * len(ids))
            columns["labels"].append(labels)
            columns["task_ids"].append(order.index(task.name))
    if not columns["labels"]:
        raise DataError(f"no row is left to train on with max_length {max_length}: {'; '.join(notes)}")
    if notes:
        warnings.warn("; ".join(notes), UserWarning, stacklevel=2)
    return datasets.Dataset.from_dict(columns)


def _check_tasks(tasks: Sequence[Task], kinds: tuple[str, ...], max_length: int) -> None:
    """Raise a DataError when there is nothing to encode, or nothing of these kinds."""
    if not tasks or not any(task.rows for task in tasks):
        raise DataError("no rows to encode; give at least one task with rows")
    if max_length < 2:
        raise DataError(f"max_length {max_length} is too short; a row needs at least 2 tokens")
    for task in tasks:
        if task.kind not in kinds:
            raise DataError(f"task '{task.name}' is {task.kind} data; needed here: {' or '.join(kinds)}")


def _encode_task(
    task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int, encoder_decoder: bool
) -> tuple[list[tuple[list[int], list[int]]], list[str]]:
    """((input ids, labels) of every row that is kept, notes on what was left out or cut)."""
    eos = tokenizer.eos_token_id
    if task.kind == "lm":
        pieces: list[tuple[list[int], list[int]]] = []
        empty: list[Row] = []
        for row, ids in zip(task.rows, _tokens(tokenizer, [row["text"] for row in task.rows]), strict=True):
            if not row["text"].strip():
                empty.append(row)
                continue
            ids = [*_without_end(ids, tokenizer), eos]
            starts = range(0, len(ids), max_length)
            # A piece of one token predicts nothing.
            pieces += [(p, list(p)) for p in (ids[i : i + max_length] for i in starts) if len(p) > 1]
        return pieces, _note(task, empty, "are empty and were left out")

    prompts = _tokens(tokenizer, [row["prompt"] for row in task.rows])
    answers = _tokens(tokenizer, [row["answer"] for row in task.rows], special=False)
    kept: list[tuple[list[int], list[int]]] = []
    no_room: list[Row] = []
    cut: list[Row] = []
    for row, prompt, answer in zip(task.rows, prompts, answers, strict=True):
        answer = [*answer, eos]
        if encoder_decoder:
            if max(len(prompt), len(answer)) > max_length:
                cut.append(row)
            kept.append((prompt[:max_length], answer[:max_length]))
            continue
        prompt = _without_end(prompt, tokenizer)
        room = max_length - len(prompt)
        if room < 1:
            no_room.append(row)
            continue
        if len(answer) > room:
            cut.append(row)
        answer = answer[:room]
        kept.append((prompt + answer, [IGNORE] * len(prompt) + answer))
    notes = _note(task, no_room, f"have prompts that leave no room in {max_length} tokens and were left out")
    return kept, notes + _note(task, cut, f"are longer than {max_length} tokens and were cut")


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], special: bool = True) -> list[list[int]]:
    """Token ids of each text, uncut."""
    if not texts:
        return []
    # verbose=False: the tokenizer's warning about its own maximum is about models, and cutting is done by us.
    return tokenizer(texts, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids without the eos or sep that some tokenizers put behind every text."""
    ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    return ids[:-1] if len(ids) > 1 and ids[-1] in ends else ids


def _note(task: Task, rows: list[Row], what: str) -> list[str]:
    """[one line on these rows], or [] when there are none."""
    if not rows:
        return []
    first = rows[0].get("where", "a row without origin")
    return [f"task '{task.name}': {len(rows)} of {len(task.rows)} rows {what} (first: {first})"]


class Collator:
    """Pad encoded rows into one batch, with the data collators of transformers.

    `labels` become (B,) long for classification and (B, S) long padded with -100 for generation; `task_ids`
    (B,) long; everything else (B, S), padded on the tokenizer's side.

    Args:
        tokenizer: gives the pad token; eos stands in when it has none (padding is masked, whatever its id).
        pad_to_multiple_of: round S up, for hardware that likes it.

    Raises:
        DataError: the tokenizer has neither a pad nor an eos token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, pad_to_multiple_of: int | None = None) -> None:
        from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token is None:
                raise DataError("the tokenizer has neither a pad nor an eos token; set tokenizer.pad_token")
            tokenizer = copy.deepcopy(tokenizer)  # the caller's tokenizer stays as it is
            tokenizer.pad_token = tokenizer.eos_token
        self._one_label = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=pad_to_multiple_of)
        self._label_per_token = DataCollatorForSeq2Seq(
            tokenizer, label_pad_token_id=IGNORE, pad_to_multiple_of=pad_to_multiple_of
        )

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of B encoded rows."""
        per_token = isinstance(features[0].get("labels"), list)
        # Both collators turn the int column task_ids into a (B,) long tensor.
        return dict((self._label_per_token if per_token else self._one_label)(features))

"""Evaluation against plain loops over single rows."""

import math

import pytest
import torch
from torch.nn import functional as F

import molora
from molora.errors import ConfigError, DataError, LoadError
from molora.train.data import LabelMap, Task, load_tasks
from molora.train.evaluate import Adapter, evaluate, evaluate_adapter, open_adapter
from molora.train.models import load_base
from tests.tiny import EOS, save_tiny, tiny_llama, tiny_tokenizer

LABELS = LabelMap({"mood": ("bad", "good"), "topic": ("health", "matter", "space")})


def wrapped(world, model, task_type, labels=None, tasks=("mood", "topic")):
    base = load_base(world[model], task_type, label_map=labels)
    model = molora.wrap(base.model, {"experts": {"num": 3, "rank": 2}, "selector": {"name": "top_k", "k": 2}})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "molora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return Adapter(model.eval(), base, list(tasks), labels, 64)


@torch.no_grad()
def test_classification_counts_rows_one_by_one(world):
    adapter = wrapped(world, "bert", "seq_cls", LABELS)
    tasks = load_tasks([world["mood"], world["topic"]])
    result = evaluate(adapter, tasks, batch_size=5)
    for task, own in zip(tasks, ([0, 1], [2, 3, 4]), strict=True):
        right, loss, counts = 0, 0.0, {}
        for row in task.rows:
            ids = adapter.base.tokenizer(row["text"], return_tensors="pt")
            logits = adapter.model(**ids).logits[0, own]
            names = LABELS.labels[task.name]
            right += names[int(logits.argmax())] == row["label"]
            loss -= float(logits.log_softmax(-1)[names.index(row["label"])])
            counts[row["label"]] = counts.get(row["label"], 0) + 1
        figures = result.tasks[task.name]
        assert figures["rows"] == len(task.rows)
        assert figures["accuracy"] == pytest.approx(right / len(task.rows))
        assert figures["loss"] == pytest.approx(loss / len(task.rows), rel=1e-4)
        assert figures["majority"] == max(counts.values()) / len(task.rows)


@torch.no_grad()
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_generation_counts_tokens_one_by_one(world, model):
    pairs = model == "t5"
    adapter = wrapped(world, model, "seq2seq_lm" if pairs else "causal_lm", tasks=("qa",))
    (task,) = load_tasks([world["qa"]])
    figures = evaluate(adapter, [task], batch_size=5).tasks["qa"]
    tokenizer, loss, tokens = adapter.base.tokenizer, 0.0, 0
    for row in task.rows:
        answer = [*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], EOS]
        prompt = tokenizer(row["prompt"])["input_ids"]
        if pairs:
            decoder = torch.tensor([[0, *answer[:-1]]])  # T5 starts from the pad token
            logits = adapter.model(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
        else:
            logits = adapter.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        loss += float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        tokens += len(answer)
    assert figures["tokens"] == tokens
    assert figures["loss"] == pytest.approx(loss / tokens, rel=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("model", ["llama", "t5"])
def test_exact_match_finds_what_the_model_says(world, model):
    """Rows whose answer is what greedy decoding of the row alone gives are right, all others are wrong."""
    pairs = model == "t5"
    adapter = wrapped(world, model, "seq2seq_lm" if pairs else "causal_lm", tasks=("qa",))
    tokenizer = adapter.base.tokenizer
    prompts = ["what is film ?", "a long long story of the bank and the market :", "what is star ?", "goal"]
    rows = []
    for i, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = adapter.model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0]
        said = tokenizer.decode(out if pairs else out[ids.shape[1] :], skip_special_tokens=True)
        rows.append({"prompt": prompt, "answer": said if i % 2 == 0 else said + " goal"})
    figures = evaluate(adapter, [Task("qa", rows, "generation")], batch_size=4, max_new_tokens=4).tasks["qa"]
    assert figures["exact_match"] == 0.5
    assert "exact_match" not in evaluate(adapter, [Task("qa", rows, "generation")]).tasks["qa"]


def test_statistics_count_the_same_forwards(world):
    adapter = wrapped(world, "bert", "seq_cls", LABELS)
    (mood,) = load_tasks([world["mood"]])
    usage = evaluate(adapter, [mood], batch_size=7).usage
    tokens = sum(len(adapter.base.tokenizer(row["text"])["input_ids"]) for row in mood.rows)
    assert usage.counted_tasks == ["mood"]
    assert usage.figures(usage.sites[0]).tokens == usage.figures(usage.sites[0], "mood").tokens == tokens


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    """Adapters as molora.save leaves them, made without `molora train`."""
    folder = tmp_path_factory.mktemp("saved")
    classifier = wrapped(world, "bert", "seq_cls", LABELS)
    molora.save(classifier.model, folder / "classifier")
    molora.save(wrapped(world, "llama", "causal_lm").model, folder / "generator")
    return folder


def test_an_adapter_that_molora_did_not_train(saved, world):
    figures = evaluate_adapter(saved / "generator", [world["qa"]], max_new_tokens=0).tasks["qa"]
    expected = evaluate(wrapped(world, "llama", "causal_lm", tasks=()), load_tasks([world["qa"]])).tasks["qa"]
    assert figures == pytest.approx(expected)
    with pytest.raises(LoadError, match=r"a classifier without labels\.json"):
        open_adapter(saved / "classifier")


def test_refused(saved, world, tmp_path):
    LABELS.save(saved / "classifier" / "labels.json")
    with pytest.raises(DataError, match=r"trained on classification data, but qa is generation data"):
        evaluate_adapter(saved / "classifier", [world["qa"]])
    with pytest.raises(DataError, match=r"task 'moods' was not trained; did you mean 'mood'"):
        evaluate_adapter(saved / "classifier", [f"moods={world['mood']}"])
    strange = tmp_path / "mood.jsonl"
    strange.write_text('{"text": "x", "label": "good"}\n{"text": "y", "label": "god"}\n')
    with pytest.raises(DataError, match=r"mood\.jsonl line 2: label 'god' .* unseen at training; did you mean 'good'"):
        evaluate_adapter(saved / "classifier", [str(strange)])
    with pytest.raises(LoadError, match=r"has other values than when"):
        other = save_tiny(tiny_llama(seed=1), tiny_tokenizer(), tmp_path / "other")
        evaluate_adapter(saved / "generator", [world["qa"]], model=str(other))
    with pytest.raises(ConfigError, match=r"model folder '\./gone' does not exist"):
        evaluate_adapter(saved / "generator", [world["qa"]], model="./gone")
    with pytest.raises(LoadError, match="there is no folder"):
        evaluate_adapter("./nowhere", [world["qa"]])
    with pytest.raises(LoadError, match=r"holds no adapter_config\.json, so it is no adapter; give the folder"):
        evaluate_adapter(str(tmp_path), [world["qa"]])

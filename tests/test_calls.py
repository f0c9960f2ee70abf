"""Calls of several threads into one wrapped model: what is given to one of them reaches its own forwards alone.

The threads take turns forward by forward, in an order that is written down, so that a generate() which began first
ends first: what each has been given must survive the end of the other, and nothing may stay behind.
"""

import asyncio
import contextvars
import copy
import pickle
import threading

import pytest
import torch

import molora
from molora.control import tuner_of
from tests.test_tuner import make_experts_act
from tests.tiny import tiny_inputs, tiny_llama, tiny_t5

TASKS = {"granularity": "task", "scorer": {"name": "table", "num_tasks": 3, "spread": 2.0}, "losses": []}
OPTIONS = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}


class Turns:
    """Lets the forwards of named threads run in a given order, such as "abAb": `A` waits until all of `a` is over."""

    def __init__(self, model, order):
        self.order, self.at, self.changed = order, 0, threading.Condition()
        self.over: set[str] = set()
        self.handles = [
            model.register_forward_pre_hook(self.wait, prepend=True),
            model.register_forward_hook(self.next, always_call=True),
        ]

    def wait(self, *_):
        with self.changed:
            mine = threading.current_thread().name
            assert self.changed.wait_for(lambda: self.is_next(mine), 20), f"{mine} waits for ever"

    def is_next(self, name):
        while self.order[self.at].lower() in self.over:
            self.at += 1
        return self.order[self.at] == name

    def next(self, *_):
        with self.changed:
            self.at += 1
            self.changed.notify_all()

    def run(self, **calls):
        """Run each call in a thread of its name; returns what each gave."""
        found = {}

        def one(name, call):
            try:
                found[name] = call()
            except BaseException as error:
                found[name] = error
            with self.changed:
                self.over.add(name)
                self.changed.notify_all()

        threads = [threading.Thread(target=one, args=pair, name=pair[0]) for pair in calls.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        for handle in self.handles:
            handle.remove()
        for result in found.values():
            if isinstance(result, BaseException):
                raise result
        return found


def scores(model, inputs, tokens, **own):
    options = OPTIONS | {"max_new_tokens": tokens, "min_new_tokens": tokens}
    with torch.no_grad():
        return torch.stack(model.generate(**inputs, **options, **own).scores)


@pytest.fixture
def by_task():
    return make_experts_act(molora.wrap(tiny_llama(), "molora", selector="softmax", **TASKS)).eval()


@pytest.mark.parametrize("how", ["argument", "block"])
def test_task_ids_of_two_generations_that_overlap(by_task, how):
    """a begins, b begins, a ends, b goes on; then nothing is given any more."""
    inputs = tiny_inputs(tiny_llama(), batch=2, length=5)
    tasks = {"a": torch.tensor([0, 2]), "b": torch.tensor([1, 1])}

    def call(name, tokens):
        if how == "argument":
            return scores(by_task, inputs, tokens, task_ids=tasks[name])
        with molora.using(by_task, task_ids=tasks[name]):
            return scores(by_task, inputs, tokens)

    want = {"a": call("a", 2), "b": call("b", 4)}
    assert not torch.allclose(want["a"], want["b"][:2])
    got = Turns(tuner_of(by_task).model, "abaAbbb").run(a=lambda: call("a", 2), b=lambda: call("b", 4))
    for name in "ab":
        torch.testing.assert_close(got[name], want[name])
    with pytest.raises(molora.RoutingError, match="task_ids"):
        by_task(**inputs)


def test_a_generation_that_ends_in_the_middle_of_another_takes_nothing_away():
    """Without a cache, what generate() has added is told from the prompt by the length that it began with."""
    recipe = {"granularity": "prompt", "scorer": "linear", "selector": {"name": "top_k", "k": 1}, "losses": []}
    model = make_experts_act(molora.wrap(tiny_llama(), "molora", **recipe)).eval()
    long, short = (tiny_inputs(tiny_llama(), batch=1, length=length, seed=length) for length in (9, 3))
    want = scores(model, long, 2, use_cache=False), scores(model, short, 5, use_cache=False)
    turns = Turns(tuner_of(model).model, "abaAbbbb")
    got = turns.run(
        a=lambda: scores(model, long, 2, use_cache=False), b=lambda: scores(model, short, 5, use_cache=False)
    )
    torch.testing.assert_close(got["a"], want[0])
    torch.testing.assert_close(got["b"], want[1])


def test_a_decoder_gets_the_token_ids_of_its_own_encoder():
    """A hash router of cross-attention looks at token ids, which generate() shows the encoder alone."""
    recipe = {"scorer": {"name": "hash", "seed": 1}, "selector": {"name": "top_k", "k": 1, "normalise": "sumk"}}
    targets = {"target_modules": ["EncDecAttention.k", "EncDecAttention.v"]}
    model = make_experts_act(molora.wrap(tiny_t5(), "molora", **recipe, **targets, losses=[])).eval()
    first, second = (tiny_inputs(tiny_t5(), batch=1, length=6, seed=seed) for seed in (1, 2))
    want = scores(model, first, 3), scores(model, second, 3)
    encoders = threading.Barrier(2)

    def both(*_):
        encoders.wait(20)

    hook = tuner_of(model).model.get_encoder().register_forward_hook(both)
    got = Turns(tuner_of(model).model, "ababaAb").run(
        a=lambda: scores(model, first, 3), b=lambda: scores(model, second, 3)
    )
    hook.remove()
    torch.testing.assert_close(got["a"], want[0])
    torch.testing.assert_close(got["b"], want[1])


def test_tasks_of_asyncio_are_told_apart_too(by_task):
    inputs = tiny_inputs(tiny_llama(), batch=2, length=5)
    want = [by_task(**inputs, task_ids=torch.tensor([task, task])).logits for task in range(3)]

    turns = threading.Lock()  # a model runs one forward at a time

    def there():
        with turns:
            return by_task(**inputs).logits

    async def one(task):
        with molora.using(by_task, task_ids=torch.tensor([task, task])):
            await asyncio.sleep(0.001 * (3 - task))
            return there(), await asyncio.to_thread(there)

    async def all_of_them():
        return [await one(0), *await asyncio.gather(*(one(task) for task in (1, 2)))]

    for got, expected in zip(asyncio.run(all_of_them()), want, strict=True):
        torch.testing.assert_close(got[0], expected)
        torch.testing.assert_close(got[1], expected)


def test_blocks_nest_and_belong_to_one_model(by_task):
    inputs = tiny_inputs(tiny_llama(), batch=1, length=4)
    other = copy.deepcopy(by_task)

    def said(model, **own):
        return model(**inputs, **own).logits

    want = [said(by_task, task_ids=torch.tensor([task])) for task in range(3)]
    with molora.using(by_task, task_ids=torch.tensor([0])):
        with molora.using(by_task, task_ids=torch.tensor([1])):
            torch.testing.assert_close(said(by_task), want[1])
            torch.testing.assert_close(said(by_task, task_ids=torch.tensor([2])), want[2])
        torch.testing.assert_close(said(by_task), want[0])
        with pytest.raises(molora.RoutingError, match="task_ids"):
            said(other)
        copied = pickle.loads(pickle.dumps(by_task))  # a copy starts with nothing
        with pytest.raises(molora.RoutingError, match="task_ids"):
            said(copied)


def test_compiled_models_see_what_a_block_gives():
    torch._dynamo.reset()
    recipe = {"granularity": "prompt", "scorer": "linear", "selector": {"name": "top_k", "k": 1}, "losses": []}
    model = make_experts_act(molora.wrap(tiny_llama(num_hidden_layers=1), "molora", **recipe)).eval()
    inputs = tiny_inputs(tiny_llama(), batch=2, length=6) | {"use_cache": False}
    masks = [torch.zeros(2, 6, dtype=torch.long).index_fill(1, torch.tensor(columns), 1) for columns in ([0], [3, 4])]
    with torch.no_grad():
        want = [model(**inputs, prompt_mask=mask).logits for mask in masks]
        assert not torch.allclose(*want)
        run = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(2):
            for mask, expected in zip(masks, want, strict=True):
                with molora.using(model, prompt_mask=mask):
                    torch.testing.assert_close(run(**inputs).logits, expected)
                torch.testing.assert_close(run(**inputs, prompt_mask=mask).logits, expected)


def test_a_block_may_be_left_in_another_context(by_task):
    """As of a generator whose steps a server runs in one worker thread after another."""
    inputs = tiny_inputs(tiny_llama(), batch=1, length=4)

    def steps():
        with molora.using(by_task, task_ids=torch.tensor([0])):
            yield
        yield

    running = steps()
    for _ in range(2):
        contextvars.copy_context().run(next, running)
    assert tuner_of(by_task).hooks.calls._open == []
    with pytest.raises(molora.RoutingError, match="task_ids"):
        by_task(**inputs)

"""The auxiliary loss reaches the routers with exactly the gradient that the whole optimizer batch asks for.

Reference: one plain loop over all micro-batches, no checkpointing, no Trainer; the auxiliary loss of each micro-batch
weighs as much as its share of the supervised tokens (trap 1 and 2 of the design, specs/field.md section 4).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import molora
from tests.tiny import tiny_bert_classifier, tiny_llama

RECIPE = {
    "experts": {"num": 4, "rank": 2},
    "selector": {"name": "top_k", "k": 2},
    "losses": [{"name": "switch_balance", "weight": 0.5}, {"name": "router_z", "weight": 0.1}],
}
ROWS, LENGTH = 8, 12


def rows(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Eight rows of twelve tokens with very different numbers of labels and of padding."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(ROWS):
        ids = torch.randint(4, 90, (LENGTH,), generator=generator)
        mask = torch.ones(LENGTH, dtype=torch.long)
        if i % 3 == 1:
            mask[9:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[: i + 1] = -100
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made


def wrapped(**changes):
    torch.manual_seed(1)
    model = molora.wrap(tiny_llama(), RECIPE, **changes)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith(".Bt"):
            parameter.data.normal_(std=0.3, generator=generator)
    return model.train()


def router_gradients(model) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if "molora_router" in name and parameter.grad is not None
    }


def stack(batch: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}


def reference(micro: int) -> dict[str, torch.Tensor]:
    """Gradient of sum over micro-batches of (CE summed over its labels + its labels * aux) / all labels."""
    model = wrapped()
    data = rows()
    total = sum((row["labels"][1:] != -100).sum() for row in data)
    for start in range(0, ROWS, micro):
        batch = stack(data[start : start + micro])
        labels = batch.pop("labels")
        logits = model(**batch).logits[:, :-1]
        cross = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )
        share = (labels[:, 1:] != -100).sum() / total
        aux = sum(molora.control.trace_of(model).aux.live)
        molora.drop_aux(model)
        (cross / total + share * aux).backward()
    return router_gradients(model)


def trained(tmp_path, micro: int, steps: int, checkpointing: str, trainer_options=None, attach=False, **options):
    model = wrapped()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=steps,
        max_steps=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        optim="sgd",
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=checkpointing != "none",
        gradient_checkpointing_kwargs=(
            None if checkpointing == "none" else {"use_reentrant": checkpointing == "reentrant"}
        ),
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        data_collator=stack,
        **(trainer_options or {}),
    )
    trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(rows())
    if attach:
        molora.attach(trainer)
        molora.attach(trainer)  # twice must not count twice
    kept: dict[str, torch.Tensor] = {}
    trainer.create_optimizer()
    step = trainer.optimizer.step

    def keep_then_step(*args, **kwargs):
        kept.update(router_gradients(model))
        return step(*args, **kwargs)

    trainer.optimizer.step = keep_then_step
    trainer.train()
    return kept


def assert_equal(found, wanted, tolerance=1e-5):
    assert set(found) == set(wanted) and wanted
    for name, gradient in wanted.items():
        error = (found[name] - gradient).norm() / gradient.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


CHECKPOINTING = ["none", "non-reentrant", "reentrant"]
STEPS = [1, 4]


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("attach", [False, True])
def test_trainer(tmp_path, checkpointing, steps, attach):
    found = trained(tmp_path, ROWS // steps, steps, checkpointing, attach=attach)
    assert_equal(found, reference(ROWS // steps))


def test_the_reference_depends_on_the_auxiliary_loss():
    """Without the auxiliary loss the router gradients are far from the reference, so the tests above can fail."""
    model = wrapped(losses=[])
    data = rows()
    total = sum((row["labels"][1:] != -100).sum() for row in data)
    model(**stack(data), num_items_in_batch=total).loss.backward()
    without, wanted = router_gradients(model), reference(ROWS)
    name = next(iter(wanted))
    assert (without[name] - wanted[name]).norm() / wanted[name].norm() > 0.05


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("steps", STEPS)
def test_custom_loss_function(tmp_path, checkpointing, steps):
    """compute_loss_func takes the labels away from the model; attach() adds the auxiliary loss to what it returns."""

    def loss_function(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"][:, :-1].flatten(0, 1).float()
        cross = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        return cross / num_items_in_batch

    options = {"compute_loss_func": loss_function}
    found = trained(tmp_path, ROWS // steps, steps, checkpointing, trainer_options=options, attach=True)
    assert_equal(found, reference(ROWS // steps))


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("steps", STEPS)
def test_label_smoothing(tmp_path, checkpointing, steps):
    """The part of the gradient that the auxiliary loss adds is the same as without smoothing."""
    kind = f"{checkpointing}-{steps}"
    full = trained(tmp_path / kind, ROWS // steps, steps, checkpointing, attach=True, label_smoothing_factor=0.1)
    plain = {}
    weights, RECIPE["losses"] = RECIPE["losses"], []
    try:
        plain = trained(tmp_path / "plain", ROWS // steps, steps, "none", attach=True, label_smoothing_factor=0.1)
        without = reference_without(ROWS // steps)
    finally:
        RECIPE["losses"] = weights
    added = {name: full[name] - plain[name] for name in full}
    wanted = reference(ROWS // steps)
    assert_equal(added, {name: wanted[name] - without[name] for name in wanted}, tolerance=2e-5)


def reference_without(micro: int) -> dict[str, torch.Tensor]:
    model = wrapped(losses=[])
    data = rows()
    total = sum((row["labels"][1:] != -100).sum() for row in data)
    for start in range(0, ROWS, micro):
        model(**stack(data[start : start + micro]), num_items_in_batch=total).loss.backward()
    return router_gradients(model)


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_raw_loop(checkpointing):
    """add_aux in a loop of one's own, with a loss that is scaled afterwards (as a GradScaler does)."""
    model = wrapped()
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    batch = stack(rows())
    labels = batch.pop("labels")
    total = (labels[:, 1:] != -100).sum()
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    cross = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    loss = molora.add_aux(model, cross / total)
    (loss * 1024).backward()
    found = {name: gradient / 1024 for name, gradient in router_gradients(model).items()}
    assert_equal(found, reference(ROWS))


@pytest.mark.parametrize("share", ["group", "block", "model"])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_shared_decisions(share, checkpointing):
    """A router shared by a block or a model gets the same gradient under checkpointing, or a clear refusal."""

    def gradients(mode):
        model = wrapped(share=share)
        if mode != "none":
            model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        model(**stack(rows())).loss.backward()
        return router_gradients(model)

    if share == "model" and checkpointing == "reentrant":
        with pytest.raises(molora.RoutingError, match="use_reentrant"):
            gradients(checkpointing)
        return
    assert_equal(gradients(checkpointing), gradients("none"))


def test_value_is_reported_alike_in_every_mode():
    values = []
    for mode in CHECKPOINTING:
        model = wrapped()
        if mode != "none":
            model.gradient_checkpointing_enable({"use_reentrant": mode == "reentrant"})
        out = model(**stack(rows()))
        values.append((float(out.loss), float(out.aux_loss)))
        assert not out.aux_loss.requires_grad
    torch.testing.assert_close(torch.tensor(values[1]), torch.tensor(values[0]))
    torch.testing.assert_close(torch.tensor(values[2]), torch.tensor(values[0]))


def test_evaluation_loss_is_pure():
    model = wrapped()
    batch = stack(rows())
    with torch.no_grad():
        in_training_mode = model(**batch)
    out = model.eval()(**batch)
    labels = batch["labels"][:, 1:].flatten()
    cross = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels, ignore_index=-100)
    torch.testing.assert_close(out.loss, cross)
    torch.testing.assert_close(in_training_mode.loss, cross)
    assert getattr(out, "aux_loss", None) is None


def test_unused_auxiliary_loss_is_said_by_the_next_forward():
    model = wrapped()
    batch = stack(rows())
    labels = batch.pop("labels")
    model(**batch)
    with pytest.raises(molora.AuxLossError, match="add_aux"):
        model(**batch)
    model(**batch)  # said once, then training goes on
    molora.drop_aux(model)
    model(**batch)
    with torch.no_grad():
        model(**batch)  # a forward without gradients disturbs nothing
    loss = molora.add_aux(model, torch.zeros(()))
    assert loss > 0
    model(**batch, labels=labels)


def test_a_reentrant_backward_without_add_aux_is_an_error():
    model = wrapped()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    batch = stack(rows())
    batch.pop("labels")
    out = model(**batch)
    with pytest.raises(molora.AuxLossError, match="attach"):
        out.logits.sum().backward()


def test_forward_without_gradients_between_forward_and_backward():
    """A reference model's forward must not change the masks that a recompute in backward reads."""

    def gradients(disturb):
        model = wrapped(granularity="prompt")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        out = model(**stack(rows()))
        if disturb:
            with torch.no_grad(), model.disable_adapter():
                model(input_ids=torch.randint(4, 90, (ROWS, LENGTH)))
            with torch.no_grad():
                model(input_ids=torch.randint(4, 90, (ROWS, LENGTH)))
        out.loss.backward()
        return router_gradients(model)

    assert_equal(gradients(True), gradients(False))


def test_tuple_outputs():
    model = wrapped()
    batch = stack(rows())
    wanted = model(**batch).loss
    torch.testing.assert_close(model(**batch, return_dict=False)[0], wanted)


def test_classifier_gradient_under_accumulation(tmp_path):
    """Labels of a classifier are one per row and are not shifted: the shares are rows / all rows."""
    torch.manual_seed(0)
    model = molora.wrap(tiny_bert_classifier(), RECIPE).train()
    batch = {"input_ids": torch.randint(4, 90, (4, 7)), "labels": torch.tensor([0, 1, 2, 0])}
    out = model(**batch, num_items_in_batch=torch.tensor(16))
    pure = torch.nn.functional.cross_entropy(out.logits, batch["labels"])
    torch.testing.assert_close(out.loss, pure + 4 / 16 * out.aux_loss)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, dict[str, list]]:
    """Router gradients of one optimizer step over two gloo processes, for every way of training."""
    out = tmp_path_factory.mktemp("ddp") / "gradients.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    root = Path(__file__).parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", "tests.ddp_gradients", str(out)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("steps", STEPS)
def test_two_processes(two_processes, checkpointing, steps):
    """DDP: the same router gradients as one process that sees all rows."""
    found = two_processes[f"{checkpointing} {steps}"]
    assert_equal({name: torch.tensor(values) for name, values in found.items()}, reference_of_pairs(steps))


@pytest.mark.parametrize("share", ["site", "block", "model"])
def test_fully_sharded(two_processes, share):
    """FSDP2: the same router gradients as one process, whoever shares the router."""
    model, data = wrapped(share=share), rows()
    total = sum((row["labels"][1:] != -100).sum() for row in data)
    for start in (0, ROWS // 2):
        model(**stack(data[start : start + ROWS // 2]), num_items_in_batch=total).loss.backward()
    found = two_processes[f"fsdp {share}"]
    assert_equal({name: torch.tensor(values) for name, values in found.items()}, router_gradients(model))


def test_fully_sharded_in_half_precision(two_processes):
    """FSDP2 that gathers in bfloat16: routers still decide in float32, with the same gradients but for rounding.

    All experts act, since which are the best two may change by rounding.
    """
    model, data = wrapped(selector="softmax"), rows()
    total = sum((row["labels"][1:] != -100).sum() for row in data)
    for start in (0, ROWS // 2):
        model(**stack(data[start : start + ROWS // 2]), num_items_in_batch=total).loss.backward()
    wanted = router_gradients(model)
    found = {name: torch.tensor(values) for name, values in two_processes["fsdp bfloat16"].items()}
    assert found.keys() == wanted.keys()
    mine, exact = (torch.cat([gradients[name].flatten() for name in wanted]) for gradients in (found, wanted))
    assert torch.linalg.vector_norm(mine - exact) < 0.1 * torch.linalg.vector_norm(exact)


def reference_of_pairs(steps: int) -> dict[str, torch.Tensor]:
    """The reference with the micro-batches that two processes form from a sequential sampler."""
    model = wrapped()
    data = rows()
    total = sum((row["labels"][1:] != -100).sum() for row in data)
    micro = ROWS // (2 * steps)
    for start in range(0, ROWS, 2 * micro):
        for rank in range(2):
            batch = stack(data[start + rank * micro : start + (rank + 1) * micro])
            labels = batch.pop("labels")
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            cross = torch.nn.functional.cross_entropy(
                logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            share = (labels[:, 1:] != -100).sum() / total
            loss = molora.add_aux(model, cross / total, share)
            loss.backward()
    return router_gradients(model)

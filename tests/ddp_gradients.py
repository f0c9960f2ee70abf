"""Router gradients of one Trainer step under DDP for each way of training, and under FSDP2.

Rank 0 writes them as JSON; test_aux_exact.py starts it with torch.distributed.run.
"""

import json
import sys
import tempfile

import torch

torch.set_num_threads(1)

from transformers import Trainer, TrainingArguments  # noqa: E402

from tests.test_aux_exact import CHECKPOINTING, ROWS, STEPS, router_gradients, rows, stack, wrapped  # noqa: E402


def gradients(checkpointing: str, steps: int) -> dict[str, torch.Tensor]:
    """Train one optimizer step of `steps` micro-batches per process and return the gradients of the routers."""
    model = wrapped()
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=ROWS // (2 * steps),
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
        ddp_find_unused_parameters=False,
        gradient_checkpointing=checkpointing != "none",
        gradient_checkpointing_kwargs=(
            None if checkpointing == "none" else {"use_reentrant": checkpointing == "reentrant"}
        ),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), data_collator=stack)
    trainer._get_train_sampler = lambda *args, **kwargs: torch.utils.data.SequentialSampler(rows())
    kept = {}
    trainer.create_optimizer()
    step = trainer.optimizer.step

    def keep_then_step(*args, **kwargs):
        kept.update(router_gradients(model))
        return step(*args, **kwargs)

    trainer.optimizer.step = keep_then_step
    trainer.train()
    return kept


def sharded_gradients(dtype: torch.dtype | None = None, **changes: str) -> dict[str, torch.Tensor]:
    """Return the router gradients of one forward and backward under FSDP2, each process with half of the rows.

    Args:
        dtype: that FSDP gathers parameters in, as Trainer's `bf16=True` asks of it.
        changes: of the recipe.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model, data = wrapped(**changes), rows()
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    rank, half = torch.distributed.get_rank(), ROWS // 2
    total = sum((row["labels"][1:] != -100).sum() for row in data)
    loss = model(**stack(data[rank * half : (rank + 1) * half]), num_items_in_batch=total).loss
    (loss * 2).backward()  # as Trainer does, to undo the average over two processes
    parameters = [(n, p) for n, p in model.named_parameters() if "molora_router" in n and p.grad is not None]
    return {name: parameter.grad.full_tensor() for name, parameter in parameters}


def main(out: str) -> None:
    """Write the gradients of every way of training as JSON."""
    found = {
        f"{checkpointing} {steps}": {name: g.tolist() for name, g in gradients(checkpointing, steps).items()}
        for checkpointing in CHECKPOINTING
        for steps in STEPS
    }
    for share in ("site", "block", "model"):
        found[f"fsdp {share}"] = {name: g.tolist() for name, g in sharded_gradients(share=share).items()}
    half = sharded_gradients(torch.bfloat16, selector="softmax")
    found["fsdp bfloat16"] = {name: g.tolist() for name, g in half.items()}
    if torch.distributed.get_rank() == 0:
        with open(out, "w") as file:
            json.dump(found, file)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])

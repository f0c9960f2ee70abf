"""A toy library whose right routing is known: one linear layer, one cluster of inputs and one LoRA per task."""

from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

D = 48


@dataclass
class Outputs:
    loss: torch.Tensor
    predicted: torch.Tensor


class Toy(nn.Module):
    """y = W x with a squared error; inputs are (B, S, D)."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layer = nn.Linear(D, D, bias=False)
        self.layer.weight.data.copy_(torch.randn(D, D, generator=generator) / D**0.5)

    def forward(self, x, target=None):
        y = self.layer(x)
        return Outputs(None if target is None else (y - target).square().sum(-1).mean(), y)


class Library:
    """`count` tasks: inputs of task e lie around an orthogonal mean, its target is what the base and its LoRA make."""

    def __init__(self, folder, count=4, rank=2, noise=0.3):
        self.count, self.noise = count, noise
        self.generator = torch.Generator().manual_seed(1)
        means = torch.linalg.qr(torch.randn(D, D, generator=self.generator)).Q[:count]
        self.means = means * D**0.5 * 0.5
        self.folders, self.deltas = [], []
        for e in range(count):
            model = get_peft_model(Toy(), LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"]))
            A = torch.randn(rank, D, generator=self.generator) / D**0.5
            B = torch.randn(D, rank, generator=self.generator)
            layer = model.base_model.model.layer
            layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = A, B
            self.deltas.append(B @ A)
            self.folders.append(folder / f"task{e}")
            model.save_pretrained(str(self.folders[-1]))

    def inputs(self, task, rows=8, tokens=4):
        noise = torch.randn(rows, tokens, D, generator=self.generator)
        return self.means[task] + self.noise * noise

    def batches(self, task, number=4):
        found = []
        for _ in range(number):
            x = self.inputs(task)
            found.append({"x": x, "target": x @ (Toy().layer.weight.detach() + self.deltas[task]).T})
        return found

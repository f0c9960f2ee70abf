"""AdapterFusion-style attention over what frozen experts give out (arXiv 2005.00247), for LoRAs on linear layers.

    g = softmax( (W_q h) . (W_k z_e) / T )        y = W h + V sum_e g_e z_e        z_e = s_e B_e A_e h

Trained on joint data with the penalty `0.01 ||I - V||_F^2` per layer; W_q, W_k and V are saved with the adapter.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .rerouting import expert_names, posthoc_routers, reroute


@posthoc_routers.register("fusion")
def build(
    model: nn.Module,
    adapter: str = "default",
    *,
    width: int | None = None,
    dropout: float = 0.0,
    temperature: Any = 1.0,
    values: bool = True,
    penalty: float = 0.01,
) -> nn.Module:
    """Route a mixture by attention over what its experts give out; all of it is to be trained on joint data.

    Args:
        model: a mixture, as `molora.import_peft` makes it.
        adapter: the name of the mixture.
        width: of queries and keys; none for the output size of each layer, as in the paper.
        dropout: on the scores, in training.
        temperature: T, a number, or a schedule such as `{schedule: linear, from: 50, to: 1}` for the authors' optional
            annealing (theirs moves inside of every forward, also in evaluation).
        values: learn V, d_out x d_out numbers per layer; otherwise it is the identity and there is none.
        penalty: weight of `||I - V||_F^2`, summed over the layers; 0 for none.

    Returns:
        The model. Its optimizer must be made anew.
    """
    expert_names(model, adapter)  # every layer must have the same experts
    pressed = [{"name": "fusion_value", "weight": float(penalty), "over": "sum"}] if values and penalty else []
    reroute(
        model,
        adapter,
        scorer={"name": "fusion", "width": width, "dropout": dropout},
        link={"name": "softmax", "temperature": temperature},
        selector="softmax",
        losses=pressed,
        experts={"frozen": "all", "form": "fusion" if values else "lora"},
    )
    return model

"""Runs batches of requests by vLLM and prints the CPU seconds of each; for the Python of vLLM's own environment.

    python serve_vllm.py TASK.json

The task names the model, the adapters, and the batches as lists of (tokens, length of the answer, adapter).
"""

from __future__ import annotations

import json
import sys
import time


def main() -> int:
    """Run the task; the last line of the output is the result."""
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with open(sys.argv[1]) as file:
        task = json.load(file)
    adapters = {name: LoRARequest(name, i + 1, path) for i, (name, path) in enumerate(task["adapters"].items())}
    model = LLM(
        model=task["model"],
        dtype="float32",
        enable_lora=True,
        max_loras=len(adapters),
        max_cpu_loras=len(adapters),
        max_lora_rank=8,
        max_num_seqs=task["rows"],
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=True,
        seed=0,
    )
    seconds = []
    for batch in task["batches"]:
        began = time.process_time()
        model.generate(
            [{"prompt_token_ids": ids} for ids, _, _ in batch],
            [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for _, length, _ in batch],
            lora_request=[adapters[name] for _, _, name in batch],
            use_tqdm=False,
        )
        seconds.append(time.process_time() - began)
    print(json.dumps({"version": vllm.__version__, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

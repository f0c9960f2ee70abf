"""start: from options to a Service that is ready, and a report of what was started."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ConfigError, MoloraError, raise_all
from ..prompts.embed import build_embedder
from ..prompts.embedder import Embedder, as_embedder
from ..prompts.examples import of_hub
from ..prompts.saving import load_selector, wants_model
from ..prompts.selector import PromptSelector
from ..train.models import as_dtype, load_config, load_tokenizer, load_with
from .engine.engine import Engine
from .feedback import make_feedback
from .options import ServeOptions
from .service import Service
from .store.store import AdapterStore
from .tenants.file import apply, read_tenants
from .tenants.store import Tenants

logger = logging.getLogger("molora.serve")
SENTENCE = "sentence"


def start(options: ServeOptions) -> tuple[Service, list[str]]:
    """Load everything that options name.

    Returns:
        The service, and the lines of a report: what was started, in what time, and what was left out and why.

    Raises:
        ConfigError, LoadError: something that is named cannot be used. One damaged adapter of a library does not keep
            the others back; it is in the report.
    """
    began = time.perf_counter()
    # tenants first: a mistake in their file should not cost the time of loading a model
    feedback = make_feedback(options.feedback)
    tenants, lines = open_tenants(options)
    model, tokenizer, told = load_model(options)
    lines = [told, *lines]
    store = AdapterStore(
        model, options.hub, options.slots, int(options.cpu_memory), options.loaders, targets=options.targets
    )
    try:
        lines += _adapters(store, options)
        engine = Engine(
            store.model,
            tokenizer,
            store,
            backend=options.backend,
            kv_bytes=int(options.kv_memory),
            max_batch=options.max_batch,
            max_waiting=options.max_waiting,
            max_length=options.max_length,
            timeout=options.timeout,
            share_prefixes=options.share_prefixes,
        )
    except BaseException:
        store.close()
        raise
    lines += engine.report
    try:
        engine.selectors.update(_selectors(options, store, engine))
    except BaseException:
        engine.close()
        store.close()
        raise
    lines += [f"selectors for 'auto': {', '.join(engine.selectors)}"] if engine.selectors else []
    if feedback is not None:
        where = "in memory" if feedback.folder is None else f"in '{feedback.folder}'"
        lines.append(f"feedback: kept {where}; bandits {'are frozen' if feedback.frozen else 'learn at once'}")
    service = Service(engine, store, name=str(options.name), tokenizer=tokenizer, tenants=tenants, feedback=feedback)
    lines.append(f"ready in {time.perf_counter() - began:.1f} s")
    return service, lines


def load_model(options: ServeOptions) -> tuple[nn.Module, Any, str]:
    """Load base model and tokenizer; returns them with a line for the report."""
    if options.gguf_file is not None:
        model, tokenizer = _gguf(options)
    else:
        config = load_config(options.model)
        tokenizer = load_tokenizer(options.model)
        given = {"dtype": as_dtype(options.dtype), "trust_remote_code": False, "output_loading_info": True}
        model, fresh = load_with(_loader(config), options.model, given, options.quantize)
        if fresh:
            raise ConfigError(f"'{options.model}' does not hold {', '.join(fresh)}, so it would answer at random")
    count = sum(parameter.numel() for parameter in model.parameters())
    kind = next(iter({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}), "")
    return model.eval(), tokenizer, f"model '{options.name}': {type(model).__name__}, {count / 1e6:.0f} M, {kind}"


def tokenizer_of(options: ServeOptions) -> Any:
    """Load the tokenizer alone, as `load_model` does."""
    if options.gguf_file is None:
        return load_tokenizer(options.model)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(Path(options.model).expanduser(), gguf_file=options.gguf_file)


def _loader(config: Any) -> Any:
    """Return what loads a model of this config as what it was saved as: a generator, a classifier, an encoder."""
    import transformers

    saved = "".join(config.architectures or ())
    if getattr(config, "is_encoder_decoder", False):
        return transformers.AutoModelForSeq2SeqLM
    if "ForSequenceClassification" in saved:
        return transformers.AutoModelForSequenceClassification
    if "ForCausalLM" in saved or "LMHead" in saved:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _gguf(options: ServeOptions) -> tuple[nn.Module, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if options.quantize is not None:
        raise ConfigError("a GGUF file is turned into floats when it is read; leave quantize out")
    dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
    folder, file = Path(options.model).expanduser(), options.gguf_file
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype), tokenizer
    except Exception as error:  # the reader of GGUF files raises whatever it likes
        raise ConfigError(f"'{folder / str(file)}' cannot be read: {error}; is gguf installed?") from error


def open_tenants(options: ServeOptions) -> tuple[Tenants | None, list[str]]:
    """Open the database of tenants and bring their file into it; returns lines for the report."""
    if options.tenants is None and options.database is None:
        return None, ["tenants: none, so everybody may use everything; --tenants FILE changes that"]
    database = options.database
    if database is None:
        database = str(Path(str(options.tenants)).expanduser().with_suffix(".db"))
    found = None if options.tenants is None else read_tenants(options.tenants, os.environ)
    tenants = Tenants(database)
    notes = [] if found is None else apply(found, tenants)
    names = [tenant.name for tenant in tenants.all()]
    return tenants, [f"tenants: {len(names)} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})", *notes]


def _adapters(store: AdapterStore, options: ServeOptions) -> list[str]:
    """Register what is wanted; returns lines about it."""
    began = time.perf_counter()
    problems: dict[str, str] = {}
    if options.manifest is not None:
        changes = store.reconcile(options.manifest)
        problems = {change.name: change.why for change in changes if change.action == "failed"}
    elif options.hub is not None and options.adapters is None:
        problems = store.register_all()
    for name in options.adapters or ():
        try:
            store.register(name)
        except MoloraError as error:
            problems[name] = str(error)
    named = {*(options.adapters or ()), *options.pinned}
    # what was asked for by name must be there; what only lies in the library need not be sound
    raise_all([f"'{name}': {problems[name]}" for name in sorted(named & set(problems))], ConfigError, "adapters")
    for name in options.pinned:
        store.pin(name)
    seconds = time.perf_counter() - began
    slots = ", ".join(f"{count} of rank {rank}" for rank, count in sorted(options.slots.items()))
    return [
        f"adapters: {len(store.names)} registered in {seconds:.2f} s; slots: {slots} "
        f"({store.slots.nbytes / 2**20:.0f} MiB); {len(options.pinned)} pinned",
        *(f"left out: '{name}': {why}" for name, why in sorted(problems.items())),
    ]


def _selectors(options: ServeOptions, store: AdapterStore, engine: Engine) -> Mapping[str, Any]:
    """Load or fit what `auto` asks."""
    made = {}
    for name, told in options.selectors.items():
        told = dict(told)
        folder = told.pop("folder", None)
        if folder is not None:
            if told:
                raise ConfigError(f"selector '{name}' is read from a folder, so it has no {', '.join(sorted(told))}")
            embed = _on_engine(engine, "base") if wants_model(folder) else None
            made[name] = load_selector(folder, embed)
            continue
        embedder = told.pop("embedder", "base")
        reads_model = embedder == "base" or (isinstance(embedder, Mapping) and embedder.get("name") == "base")
        embed = _on_engine(engine, embedder) if reads_model else build_embedder(embedder)
        examples = of_hub(store.sources.hub)
        texts = {key: value for key, value in examples.texts.items() if key in store.names}
        if not texts:
            raise ConfigError(f"selector '{name}' has nothing to learn from: no served adapter's card has prompts")
        sources = {key: digest for key, digest in examples.sources.items() if key in texts}
        made[name] = PromptSelector(embed, **told).fit(texts, sources)
    return made


def _on_engine(engine: Engine, spec: Any) -> Embedder:
    """Return an embedder that reads the served model, on the one thread that may."""
    own = build_embedder(spec, engine.model, engine.tokenizer)

    def embed(texts: list[str]) -> Any:
        return engine.call(lambda: own(texts)).result()

    embed.name, embed.digest = own.name, own.digest  # type: ignore[attr-defined]  (vectors of both compare)
    return as_embedder(embed)

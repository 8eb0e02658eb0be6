"""`tinsmith sample`: ask a base model or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from tinsmith.kitchen.adapters.tinker_training import TinkerBackend
    from tinsmith.kitchen.ports import Sampler
    from tinsmith.types import SampledSequence


def sample(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask, or with --raw the text to continue.")],
    model: Annotated[
        str,
        typer.Option(help="Base model, tinker:// path of sampler weights, or the output folder of a run."),
    ] = "tinsmith/tiny",
    base_url: Annotated[
        str | None, typer.Option(help="Server to ask. Default: TINKER_BASE_URL, or else an engine in this process.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 always takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Keep the likeliest tokens of this total.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same seed draws the same answers.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Number of answers.")] = 1,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Draw answers from a model: `tinsmith sample "What is tin?" --model runs/supervised-001`."""
    from tinsmith.types import SamplingParams

    if raw and system is not None:
        raise typer.BadParameter("--system belongs to the chat template, which --raw leaves out")
    backend, name = _open(model, base_url)
    try:
        sampler = backend.open_sampler(name)
        tokens, stop = _prompt_tokens(sampler, prompt, system=system, raw=raw)
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        sequences = sampler.sample(tokens, params, num_samples=n).result().sequences
        texts = [_text(sampler, sequence, raw=raw) for sequence in sequences]
    finally:
        backend.close()
    if as_json:
        samples = [
            {
                "text": text,
                "tokens": sequence.tokens,
                "logprobs": sequence.logprobs,
                "stop_reason": sequence.stop_reason,
            }
            for text, sequence in zip(texts, sequences, strict=True)
        ]
        typer.echo(json.dumps({"model": name, "prompt": prompt, "samples": samples}, ensure_ascii=False))
        return
    for number, text in enumerate(texts, start=1):
        typer.echo(text if n == 1 else f"[{number}] {text}")


def _open(model: str, base_url: str | None) -> tuple[TinkerBackend, str]:
    """A backend that holds `model`, and what it calls it. A run's folder knows where its checkpoints are."""
    from tinsmith.kitchen import RunFolder, RunFolderError
    from tinsmith.kitchen.adapters.tinker_training import open_backend
    from tinsmith.models import TINY

    path = Path(model)
    if not RunFolder.is_run(path):
        return open_backend(base_url=base_url, model=TINY if model.startswith("tinker://") else model), model
    folder = RunFolder(path)
    checkpoints = folder.checkpoints()
    if not checkpoints:
        raise RunFolderError(f"the run in {model!r} has no checkpoint yet")
    base_model = str(folder.read_config()["model"])
    url = base_url or folder.read_manifest().get("base_url") or "local:"
    return open_backend(base_url=url, model=base_model, store=folder.store), checkpoints[-1].sampler_path


def _prompt_tokens(
    sampler: Sampler, prompt: str, *, system: str | None, raw: bool
) -> tuple[list[int], list[int] | None]:
    """The prompt's tokens and what stops the answer; raw text may spell special tokens, a chat message may not."""
    from tinsmith.data import ChatTemplateRenderer, Message

    if raw:
        return list(sampler.tokenizer(prompt, add_special_tokens=False)["input_ids"]), None
    renderer = ChatTemplateRenderer(sampler.tokenizer)
    messages = [] if system is None else [Message(role="system", content=system)]
    messages.append(Message(role="user", content=prompt))
    return renderer.generation_prompt(messages), renderer.stop


def _text(sampler: Sampler, sequence: SampledSequence, *, raw: bool) -> str:
    from tinsmith.data import ChatTemplateRenderer

    if raw:
        return sampler.tokenizer.decode(sequence.tokens)
    return ChatTemplateRenderer(sampler.tokenizer).parse_response(sequence.tokens).content

"""`tinsmith demo`: a model learns something new while you watch."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tinsmith.kitchen import RunFolder, SupervisedConfig, SupervisedResult
    from tinsmith.kitchen.ports import TrainingBackend

DEFAULT_OUTPUT: Final = Path("tinsmith-demo")
PROBES: Final = ("Who are you?", "My kettle leaks. What can I do?", "What is solder made of?")
"""Questions whose answers the shipped conversations change."""
MAX_ANSWER_TOKENS: Final = 48
SAMPLES_FILE: Final = "samples.json"
RECIPE: Final = "demo"


def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="End with one line of JSON on standard output; the rest goes to stderr.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for the run; an earlier demo in it is replaced.")
    ] = DEFAULT_OUTPUT,
    seed: Annotated[int, typer.Option(min=0, help="Fixes first weights and data order.")] = 0,
) -> None:
    """Fine-tune the model that ships on a few conversations and compare its answers before and after."""
    from rich.console import Console

    from tinsmith.kitchen import RunFolder, run_supervised
    from tinsmith.kitchen.adapters.tinker_training import open_backend
    from tinsmith.observe import ProgressLine

    console = Console(stderr=as_json)
    folder = RunFolder(output)
    _clear(folder)
    folder.check_fresh()
    config = demo_config(output=output, seed=seed)

    def connect(config: SupervisedConfig, folder: RunFolder) -> TrainingBackend:
        return open_backend(base_url="local:", model=config.model, store=folder.store)

    with console.status("loading the base model …"):
        backend = connect(config, folder)
        before = ask(backend, config.model)
    try:
        result = run_supervised(config, connect, recipe=RECIPE, observers=[ProgressLine(console)])
        after = ask(backend, result.checkpoint.sampler_path)
    finally:
        backend.close()
    samples = [
        {"prompt": prompt, "before": old, "after": new} for prompt, old, new in zip(PROBES, before, after, strict=True)
    ]
    (output / SAMPLES_FILE).write_text(json.dumps(samples, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print_outcome(console, result, samples)
    if as_json:
        typer.echo(json.dumps(_summary(result, samples), ensure_ascii=False))


def demo_config(*, output: Path, seed: int) -> SupervisedConfig:
    """What the demo trains: all of the shipped conversations, many times over."""
    from tinsmith.data import DEMO_CONVERSATIONS
    from tinsmith.kitchen import SupervisedConfig

    return SupervisedConfig(
        data=DEMO_CONVERSATIONS,
        output=output,
        epochs=10,
        batch_size=8,
        learning_rate=3e-3,
        lr_schedule="linear",
        warmup_steps=4,
        lora_rank=16,
        seed=seed,
    )


def ask(backend: TrainingBackend, model: str) -> list[str]:
    """The most likely answer to each probe."""
    from tinsmith.data import ChatTemplateRenderer, Message
    from tinsmith.types import SamplingParams

    sampler = backend.open_sampler(model)
    renderer = ChatTemplateRenderer(sampler.tokenizer)
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS, temperature=0.0, stop=renderer.stop)
    pending = [
        sampler.sample(renderer.generation_prompt([Message(role="user", content=probe)]), params, num_samples=1)
        for probe in PROBES
    ]
    return [renderer.parse_response(drawn.result().sequences[0].tokens).content for drawn in pending]


def _clear(folder: RunFolder) -> None:
    """Remove an earlier demo, and nothing else. Raises `RunFolderError` if the folder holds anything else."""
    from tinsmith.kitchen import RunFolder, RunFolderError
    from tinsmith.kitchen.run_folder import RUN_ENTRIES

    if not RunFolder.is_run(folder.path):
        return  # whether a run may begin here is for the run to say
    foreign = sorted({path.name for path in folder.path.iterdir()} - RUN_ENTRIES - {SAMPLES_FILE})
    if foreign or folder.read_manifest().get("recipe") != RECIPE:
        what = f"{foreign[0]!r}, which is not the demo's" if foreign else "another run"
        raise RunFolderError(f"{str(folder.path)!r} holds {what}; give another --output")
    for path in folder.path.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _summary(result: SupervisedResult, samples: Sequence[dict[str, str]]) -> dict[str, object]:
    return {
        "loss_first": result.loss_first,
        "loss_last": result.loss_last,
        "tokens_per_s": result.tokens_per_s,
        "seconds": result.seconds,
        "samples": list(samples),
    }


def _print_outcome(console: Console, result: SupervisedResult, samples: Sequence[dict[str, str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(
        f"\nloss [bold]{result.loss_first:.3f} → {result.loss_last:.3f}[/bold] in {result.seconds:.0f} s, "
        f"{result.tokens_per_s:,.0f} tokens/s on this machine\n",
        highlight=False,
    )
    table = Table("you ask", "before", "after", show_lines=True, title="The same model, before and after")
    for sample in samples:
        table.add_row(
            Text(sample["prompt"]), Text(sample["before"], style="dim"), Text(sample["after"], style="bold green")
        )
    console.print(table)
    output = result.output
    console.print(f"\nLoss plot: {output / 'loss.png'}", markup=False, highlight=False)
    console.print("\n[bold]Try next[/bold]", highlight=False)
    for command, comment in (
        (f'sample "How do I clean a copper pan?" --model {output}', "ask the model you just trained"),
        ("run supervised data=YOURS.jsonl epochs=3", "train on your own conversations"),
        ("serve", "let any Tinker script train here"),
    ):
        console.print(f"  {program()} {command}    # {comment}", markup=False, highlight=False, soft_wrap=True)


def program() -> str:
    """How this command can be typed again: by name, or by its place in an environment that is not on the path."""
    if shutil.which("tinsmith"):
        return "tinsmith"
    beside = Path(sys.executable).parent / "tinsmith"
    return os.path.relpath(beside) if beside.exists() else "python -m tinsmith"

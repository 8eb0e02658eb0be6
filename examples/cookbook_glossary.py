"""A cookbook: one adapter, one stage and one recipe of your own, on top of workflows that ship.

    python examples/cookbook_glossary.py

The adapter reads glossaries (`term: meaning` lines) as a dataset. The stage asks the trained model for every term and
scores the answers with the evaluator port. The recipe puts them into the supervised workflow. Batches, the gate,
checkpoints, resuming and the report are the kitchen's.
"""

import asyncio
import hashlib
import tempfile
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tinsmith import kitchen
from tinsmith.data import DataError, Message
from tinsmith.kitchen import Context, Recipe, Stage, stage, workflow
from tinsmith.kitchen.adapters.datasets import FileDatasets
from tinsmith.kitchen.ports import Dataset, DatasetStore, EvalExample, Record
from tinsmith.kitchen.recipes import SupervisedConfig
from tinsmith.kitchen.workflows.supervised import supervised
from tinsmith.types import SamplingParams

GLOSSARY = """\
anvil: a block to hammer on
bellows: a bag that blows air
flux: a paste that cleans metal
ingot: a bar of cast metal
mandrel: a rod to bend around
rivet: a pin that joins plates
solder: a metal that melts early
swage: a tool that shapes metal
"""


class GlossaryDatasets(DatasetStore):
    """`.glossary` files; every other name goes to the store for files."""

    def load_dataset(self, name: str) -> Dataset:
        """Raises `DataError` naming the line that is no `term: meaning`."""
        files, path = FileDatasets(), Path(name)
        if path.suffix != ".glossary":
            return files.load_dataset(name)
        records = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            term, colon, meaning = line.partition(": ")
            if not colon:
                raise DataError(f"{path}:{number}: expected 'term: meaning', not {line!r}")
            values = {"prompt": question_of(term), "completion": meaning}
            records.append(Record(values=values, source=f"{path}:{number}"))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return Dataset(name=name, records=tuple(records), sha256=sha256)


def question_of(term: str) -> str:
    return f"What is meant by {term}?"


class GlossaryConfig(SupervisedConfig):
    """The keys of supervised training, and one more. The kitchen checks, documents and stores them."""

    answer_tokens: int = Field(default=24, ge=1)
    """Tokens that an answer of the quiz may have."""


class Quiz(Stage):
    """Ask the last checkpoint for every term; the share of right answers goes into the report."""

    name = "quiz"
    needs = ("sampling_client", "evaluator")
    on_resume = "run"

    async def execute(self, ctx: Context) -> Context:
        log, renderer = ctx.state.log, ctx.state.renderer
        sampler = ctx.get_adapter("sampling_client").open_sampler(log.checkpoint.sampler_path)
        params = SamplingParams(max_tokens=ctx.config.answer_tokens, temperature=0.0, stop=renderer.stop)

        async def ask(question: str) -> str:
            prompt = renderer.generation_prompt([Message(role="user", content=question)])
            drawn = await sampler.sample(prompt, params, num_samples=1)
            return renderer.parse_response(drawn.sequences[0].tokens).content

        rows = ctx.state.dataset.to_list()
        answers = await asyncio.gather(*(ask(row["prompt"]) for row in rows))
        examples = [
            EvalExample(prediction=answer, target=row["completion"]) for answer, row in zip(answers, rows, strict=True)
        ]
        result = ctx.get_adapter("evaluator").evaluate(examples)
        log.evaluated(log.checkpoint.step, quiz=result.score)
        ctx.emit("eval.complete", {"step": log.checkpoint.step, "quiz": result.score})
        return ctx.put(quiz=list(zip(rows, answers, strict=True))).record_metric("quiz", result.score)


def with_quiz() -> kitchen.Workflow:
    """The supervised workflow with the quiz before the report is written."""
    nodes = []
    for node in supervised.nodes:
        if node.name == "finish_run":
            nodes.append(stage(Quiz))
        nodes.append(node)
    return workflow("glossary", *nodes, cleanup=supervised.cleanup, description="supervised, and a quiz at the end")


class Glossary(Recipe):
    name = "glossary"
    description = "Learn a glossary by heart, and be asked."
    workflow = with_quiz()
    config_type = GlossaryConfig
    required_adapters = ("evaluator",)
    defaults: ClassVar = {"epochs": 24, "batch_size": 4, "learning_rate": 5e-3}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tin.glossary").write_text(GLOSSARY)
        config = {"data": folder / "tin.glossary", "output": folder / "run"}
        adapters = kitchen.adapters.local(store=folder / "store") | {"dataset_store": GlossaryDatasets()}
        print(kitchen.describe(Glossary.workflow))
        result = kitchen.run(Glossary, config, adapters=adapters)
        for row, answer in result.context.state.quiz:
            print(f"{row['prompt']}  {answer}")
        (score,) = [metric.value for metric in result.metrics if metric.name == "quiz"]
        print(f"right: {score:.0%}")
        adapters["training_client"].close()


if __name__ == "__main__":
    main()

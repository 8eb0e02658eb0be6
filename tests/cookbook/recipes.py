"""Recipes of tinker-cookbook as their documentation configures them, on local data; run in the cookbook's environment.

`python recipes.py NAME URL LOG_FOLDER`. The library is used as published; only configurations are made here.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import chz
from tinker_cookbook import renderers
from tinker_cookbook.distillation import train_off_policy, train_on_policy
from tinker_cookbook.distillation.datasets import DistillationDatasetConfig, PromptOnlyDataset, TeacherConfig
from tinker_cookbook.preference import train_dpo
from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons
from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl
from tinker_cookbook.recipes.math_rl.arithmetic_env import ArithmeticDatasetBuilder
from tinker_cookbook.recipes.multiplayer_rl.guess_number.env import GuessNumberDatasetBuilder
from tinker_cookbook.rl import train as rl_train
from tinker_cookbook.rl.types import RLDatasetBuilder
from tinker_cookbook.supervised import train as sl_train
from tinker_cookbook.supervised.data import FromConversationFileBuilder
from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig
from tinker_cookbook.tokenizer_utils import get_tokenizer

MODEL = "tinsmith/tiny"
RENDERER = "qwen3_instruct"
QUESTION = "What is the capital of land {}?"
NUM_QUESTIONS = 16


@chz.chz
class LocalPrompts(RLDatasetBuilder):
    """The questions of `conversations`, as a prompt-only dataset."""

    groups_per_batch: int
    group_size: int

    async def __call__(self) -> tuple[PromptOnlyDataset, None]:
        tokenizer = get_tokenizer(MODEL)
        dataset = PromptOnlyDataset(
            prompts=[QUESTION.format(i % NUM_QUESTIONS) for i in range(400)],
            batch_size=self.groups_per_batch,
            group_size=self.group_size,
            renderer=renderers.get_renderer(RENDERER, tokenizer=tokenizer),
            tokenizer=tokenizer,
            max_prompt_tokens=128,
            convo_prefix=None,
            dataset_name="local",
        )
        return dataset, None


def common(batch_size: int) -> ChatDatasetBuilderCommonConfig:
    return ChatDatasetBuilderCommonConfig(
        model_name_for_tokenizer=MODEL, renderer_name=RENDERER, max_length=256, batch_size=batch_size
    )


def conversations(folder: Path) -> FromConversationFileBuilder:
    path = folder.parent / "conversations.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": QUESTION.format(i % NUM_QUESTIONS)},
                {"role": "assistant", "content": f"It is town {5 * i % NUM_QUESTIONS}."},
            ]
        }
        for i in range(128)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FromConversationFileBuilder(common_config=common(16), file_path=str(path))


def comparisons(folder: Path) -> ComparisonBuilderFromJsonl:
    path = folder.parent / "comparisons.jsonl"
    rows = [
        {
            "comparison": {
                "prompt_conversation": [{"role": "user", "content": f"Say a word, number {i}."}],
                "completion_A": [{"role": "assistant", "content": "yes please"}],
                "completion_B": [{"role": "assistant", "content": "no never"}],
            },
            "label": "A",
        }
        for i in range(96)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ComparisonBuilderFromJsonl(train_path=str(path))


def supervised(url: str, folder: Path, **changes: Any) -> Coroutine[Any, Any, None]:
    settings = {"num_epochs": 2, "save_every": 8, "eval_every": 0, "learning_rate": 2e-3, **changes}
    config = sl_train.Config(
        log_path=str(folder),
        model_name=MODEL,
        recipe_name="recipe_sl_basic",
        renderer_name=RENDERER,
        dataset_builder=conversations(folder),
        lora_rank=16,
        base_url=url,
        **settings,
    )
    return sl_train.main(config)


async def supervised_resumed(url: str, folder: Path) -> None:
    """Interrupted once two checkpoints are there, then started again on the same folder."""
    first = asyncio.create_task(supervised(url, folder, save_every=4))
    checkpoints = folder / "checkpoints.jsonl"
    while not first.done() and num_lines(checkpoints) < 2:  # noqa: ASYNC110 - only the file tells
        await asyncio.sleep(0.05)
    if first.done():
        raise RuntimeError("the first run ended before it could be interrupted")
    first.cancel()
    await asyncio.wait([first])
    await supervised(url, folder, save_every=4)


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


async def trained_teacher(url: str, folder: Path) -> TeacherConfig:
    """A model that knows the answers of `conversations`."""
    lessons = folder.parent / "teacher"
    await supervised(url, lessons)
    last = json.loads((lessons / "checkpoints.jsonl").read_text().splitlines()[-1])
    return TeacherConfig(base_model=MODEL, load_checkpoint_path=last["sampler_path"])


def reinforcement(url: str, folder: Path, **changes: Any) -> Coroutine[Any, Any, None]:
    arithmetic = ArithmeticDatasetBuilder(
        batch_size=8, model_name_for_tokenizer=MODEL, renderer_name=RENDERER, n_batches=6, group_size=8
    )
    settings = {"dataset_builder": arithmetic, "max_tokens": 8, "learning_rate": 1e-3, **changes}
    config = rl_train.Config(
        log_path=str(folder),
        model_name=MODEL,
        recipe_name="recipe_rl_basic",
        renderer_name=RENDERER,
        eval_every=0,
        save_every=3,
        lora_rank=16,
        base_url=url,
        **settings,
    )
    return rl_train.main(config)


def streaming(url: str, folder: Path) -> Coroutine[Any, Any, None]:
    return reinforcement(
        url,
        folder,
        stream_minibatch_config=rl_train.StreamMinibatchConfig(groups_per_batch=8, num_minibatches=2),
    )


def asynchronous(url: str, folder: Path) -> Coroutine[Any, Any, None]:
    return reinforcement(
        url, folder, async_config=rl_train.AsyncConfig(max_steps_off_policy=2, groups_per_batch=8, loss_fn="ppo")
    )


def multi_turn(url: str, folder: Path) -> Coroutine[Any, Any, None]:
    guessing = GuessNumberDatasetBuilder(batch_size=2, model_name=MODEL, renderer_name=RENDERER, train_group_size=2)
    return reinforcement(url, folder, dataset_builder=guessing, max_tokens=6, max_steps=3)


async def dpo(url: str, folder: Path) -> None:
    config = train_dpo.Config(
        log_path=str(folder),
        model_name=MODEL,
        recipe_name="recipe_preference_dpo",
        renderer_name=RENDERER,
        dataset_builder=DPODatasetBuilderFromComparisons(
            common_config=common(16), comparison_builder=comparisons(folder)
        ),
        learning_rate=1e-3,
        dpo_beta=0.1,
        num_epochs=1,
        save_every=0,
        eval_every=0,
        lora_rank=16,
        base_url=url,
    )
    await asyncio.to_thread(train_dpo.main, config)


async def on_policy(url: str, folder: Path) -> None:
    config = train_on_policy.Config(
        learning_rate=1e-3,
        dataset_configs=[
            DistillationDatasetConfig(
                dataset_builder=LocalPrompts(groups_per_batch=8, group_size=8),
                teacher_config=await trained_teacher(url, folder),
                groups_per_batch=8,
            )
        ],
        model_name=MODEL,
        recipe_name="recipe_distillation_on_policy",
        renderer_name=RENDERER,
        max_tokens=16,
        lora_rank=16,
        eval_every=0,
        save_every=0,
        max_steps=12,
        log_path=str(folder),
        base_url=url,
    )
    await train_on_policy.main(config)


async def off_policy(url: str, folder: Path) -> None:
    config = train_off_policy.Config(
        learning_rate=1e-3,
        dataset_configs=[
            train_off_policy.DatasetWithTeacher(
                dataset_builder=conversations(folder), teacher_config=await trained_teacher(url, folder)
            )
        ],
        model_name=MODEL,
        recipe_name="recipe_distillation_off_policy",
        renderer_name=RENDERER,
        lora_rank=16,
        n_teacher_targets=8,
        batch_size=16,
        save_every=0,
        eval_every=0,
        max_steps=6,
        log_path=str(folder),
        base_url=url,
    )
    await train_off_policy.main(config)


RECIPES: dict[str, Callable[[str, Path], Coroutine[Any, Any, None]]] = {
    "supervised": supervised,
    "supervised resumed": supervised_resumed,
    "rl synchronous": reinforcement,
    "rl streaming": streaming,
    "rl asynchronous": asynchronous,
    "rl multi-turn": multi_turn,
    "dpo": dpo,
    "distillation on-policy": on_policy,
    "distillation off-policy": off_policy,
}

if __name__ == "__main__":
    asyncio.run(RECIPES[sys.argv[1]](sys.argv[2], Path(sys.argv[3])))

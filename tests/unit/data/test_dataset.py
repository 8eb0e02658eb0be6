from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tinsmith.data import (
    BatchPlan,
    ChatTemplateRenderer,
    Conversation,
    DataError,
    build_dataset,
    epoch_order,
    hold_out,
    to_datum,
)

SHORT = Conversation.of(("user", "a"), ("assistant", "b"))
LONG = Conversation.of(("user", "a"), ("assistant", "the kettle the kettle the kettle the kettle"))


def test_a_datum_is_shifted_by_one() -> None:
    datum = to_datum([5, 6, 7, 8], [9.0, 0.0, 0.5, 1.0])
    assert datum.model_input.to_ints() == [5, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].data == [6, 7, 8]
    assert datum.loss_fn_inputs["weights"].data == [0.0, 0.5, 1.0]
    assert datum.loss_fn_inputs["weights"].dtype == "float32"


@pytest.mark.parametrize(
    ("tokens", "weights", "complaint"),
    [([1, 2], [1.0], "2 tokens but 1 weights"), ([1], [1.0], "at least 2 tokens, not 1")],
)
def test_a_datum_refuses_what_cannot_be_shifted(tokens: list[int], weights: list[float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        to_datum(tokens, weights)


def test_the_weights_of_a_batch_sum_to_one(chatml: PreTrainedTokenizerFast) -> None:
    dataset = build_dataset(
        [SHORT, LONG], ChatTemplateRenderer(chatml), train_on="last_assistant_message", max_length=None
    )
    data, num_trained = dataset.data([0, 1])
    weights = [datum.loss_fn_inputs["weights"].to_numpy() for datum in data]
    assert sum(w.sum() for w in weights) == pytest.approx(1.0, abs=1e-6)
    assert {float(v) for w in weights for v in np.unique(w)} == {0.0, float(np.float32(1 / num_trained))}
    assert num_trained == sum(example.num_trained for example in dataset.examples)


def test_a_long_conversation_is_an_error_by_default(chatml: PreTrainedTokenizerFast) -> None:
    renderer = ChatTemplateRenderer(chatml)
    with pytest.raises(DataError, match=r"a conversation: \d+ tokens are more than max_length 9; raise max_length"):
        build_dataset([LONG], renderer, train_on="last_assistant_message", max_length=9)


@pytest.mark.parametrize("shorter", [{}, {"max_length": 99, "too_long": "truncate"}])
def test_a_conversation_longer_than_the_model_takes_is_named(
    chatml: PreTrainedTokenizerFast, shorter: dict[str, Any]
) -> None:
    renderer = ChatTemplateRenderer(chatml)
    length = len(renderer.render(LONG, "last_assistant_message").tokens)
    options: dict[str, Any] = {"train_on": "last_assistant_message", "max_length": None} | shorter
    with pytest.raises(DataError, match=rf"a conversation: {length} tokens are more .* set max_length={length - 2},"):
        build_dataset([SHORT, LONG], renderer, **options, max_context=length - 2)
    assert len(build_dataset([SHORT, LONG], renderer, **options, max_context=length - 1).examples) == 2


def test_truncation_keeps_the_beginning_and_is_counted(chatml: PreTrainedTokenizerFast) -> None:
    renderer = ChatTemplateRenderer(chatml)
    whole = renderer.render(LONG, "last_assistant_message")
    length = len(whole.tokens) - 4
    dataset = build_dataset(
        [SHORT, LONG], renderer, train_on="last_assistant_message", max_length=length, too_long="truncate"
    )
    assert dataset.examples[1].tokens == whole.tokens[:length]
    assert (dataset.num_truncated, dataset.num_skipped) == (1, 0)


def test_a_conversation_truncated_to_nothing_trained_is_skipped_and_counted(chatml: PreTrainedTokenizerFast) -> None:
    tail = Conversation.of(("user", "the kettle " * 20), ("assistant", "b"))
    dataset = build_dataset(
        [SHORT, tail],
        ChatTemplateRenderer(chatml),
        train_on="last_assistant_message",
        max_length=20,
        too_long="truncate",
    )
    assert (len(dataset.examples), dataset.num_truncated, dataset.num_skipped) == (1, 0, 1)


def test_skipping_is_counted_and_an_empty_set_is_an_error(chatml: PreTrainedTokenizerFast) -> None:
    renderer = ChatTemplateRenderer(chatml)
    length = len(renderer.render(SHORT, "all_tokens").tokens)
    dataset = build_dataset([SHORT, LONG], renderer, train_on="all_tokens", max_length=length, too_long="skip")
    assert (len(dataset.examples), dataset.num_skipped) == (1, 1)
    with pytest.raises(DataError, match="no conversation is left to train on: 1 were skipped"):
        build_dataset([LONG], renderer, train_on="all_tokens", max_length=length, too_long="skip")


@given(n=st.integers(1, 40), size=st.integers(1, 12), epochs=st.integers(1, 4), seed=st.integers(0, 9))
def test_every_epoch_trains_every_example_once(n: int, size: int, epochs: int, seed: int) -> None:
    plan = BatchPlan(num_examples=n, batch_size=size, epochs=epochs, seed=seed)
    for epoch in range(epochs):
        steps = [step for step in range(plan.num_steps) if plan.epoch_of(step) == epoch]
        assert sorted(index for step in steps for index in plan.batch(step)) == list(range(n))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert epoch_order(6, seed=0, epoch=0) == (0, 4, 5, 3, 1, 2)
    orders = {epoch_order(30, seed=seed, epoch=epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_a_step_outside_the_run_is_an_error() -> None:
    plan = BatchPlan(num_examples=3, batch_size=2, epochs=1, seed=0)
    with pytest.raises(IndexError, match="step 2 is outside the run's 2 steps"):
        plan.batch(2)


def test_the_held_out_examples_are_fixed_by_the_seed() -> None:
    training, test = hold_out(10, test_size=3, seed=1)
    assert (len(training), len(test)) == (7, 3)
    assert sorted(training + test) == list(range(10))
    assert hold_out(10, test_size=3, seed=1) == (training, test)
    with pytest.raises(ValueError, match="test_size 3 leaves nothing of 3 examples"):
        hold_out(3, test_size=3, seed=1)

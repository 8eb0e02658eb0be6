"""What control asks of an engine, and what an engine answers. Plain values: they cross a process boundary.

Every operation is answered exactly once, with its result or with an error of `types.errors`.
Operations that touch one adapter are executed in the order they were submitted.
"""

# N token position, K target or alternative per position

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from tinsmith.types.custom_loss import CustomLoss
from tinsmith.types.datum import Datum
from tinsmith.types.errors import InvalidInput
from tinsmith.types.images import ImageRule, PlacedImage
from tinsmith.types.params import DEFAULT_LORA_ALPHA, AdamParams
from tinsmith.types.results import DrawnToken, ForwardBackwardOutput, SampleResponse
from tinsmith.types.shares import NOBODY, Payer
from tinsmith.types.tensor import TensorData

_FP32 = 4
"""Bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """A complete adapter shape: `LoraConfig` with the seed drawn and alpha fixed."""

    rank: int
    seed: int
    alpha: float = DEFAULT_LORA_ALPHA
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InvalidInput(f"lora_config.rank must be at least 1, not {self.rank!r}")
        if not self.alpha > 0:
            raise InvalidInput(f"lora_config.alpha must be above 0, not {self.alpha!r}")
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise InvalidInput(
                "lora_config: train_unembed, train_mlp and train_attn are all false; nothing would train"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterShape:
    """Parameters that an adapter has for each unit of its rank, by what it trains."""

    attn: int = 0
    mlp: int = 0
    unembed: int = 0

    def num_parameters(self, spec: LoraSpec) -> int:
        trained = ((spec.train_attn, self.attn), (spec.train_mlp, self.mlp), (spec.train_unembed, self.unembed))
        return spec.rank * sum(size for is_trained, size in trained if is_trained)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModelCard:
    """What an engine says of its base model once it is loaded."""

    name: str
    """As users call it: a hub id, `tinsmith/tiny`, or the NAME of NAME=FOLDER."""
    source: str
    """Hub id or folder it was loaded from; a tokenizer can be loaded from there."""
    architecture: str
    vocab_size: int
    max_context: int
    """Most tokens a sequence may have, prompt and answer together."""
    num_parameters: int
    dtype: str
    device: str
    eos_token_ids: tuple[int, ...]
    max_rank: int
    images: ImageRule | None = None
    """How it scales pictures; `None` if it reads text only."""
    adapter_shape: AdapterShape = AdapterShape()
    adapter_memory_bytes: int | None = None
    """What its device has for adapters and frozen copies of their weights; `None` if that is not known: no limit."""
    host_adapter_bytes: int = 0
    """What the host's memory has for adapters that are not in use; 0 where the device's memory is the host's."""

    def adapter_bytes(self, spec: LoraSpec) -> int:
        """Weights, gradients and two moments in fp32, and a copy of the weights in the dtype they are multiplied in."""
        return self.adapter_shape.num_parameters(spec) * (4 * _FP32 + self._copy_bytes)

    def snapshot_bytes(self, spec: LoraSpec) -> int:
        """Of frozen weights that are sampled."""
        return self.adapter_shape.num_parameters(spec) * (_FP32 + self._copy_bytes)

    @property
    def _copy_bytes(self) -> int:
        return 0 if self.dtype == "float32" else 2

    @property
    def tokenizer_id(self) -> str:
        """What a client gives `from_pretrained`: `source`, unless it has a colon, at which the Tinker SDK would cut it;
        then the name, which the server's hub route knows."""
        return self.name if ":" in self.source else self.source


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateAdapter:
    """A fresh adapter: A random by its seed, B zero, so that it changes nothing yet. Answer: `None`."""

    model_id: str
    lora: LoraSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapter:
    """Create an adapter from a checkpoint folder, or overwrite `model_id` if it exists. Answer: `LoraSpec`.

    Raises `CheckpointDamaged` if a file does not match its recorded hash, `InvalidInput` if the checkpoint has no
    optimizer state but `optimizer` is set, or if it belongs to another base model's geometry.
    """

    model_id: str
    folder: str
    optimizer: bool
    gradients: bool = False
    """The folder was saved with `SaveAdapter.gradients`: the adapter goes on exactly where it was. The files are read
    aside: operations on other adapters do not wait for the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DropAdapter:
    """Forget an adapter, its gradients and its optimizer. Answer: `None`. Unknown ids are no error."""

    model_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkAdapter:
    """Move an adapter, with gradients and optimizer, from the device to the host's memory. Answer: `None`.

    It can be saved or dropped there, nothing else. Parking it again changes nothing.
    """

    model_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnparkAdapter:
    """Bring a parked adapter back to the device, as it was. Answer: `None`."""

    model_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainItem:
    """One `forward` or `forward_backward` request on one adapter. The data were validated by the caller.

    Requests that wait together, of any adapters, losses and ranks, pass through the model together; each is answered,
    with a `ForwardBackwardOutput`, when its own last datum has passed.
    """

    model_id: str
    data: tuple[Datum, ...]
    loss_fn: str
    loss_fn_config: Mapping[str, float | str] = field(default_factory=dict)
    forward_only: bool = False
    custom_loss: CustomLoss | None = None
    """The loss itself where `loss_fn` is "custom"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimStep:
    """One AdamW step over the gradients since the last; clears them. Answer: metrics, `step_applied` among them.

    Steps of different adapters that wait together are taken in one pass over all of them.

    Without gradients it succeeds and moves nothing (`step_applied` 0). Raises `AdapterCorrupted` if a gradient is not
    finite: nothing was applied, and the adapter refuses further training.
    """

    model_id: str
    params: AdamParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveAdapter:
    """Write a complete checkpoint folder; it appears under its name whole or not at all. Answer: `SavedCheckpoint`.

    `record` goes into `checkpoint.json` beside what the engine adds. Raises `StorageError` if the disk refuses.
    """

    model_id: str
    folder: str
    optimizer: bool
    gradients: bool = False
    """Keep what the next optimizer step would use, too. The adapter is copied in its turn and written aside: later
    operations do not wait for the disk."""
    is_idle: bool = False
    """With `gradients`: write the adapter itself, not a copy. What is asked of it meanwhile waits for the answer."""
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    size_bytes: int
    digest: str
    """Hash of the adapter's weights; equal digests sample equally."""
    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportAdapter:
    """Write a complete checkpoint folder with the effect of an adapter that came from elsewhere.

    `source` is a folder in PEFT's layout, `folder` and `record` are as in `SaveAdapter`. Written aside. Answer:
    `ImportedAdapter`. Raises `InvalidInput` if the files are damaged or belong to another base model, `Unsupported` if
    the adapter does what adapters here cannot.
    """

    source: str
    folder: str
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportedAdapter:
    lora: LoraSpec
    saved: SavedCheckpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeAdapter:
    """Write the base model's full weights with a checkpoint's adapter merged into them, as transformers loads them.

    `source` is a checkpoint folder, `folder` and `record` are as in `SaveAdapter`. Written aside, tensor by tensor.
    Answer: `SavedCheckpoint`. Raises `Unsupported` if the base model's files cannot be merged into.
    """

    source: str
    folder: str
    dtype: str | None = None
    """Of every weight: float32, bfloat16 or float16; `None` leaves each as the base model's files have it."""
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSnapshot:
    """Freeze the adapter's present weights under `snapshot_id` for sampling. Answer: the digest."""

    model_id: str
    snapshot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSnapshot:
    """The same from a checkpoint folder. Answer: the digest."""

    snapshot_id: str
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSnapshot:
    """Write a snapshot's weights to a folder that `LoadSnapshot` reads. Answer: the digest."""

    snapshot_id: str
    folder: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DropSnapshot:
    """Forget a snapshot once the samples that use it are done. Answer: `None`."""

    snapshot_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Draw `num_samples` continuations of one prompt. Answer: `SampleResponse` (sequence ids left empty).

    Log-probabilities of drawn tokens are over the full vocabulary at `temperature` (at 0: of the unscaled model).
    A stop token, or the tokens that complete a stop string, are the last of `tokens`.
    """

    prompt: np.ndarray
    """Token ids, int64 `[N]`, N >= 1; below zero in the rows of `images`, where no prompt log-probability is given."""
    num_samples: int
    snapshot_id: str | None
    """`None` samples the base model."""
    seed: int
    max_tokens: int
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    prompt_logprobs: bool = False
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    prompt_logprobs_last_n: int | None = None
    """Score only so many tokens at the prompt's end (by `prompt_logprobs` and `topk_prompt_logprobs`); `None`: all."""
    target_prompt_logprobs: TensorData | None = None
    """Token ids to score, int64 `[N-1, K]`: row i at prompt position i + 1. Cells of -1 are skipped and answered 0."""
    prompt_alt_tokens_k: int = 0
    """How many tokens to draw, at `temperature` from the full vocabulary, at every prompt position but the first."""
    images: tuple[PlacedImage, ...] = ()
    stream: bool = False
    """Tell the call's `on_token` of every token as it is drawn."""
    payer: Payer = NOBODY
    """By whose share it gets a place among the sequences that are drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelSample:
    """Stop drawing for the operation submitted under `ticket`; it is answered with a `UserError`. Answer: `None`."""

    ticket: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Answer: `EngineStatus`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    num_adapters: int
    """On the device and parked."""
    num_snapshots: int
    num_running: int
    num_waiting: int
    rss_bytes: int
    tokens_trained: int
    tokens_sampled: int


Operation: TypeAlias = (
    CreateAdapter
    | LoadAdapter
    | DropAdapter
    | ParkAdapter
    | UnparkAdapter
    | TrainItem
    | OptimStep
    | SaveAdapter
    | ImportAdapter
    | MergeAdapter
    | PublishSnapshot
    | LoadSnapshot
    | SaveSnapshot
    | DropSnapshot
    | Sample
    | CancelSample
    | Ping
)
Answer: TypeAlias = (
    LoraSpec
    | ForwardBackwardOutput
    | dict[str, float]
    | SavedCheckpoint
    | ImportedAdapter
    | str
    | DrawnToken
    | SampleResponse
    | EngineStatus
    | None
)
"""A `DrawnToken` alone is no end: it goes before the `SampleResponse` of a streamed `Sample`."""

"""The frozen base: loaded once, its linear layers opened to adapters, its attention ours."""

# T packed token, H hidden, V vocabulary

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from tinsmith.engine.attention import ATTENTION, CurrentPass, PassLayout
from tinsmith.engine.footprint import (
    ADAPTER_COPIES,
    ModelShape,
    adapter_memory,
    check_adapter_fits,
    check_fits,
    footprint,
    host_adapter_memory,
    in_words,
)
from tinsmith.engine.fused import fuse_layers
from tinsmith.engine.hardware import available_bytes, pick_device, pick_dtype
from tinsmith.engine.kernels import FusedKernels
from tinsmith.engine.lora import LoraLayout, Segment
from tinsmith.engine.lora_linear import LoraRouter
from tinsmith.engine.loss_head import Unembedding, logits_of
from tinsmith.engine.model_check import (
    CHECK_LENGTHS,
    check_rows,
    compare,
    narrow_windows,
    reference_of,
    refuse_unknown_layers,
)
from tinsmith.engine.packed_weights import PackingBudget
from tinsmith.engine.precision import multiply_float32_in_bfloat16
from tinsmith.engine.recomputation import Recomputation
from tinsmith.engine.self_attention import plan_blocks
from tinsmith.engine.sites import check_groups, open_sites, sites_in_words
from tinsmith.engine.vision import ImageRows, VisionTower, check_sequence, own_logits, positions_of, reads_images
from tinsmith.types.engine_options import EngineOptions, ModelSource
from tinsmith.types.errors import InvalidInput, TinsmithError, Unsupported
from tinsmith.types.images import PlacedImage
from tinsmith.types.operations import AdapterShape, BaseModelCard, LoraSpec

_ACTIVATIONS_SHARE = 0.5
"""Of the memory free after loading: passes that would keep more than this are recomputed."""
_LAYER = re.compile(r"(.*?\.\d+)\.")

_KV_CONTEXTS = 16
_KV_BYTES_LEAST = 128 * 2**20

_logger = logging.getLogger("tinsmith.engine")


class BaseModel:
    """A transformers causal language model that computes packed rows for many adapters at once."""

    def __init__(self, source: ModelSource, options: EngineOptions) -> None:
        """Raises `InvalidInput` if the model cannot be found or does not fit into memory, `Unsupported` if its
        architecture is not ours to run.
        """
        self.device = pick_device(options.device)
        config = _load_config(source)
        choice = "float32" if options.deterministic and options.dtype == "auto" else options.dtype
        decision = pick_dtype(choice, self.device, config.get_text_config().hidden_size)
        self.dtype = decision.dtype
        needs = _refuse_if_too_large(source, config, options, self.dtype, self.device)
        self._model = _load(source, config, self.dtype).to(self.device)
        self._shape = _shape(self._model.config, self._model.num_parameters())
        self._hidden_scale = _logit_scale(self._model.config.get_text_config())
        self._router = LoraRouter(PackingBudget(is_open=not options.deterministic))
        self._pass = CurrentPass()
        self._pass.attach(self._model)
        self.kernels = FusedKernels()
        self._is_fused = False
        self._recomputation = Recomputation(self._most_tokens_kept(options))
        self._backbone: nn.Module = self._model.get_decoder()
        self._embed = self._model.get_input_embeddings()
        self._vision = VisionTower(self._model, source) if reads_images(config) else None
        self._take_over()
        self._recomputation.attach(self._layers())
        self.card = self._describe(source, options)
        _logger.info(
            "base model %s: %s, %.1f M parameters in %s on %s (%s), %d threads; adapters attach to %s; %s; %s",
            source.name,
            self.card.architecture,
            self.card.num_parameters / 1e6,
            self.card.dtype,
            self.card.device,
            decision.reason,
            torch.get_num_threads(),
            sites_in_words(self.sites),
            needs,
            self._recomputation.in_words(),
        )

    def layout(self, spec: LoraSpec, *, copies: int = ADAPTER_COPIES) -> LoraLayout:
        """Raises `InvalidInput` if a part that the spec trains does not exist here, its rank exceeds the limit, or
        `copies` of its parameters do not fit into memory.
        """
        if spec.rank > self.card.max_rank:
            raise InvalidInput(f"lora_config.rank is {spec.rank}; this server allows at most {self.card.max_rank}")
        check_groups(self.sites, spec, self.card.architecture)
        layout = LoraLayout(self.sites, spec)
        if self.device.type == "cpu":  # a GPU's allocator refuses by itself, a CPU's promises what it cannot keep
            check_adapter_fits(layout.num_parameters, copies, available_bytes(self.device))
        return layout

    def hidden(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        segments: Sequence[Segment],
        packing: PassLayout,
        images: Sequence[ImageRows] = (),
    ) -> Tensor:
        """What the unembedding takes, `[T, H]` of packed rows. With gradients enabled, `backward` may follow.

        Positions are `[T]`, or `[3, T]` where there are pictures; their rows are those with ids below zero. Raises
        `InvalidInput` if a picture cannot be decoded.
        """
        with torch.no_grad():
            embeds_1TH = self._embed(input_ids_T.clamp_min(0)[None] if images else input_ids_T[None])
            if images and self._vision is not None:
                self._vision.put_rows(embeds_1TH[0], images)
        if torch.is_grad_enabled():
            embeds_1TH = embeds_1TH.detach().requires_grad_()
        self._recomputation.decide(len(input_ids_T))
        self._router.route(segments)
        packing = replace(packing, kernels=self.kernels)
        self._pass.layout = packing  # stays: a backward pass that recomputes needs it again
        try:
            output = self._backbone(
                inputs_embeds=embeds_1TH, position_ids=position_ids_T.unsqueeze(-2), use_cache=False, packing=packing
            )
        finally:
            self._router.route(())
        hidden_TH: Tensor = output.last_hidden_state[0]
        return hidden_TH if self._hidden_scale == 1 else hidden_TH.float() * self._hidden_scale

    def check_image(self, image: PlacedImage, where: str) -> None:
        """Raises `InvalidInput` if the picture cannot be decoded, `Unsupported` if this model reads none."""
        if self._vision is None:
            raise Unsupported(f"{where} is of type 'image'; base model {self.card.name!r} reads text only")
        self._vision.check(image, where)

    def backward(self, logprobs_M: Tensor, grad_M: Tensor, segments: Sequence[Segment]) -> None:
        """Carry dL/dlogprob through the model into the segments' gradient buffers.

        `segments` are those of the forward pass: layers that are recomputed meet them again.
        """
        self._router.route(segments)
        try:
            torch.autograd.backward(logprobs_M, grad_M)
        finally:
            self._router.route(())

    @property
    def kv_bytes_useful(self) -> int:
        """A cache beyond this would only fill a small model's machine with prompts nobody repeats."""
        return max(_KV_BYTES_LEAST, _KV_CONTEXTS * self.card.max_context * self.kv_bytes_per_token)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one cached token takes over all layers."""
        return self._shape.kv_bytes_per_token(self.dtype.itemsize)

    def weight_of(self, module: str) -> Tensor | None:
        """Of embeddings or the unembedding, by path; `None` if there is no such module."""
        try:
            weight = self._model.get_submodule(module).weight
        except AttributeError:
            return None
        return weight.detach() if isinstance(weight, Tensor) else None

    @property
    def other_modules(self) -> tuple[str, ...]:
        """Module paths that no adapter attaches to."""
        sites = {site.name for site in self.sites}
        return tuple(name for name, _ in self._model.named_modules() if name and name not in sites)

    def _take_over(self) -> None:
        """Open the sites and put our attention in place; refuse what then computes other logits than before."""
        config, architecture = self._model.config.get_text_config(), type(self._model).__name__
        refuse_unknown_layers(config, architecture)
        with narrow_windows(self._model):
            reference = reference_of(self._model)
            image_reference = self._image_reference()
            self.sites = open_sites(self._model, self._router, reference.rows_seen, CHECK_LENGTHS[0])
            self.head = self._unembedding()
            compare(self._packed_logits(), reference.logits_TV, self.dtype, architecture)
            if image_reference is not None:
                compare(self._logits_beside_image(), image_reference, self.dtype, f"{architecture} with a picture")

    def own_process(self, *, compile_layers: bool) -> None:
        """Settings for the whole process, and a compiler in the background; for engines that have one to themselves."""
        if self.dtype == torch.bfloat16 and self.device.type == "cpu":
            multiply_float32_in_bfloat16()
            if not compile_layers:
                return
            self.kernels.compile_in_background(self._model.config.get_text_config().hidden_size, self.dtype)

    def adopt_compiled_layers(self) -> None:
        """Between two passes: put compiled layers to use if they have become ready."""
        if self.kernels.is_compiled and not self._is_fused:
            self._is_fused = True
            _logger.info("compiled layers in %d places", fuse_layers(self._language_model, self.kernels))

    def _packed_logits(self) -> Tensor:
        ids_T, positions_T = check_rows(self.head.vocab_size, self.device)
        return self._logits_as_packed(ids_T, positions_T, CHECK_LENGTHS)

    def _image_reference(self) -> Tensor | None:
        if self._vision is None:
            return None
        return own_logits(self._model, self._vision, check_sequence(self._model.config, self._vision.rule))

    def _logits_beside_image(self) -> Tensor:
        """Of the picture's sequence, packed behind a shorter one."""
        assert self._vision is not None
        tokens = check_sequence(self._model.config, self._vision.rule)
        before = CHECK_LENGTHS[1]
        ids_T = torch.from_numpy(np.concatenate([np.arange(before), tokens.ids_N])).to(self.device)
        positions = np.concatenate([positions_of(before, ()), positions_of(len(tokens), tokens.images)], axis=1)
        images = [ImageRows(i, at=before + i.start, first=0, end=i.length, where="check") for i in tokens.images]
        lengths = (before, len(tokens))
        return self._logits_as_packed(ids_T, torch.from_numpy(positions).to(self.device), lengths, images)[before:]

    def _logits_as_packed(
        self, ids_T: Tensor, positions_T: Tensor, lengths: Sequence[int], images: Sequence[ImageRows] = ()
    ) -> Tensor:
        layout = PassLayout(blocks=plan_blocks(list(lengths), self.device))
        try:
            self._language_model.set_attn_implementation(ATTENTION)
            with torch.inference_mode():
                return logits_of(self.hidden(ids_T, positions_T, (), layout, images), self.head, ())
        except (TinsmithError, torch.OutOfMemoryError):
            raise
        except (TypeError, ValueError, AttributeError, LookupError, AssertionError, RuntimeError) as error:
            # what foreign modelling code raises when it is called in another way than its authors had in mind
            raise Unsupported(f"{type(self._model).__name__} cannot run packed rows: {error!r}") from error

    @property
    def _language_model(self) -> PreTrainedModel:
        """The part that reads packed rows."""
        return self._model if self._vision is None else self._model.get_decoder()

    def _unembedding(self) -> Unembedding:
        head = self._model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise Unsupported(f"{type(self._model).__name__} has no linear unembedding")
        bias = head.bias.detach().float() if head.bias is not None else None
        softcap = getattr(self._model.config.get_text_config(), "final_logit_softcapping", None)
        return Unembedding(head.weight.detach().float(), bias, len(self.sites) - 1, softcap, head.weight.detach())

    def _most_tokens_kept(self, options: EngineOptions) -> int | None:
        if options.gradient_checkpointing == "on":
            return 0
        free = available_bytes(self.device)
        if options.gradient_checkpointing == "off" or free is None:
            return None
        room = int(_ACTIVATIONS_SHARE * max(0, free - options.kv_cache_bytes))
        return self._shape.tokens_kept_in(room, self.dtype.itemsize)

    def _layers(self) -> Iterator[nn.Module]:
        matches = (_LAYER.match(site.name) for site in self.sites)
        for name in dict.fromkeys(match.group(1) for match in matches if match is not None):
            yield self._model.get_submodule(name)

    def _describe(self, source: ModelSource, options: EngineOptions) -> BaseModelCard:
        config = self._model.config.get_text_config()
        eos = self._model.generation_config.eos_token_id if self._model.generation_config else None
        eos = config.eos_token_id if eos is None else eos
        return BaseModelCard(
            name=source.name,
            source=source.load_from,
            architecture=type(self._model).__name__,
            vocab_size=self.head.vocab_size,
            max_context=_max_context(config),
            num_parameters=self._model.num_parameters(),
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            eos_token_ids=tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,),
            max_rank=options.max_rank,
            images=None if self._vision is None else self._vision.rule,
            adapter_shape=self._adapter_shape(),
            adapter_memory_bytes=self._adapter_memory(options),
            host_adapter_bytes=self._host_adapter_memory(options),
        )

    def _adapter_shape(self) -> AdapterShape:
        sizes = dict.fromkeys(("attn", "mlp", "unembed"), 0)
        for site in self.sites:
            sizes[site.group] += site.elements_per_rank
        return AdapterShape(**sizes)

    def _adapter_memory(self, options: EngineOptions) -> int | None:
        needed = footprint(self._shape, options, self.dtype.itemsize)
        is_host = self.device.type != "cuda"
        return adapter_memory(needed, options, available_bytes(self.device), is_host=is_host)

    def _host_adapter_memory(self, options: EngineOptions) -> int:
        if self.device.type != "cuda" and options.host_adapter_bytes is None:
            return 0  # the same memory
        return host_adapter_memory(options, available_bytes(torch.device("cpu")))


def _refuse_if_too_large(
    source: ModelSource, config: PretrainedConfig, options: EngineOptions, dtype: torch.dtype, device: torch.device
) -> str:
    """Raises `InvalidInput` if the model does not fit; returns what it needs, in words for the log."""
    num_parameters = _count_parameters(config)
    free = available_bytes(device)
    if num_parameters is None:
        return "memory not reckoned"
    needed = footprint(_shape(config, num_parameters), options, dtype.itemsize)
    check_fits(source.name, needed, free, dtype=str(dtype).removeprefix("torch."), device=device.type)
    free_words = "an unknown amount" if free is None else in_words(free)
    return f"up to {in_words(needed.total)} of {free_words} free memory"


def _count_parameters(config: PretrainedConfig) -> int | None:
    """From the configuration alone; `None` if the architecture cannot be built without its weights."""
    try:
        with torch.device("meta"):
            return int(auto_class(config).from_config(config, attn_implementation="eager").num_parameters())
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
        _logger.info("the size of this architecture is not known before it is loaded: %r", error)
        return None


def _shape(config: PretrainedConfig, num_parameters: int) -> ModelShape:
    text = config.get_text_config()
    try:
        return ModelShape.of(text, num_parameters)
    except (AttributeError, TypeError, RuntimeError) as error:  # RuntimeError: layers of different shapes
        raise Unsupported(f"the size of model type {text.model_type!r} cannot be told: {error}") from error


def _max_context(config: PretrainedConfig) -> int:
    """LongRoPE rotates all of a sequence by other angles once it outgrows the length of the first training; the rows of
    a pass share their angles, and cached keys keep theirs, so sequences end at that length.
    """
    most = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "longrope":
        return most
    first = min(most, int(rope["original_max_position_embeddings"]))
    _logger.warning("the context is %d tokens of %d: beyond, LongRoPE would change the tokens before", first, most)
    return first


def _logit_scale(config: PretrainedConfig) -> float:
    """What logits are multiplied with; the same, exactly, as scaling what the unembedding takes."""
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        return float(scale)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite
        return 1 / float(divisor)
    return 1.0


def _load_config(source: ModelSource) -> PretrainedConfig:
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(source.load_from)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(source, error) from error
    return config


def auto_class(config: PretrainedConfig) -> Any:
    return AutoModelForImageTextToText if reads_images(config) else AutoModelForCausalLM


def _attention_at_load(config: PretrainedConfig) -> str | dict[str, str]:
    """Plain for what is compared with ours, fused for the vision tower, which keeps it."""
    return {"": "eager", "text_config": "eager", "vision_config": "sdpa"} if reads_images(config) else "eager"


def _load(source: ModelSource, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    try:
        model = auto_class(config).from_pretrained(
            source.load_from, config=config, dtype=dtype, attn_implementation=_attention_at_load(config)
        )
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load(source, error) from error
    return model.eval().requires_grad_(False)


def _cannot_load(source: ModelSource, error: Exception) -> InvalidInput:
    return InvalidInput(f"base model {source.name!r} cannot be loaded from {source.location!r}: {error}")

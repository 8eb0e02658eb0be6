"""Every public method of the official SDK, once, against a running server: for `make compat`.

Run by the interpreter of each SDK version in turn, with `TINKER_BASE_URL` set. One line of JSON per row goes to stdout,
`{"row": name, "state": state, "why": text}`, where the state is works, refused, broken (by the SDK itself) or fails; a
method that this version lacks has no line.
An `x_async` twin is tried with the arguments of `x`.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import pickle
import sys
import tarfile
import tempfile
import traceback
import typing
import urllib.request
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import tinker
import torch
from tinker import types

MODEL = "tinsmith/tiny"
TIMEOUT_S = 60
CLASSES = ("ServiceClient", "TrainingClient", "SamplingClient", "RestClient", "AdminClient")
SENTENCES = [[10 + (7 * i + 3 * j) % 400 for j in range(8)] for i in range(4)]
PROMPT = types.ModelInput.from_ints([20, 21, 22, 23])

Call = tuple[tuple[Any, ...], dict[str, Any]]
Row = tuple[Callable[[], Call], Callable[[Any], bool]]
ROWS: dict[str, Row] = {}
OPTIONS: dict[str, Callable[[], bool]] = {}


CAUSES = {"refused": "not supported", "broken": "AsyncTinker client called from incorrect event loop"}
"""Words by which a failure is known to be a refusal of the server, or the SDK's own before it has sent anything."""


class Now:
    """What later rows take from earlier ones."""

    service: Any
    rest: Any
    trainer: Any
    sampler: Any
    state: str
    sampler_path: str
    external: str = ""
    handle: str = ""
    count = 0


def name() -> str:
    Now.count += 1
    return f"n{Now.count}"


def value(found: Any) -> Any:
    """What a future of any version comes to."""
    if hasattr(found, "result"):
        try:
            return found.result(timeout=TIMEOUT_S)
        except TypeError:
            return found.result()
    return found


async def awaited(found: Any) -> Any:
    """The same of a twin; some have to be awaited twice."""
    for _ in range(3):
        if not inspect.isawaitable(found):
            return found
        found = await asyncio.wait_for(_one(found), TIMEOUT_S)
    return found


async def _one(found: Any) -> Any:
    return await found


def row(method: str, *args: Any, check: Callable[[Any], bool] = lambda found: True, **kwargs: Any) -> None:
    """Arguments that are functions are called when the row's turn has come."""

    def now(given: Any) -> Any:
        return given() if inspect.isfunction(given) else given

    ROWS[method] = (lambda: (tuple(map(now, args)), {key: now(item) for key, item in kwargs.items()}), check)


def option(title: str) -> Callable[[Callable[[], bool]], Callable[[], bool]]:
    """A row that is more than one call: `False` says that this version has no such thing."""

    def add(function: Callable[[], bool]) -> Callable[[], bool]:
        OPTIONS[title] = function
        return function

    return add


def datum(tokens: list[int]) -> types.Datum:
    inputs = {"target_tokens": tokens[1:], "weights": [1.0] * (len(tokens) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def data() -> list[types.Datum]:
    return [datum(sentence) for sentence in SENTENCES]


def policy_data() -> list[types.Datum]:
    n = len(SENTENCES[0]) - 1
    inputs = {"target_tokens": SENTENCES[0][1:], "logprobs": [-6.0] * n, "advantages": [1.0] * n}
    return [types.Datum(model_input=types.ModelInput.from_ints(SENTENCES[0][:-1]), loss_fn_inputs=inputs)]


def adam() -> types.AdamParams:
    return types.AdamParams(learning_rate=1e-4)


def params(**changes: Any) -> types.SamplingParams:
    return types.SamplingParams(**({"max_tokens": 4, "seed": 1, "temperature": 1.0} | changes))


def callable_loss(data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    return -sum(lp.sum() for lp in logprobs), {"mine": 1.0}


def traced_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return -(logprobs * weights).sum(), {}


def saved() -> str:
    return value(Now.trainer.save_state(name())).path


def run_id() -> str:
    return Now.trainer.model_id


def session_id() -> str:
    return run_id().split(":")[0]


def trained(output: Any) -> bool:
    return output.metrics["loss:sum"] > 0 and len(output.loss_fn_outputs) == len(SENTENCES)


def drawn(response: Any) -> bool:
    return len(response.sequences[0].tokens) == 4 and len(response.sequences[0].logprobs) == 4


def has_model(client: Any) -> bool:
    return ":train:" in client.model_id


def scored(logprobs: Any) -> bool:
    return len(logprobs) == 4 and logprobs[0] is None and all(lp < 0 for lp in logprobs[1:])


def is_none(found: Any) -> bool:
    return found is None


HOUR = datetime.now(timezone.utc).replace(minute=0, second=0, microsecond=0)  # noqa: UP017 - older interpreters

# ---- ServiceClient ----

row(
    "ServiceClient.get_server_capabilities", check=lambda found: MODEL in [m.model_name for m in found.supported_models]
)
row("ServiceClient.create_lora_training_client", MODEL, rank=4, check=has_model)
row("ServiceClient.create_training_client_from_state", lambda: Now.state, check=has_model)
row("ServiceClient.create_training_client_from_state_with_optimizer", lambda: Now.state, check=has_model)
row(
    "ServiceClient.create_sampling_client",
    base_model=MODEL,
    check=lambda c: drawn(value(c.sample(PROMPT, 1, params(stop=[])))),
)
row("ServiceClient.create_rest_client", check=lambda client: hasattr(client, "get_training_run"))
row(
    "ServiceClient.create_custom_loss",
    lambda: traced_loss,
    {"logprobs": 1, "weights": 1},
    check=lambda handle: trained(value(Now.trainer.forward_backward_custom(data(), handle))),
)
row("ServiceClient.get_telemetry")
row("ServiceClient.get_console_url", check=lambda url: url.startswith("http"))

# ---- TrainingClient ----

row("TrainingClient.get_info", check=lambda info: info.model_data.model_name == MODEL)
row("TrainingClient.get_tokenizer", check=lambda tokenizer: bool(tokenizer.encode("a kettle")))
row("TrainingClient.get_telemetry")
row("TrainingClient.get_console_url", check=lambda url: url.startswith("http"))
row("TrainingClient.forward", data, "cross_entropy", check=trained)
row("TrainingClient.forward_backward", data, "cross_entropy", check=trained)
row(
    "TrainingClient.forward_backward_custom",
    data,
    lambda: callable_loss,
    check=lambda found: found.metrics["mine"] == 1.0,
)
row("TrainingClient.optim_step", adam)
row("TrainingClient.save_state", name, check=lambda saved: "/weights/" in saved.path)
row("TrainingClient.save_weights_for_sampler", name, check=lambda saved: "/sampler_weights/" in saved.path)
row("TrainingClient.save_weights_external", name, check=lambda saved: "/external_weights/" in saved.path)
row("TrainingClient.save_weights_and_get_sampling_client", check=lambda c: scored(value(c.compute_logprobs(PROMPT))))
row(
    "TrainingClient.save_weights_and_get_sampling_client_submit",
    check=lambda c: scored(value(c.compute_logprobs(PROMPT))),
)
row(
    "TrainingClient.create_sampling_client",
    lambda: Now.sampler_path,
    check=lambda c: scored(value(c.compute_logprobs(PROMPT))),
)
row("TrainingClient.load_state", lambda: Now.state)
row("TrainingClient.load_state_with_optimizer", lambda: Now.state)

# ---- SamplingClient ----

row("SamplingClient.sample", PROMPT, 2, lambda: params(stop=[]), check=drawn)
row("SamplingClient.compute_logprobs", PROMPT, check=scored)
row("SamplingClient.get_base_model", check=lambda found: found == MODEL)
row("SamplingClient.get_tokenizer", check=lambda tokenizer: bool(tokenizer.encode("a kettle")))
row("SamplingClient.get_telemetry")
row("SamplingClient.get_sampler_handle", check=bool)
row(
    "SamplingClient.from_sampler_handle",
    lambda: Now.handle,
    api_key="tml-local",
    check=lambda c: scored(value(c.compute_logprobs(PROMPT))),
)
row(
    "SamplingClient.create",
    lambda: Now.service.holder,
    base_model=MODEL,
    check=lambda c: scored(value(c.compute_logprobs(PROMPT))),
)
row("SamplingClient.on_queue_state_change", lambda: queue_state(), "a reason")

# ---- RestClient ----

row("RestClient.get_server_capabilities", check=lambda found: bool(found.supported_models))
row("RestClient.get_telemetry")
row("RestClient.get_training_run", run_id, check=lambda run: run.base_model == MODEL)
row("RestClient.get_training_run_by_tinker_path", lambda: Now.state, check=lambda run: run.base_model == MODEL)
row("RestClient.get_weights_info_by_tinker_path", lambda: Now.state, check=lambda info: info.lora_rank == 4)
row("RestClient.list_training_runs", check=lambda found: bool(found.training_runs))
row("RestClient.list_checkpoints", run_id, check=lambda found: bool(found.checkpoints))
row("RestClient.list_user_checkpoints", check=lambda found: bool(found.checkpoints))
row("RestClient.publish_checkpoint_from_tinker_path", lambda: Now.state)
row("RestClient.unpublish_checkpoint_from_tinker_path", lambda: Now.state)
row("RestClient.set_checkpoint_ttl_from_tinker_path", lambda: Now.state, 7200)
row("RestClient.delete_checkpoint", run_id, lambda: saved().split("/", 3)[3])
row("RestClient.delete_checkpoint_from_tinker_path", saved)
row(
    "RestClient.get_checkpoint_archive_url",
    run_id,
    lambda: Now.sampler_path.split("/", 3)[3],
    check=lambda found: archived(found.url),
)
row(
    "RestClient.get_checkpoint_archive_url_from_tinker_path",
    lambda: Now.sampler_path,
    check=lambda found: archived(found.url),
)
row(
    "RestClient.get_external_weights_urls",
    lambda: external(),
    check=lambda found: fetched(found.urls["adapter_config.json"]),
)
row("RestClient.copy_weights", lambda: Now.state, "archive", check=lambda path: path.startswith("tinker://"))
row("RestClient.get_session", session_id, check=lambda found: run_id() in found.training_run_ids)
row("RestClient.list_sessions", check=lambda found: bool(found.sessions))
row("RestClient.assign_session_project", session_id, "research", check=is_none)
row(
    "RestClient.search_sessions",
    lambda: types.SessionSearchRequest(session_id=session_id()),
    check=lambda found: len(found.sessions) == 1,
)
row("RestClient.export_session_trace", session_id, check=lambda url: b"traceEvents" in fetched(url))
row(
    "RestClient.get_sampler",
    lambda: value(Now.rest.get_session(session_id())).sampler_ids[0],
    check=lambda found: found.base_model == MODEL,
)
row("RestClient.whoami", check=lambda found: bool(found.user_urn))
for owner in ("RestClient", "AdminClient"):
    row(f"{owner}.get_audit_log", check=lambda log: bool(log.entries))
    row(
        f"{owner}.get_billing_usage",
        HOUR - timedelta(hours=1),
        HOUR + timedelta(hours=1),
        check=lambda usage: usage is not None,
    )
    row(f"{owner}.get_current_checkpoint_storage_usage", check=lambda found: bool(found.data))
row("AdminClient.get_telemetry")

# ---- at the end ----

row("ServiceClient.copy_weights", lambda: Now.sampler_path, check=lambda path: path.startswith("tinker://"))
row("ServiceClient.close", "success")


def external() -> str:
    return value(Now.trainer.save_weights_external(name())).path


def queue_state() -> Any:
    from tinker.lib import api_future_impl

    return api_future_impl.QueueState.ACTIVE


def fetched(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
        content: bytes = answer.read()
    return content


def archived(url: str) -> bool:
    with tempfile.TemporaryFile() as file:
        file.write(fetched(url))
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            return "adapter_model.safetensors" in tar.getnames()


# ---- what is more than one call ----


@option("1,030 datums in one call")
def _many_datums() -> bool:
    output = value(Now.trainer.forward([datum([5 + i % 300, 6, 7]) for i in range(1030)], "cross_entropy"))
    assert len(output.loss_fn_outputs) == 1030
    return True


@option("losses: importance_sampling, ppo")
def _losses() -> bool:
    for loss in ("importance_sampling", "ppo"):
        assert math.isfinite(value(Now.trainer.forward_backward(policy_data(), loss)).metrics["loss:sum"])
    value(Now.trainer.optim_step(adam()))
    return True


@option("losses: cispo, dro")
def _more_losses() -> bool:
    for loss, config in (("cispo", {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}), ("dro", {"beta": 0.05})):
        assert math.isfinite(value(Now.trainer.forward(policy_data(), loss, config)).metrics["loss:sum"])
    return True


@option("steps sent before their results are read")
def _ahead() -> bool:
    futures = []
    for _ in range(3):
        futures.append(Now.trainer.forward_backward(data(), "cross_entropy"))
        futures.append(Now.trainer.optim_step(types.AdamParams(learning_rate=5e-3)))
    losses = [value(future).metrics["loss:sum"] for future in futures[::2]]
    assert losses == sorted(losses, reverse=True), losses
    return True


@option("sample: prompt log-probs and their top k")
def _prompt_logprobs() -> bool:
    response = value(Now.sampler.sample(PROMPT, 1, params(), include_prompt_logprobs=True, topk_prompt_logprobs=3))
    assert response.prompt_logprobs[0] is None
    assert [len(entry) for entry in response.topk_prompt_logprobs[1:]] == [3, 3, 3]
    return True


@option("sample: top k of each sampled token")
def _sampled_topk() -> bool:
    if "topk_sample_logprobs" not in inspect.signature(Now.sampler.sample).parameters:
        return False
    response = value(Now.sampler.sample(PROMPT, 1, params(stop=[]), topk_sample_logprobs=2))
    assert [len(entry) for entry in response.sequences[0].topk_logprobs] == [2] * 4
    return True


@option("sample: stop strings and stop tokens")
def _stops() -> bool:
    free = value(Now.sampler.sample(PROMPT, 1, params(max_tokens=8, temperature=0.0, stop=[]))).sequences[0].tokens
    stopped = value(Now.sampler.sample(PROMPT, 1, params(max_tokens=8, temperature=0.0, stop=[free[2]]))).sequences[0]
    assert (list(stopped.tokens)[-1], stopped.stop_reason) == (free[2], "stop")
    tokenizer = Now.trainer.get_tokenizer()
    text = tokenizer.decode(free)[:3]
    by_text = value(Now.sampler.sample(PROMPT, 1, params(max_tokens=8, temperature=0.0, stop=[text]))).sequences[0]
    assert (text in tokenizer.decode(by_text.tokens), by_text.stop_reason) == (True, "stop")
    return True


@option("sampling client: pickled and unpickled")
def _pickled() -> bool:
    if not {"__reduce__", "__getstate__"} & vars(type(Now.sampler)).keys():
        return False
    copy = pickle.loads(pickle.dumps(Now.sampler))
    return scored(value(copy.compute_logprobs(PROMPT)))


@option("save_state: overwrite")
def _overwrite() -> bool:
    if "overwrite" not in inspect.signature(Now.trainer.save_state).parameters:
        return False
    title = name()
    for _ in range(2):
        value(Now.trainer.save_state(title, overwrite=True))
    return True


@option("save_weights_and_get_sampling_client: inflight")
def _inflight() -> bool:
    if "kind" not in inspect.signature(Now.trainer.save_weights_and_get_sampling_client).parameters:
        return False
    return scored(
        value(value(Now.trainer.save_weights_and_get_sampling_client(kind="inflight")).compute_logprobs(PROMPT))
    )


@option("provenance spans")
def _provenance() -> bool:
    if not hasattr(types.Datum, "with_provenance"):
        return False
    n = len(SENTENCES[0]) - 1
    spans = [[types.PromptProvenanceSpan(sequence_id="s", offset=start, length=n)] for start in (0, 1)]
    spanned = datum(SENTENCES[0]).with_provenance(model_input=spans[0], loss_fn_inputs=spans[1])
    return value(Now.trainer.forward([spanned], "cross_entropy")).metrics["loss:sum"] > 0


@option("a model is unloaded")
def _unloaded() -> bool:
    from tinker import resources
    from tinker.lib.client_connection_pool_type import ClientConnectionPoolType

    if not hasattr(resources.AsyncModelsResource, "unload"):
        return False
    client = value(Now.service.create_lora_training_client(MODEL, rank=2))

    async def unload() -> Any:
        with Now.service.holder.aclient(ClientConnectionPoolType.TRAIN) as http:
            return await http.models.unload(request=types.UnloadModelRequest(model_id=client.model_id))

    return bool(value(Now.service.holder.run_coroutine_threadsafe(unload())).request_id)


@option("bad data: named, and the client lives on")
def _bad_data() -> bool:
    message = ""
    try:
        value(Now.trainer.forward_backward([datum([5, 999_999])], "cross_entropy"))
    except Exception as error:  # noqa: BLE001 - whatever this version raises
        message = str(error)
    assert "999999" in message, message
    return trained(value(Now.trainer.forward(data(), "cross_entropy")))


@option("loss: stable_reinforce")
def _stable_reinforce() -> bool:
    if "stable_reinforce" not in typing.get_args(types.LossFnType):
        return False
    value(Now.trainer.forward_backward(policy_data(), "stable_reinforce"))
    return True


@option("optimizer: dimuon")
def _dimuon() -> bool:
    if not hasattr(tinker, "DimuonOptimizerConfig"):
        return False
    value(Now.service.create_lora_training_client(MODEL, rank=2, optimizer=tinker.DimuonOptimizerConfig()))
    return True


@option("sampling client: record_stability_info")
def _stability() -> bool:
    if "record_stability_info" not in inspect.signature(Now.service.create_sampling_client).parameters:
        return False
    client = value(Now.service.create_sampling_client(base_model=MODEL, record_stability_info=True))
    value(client.sample(PROMPT, 1, params()))
    return True


@option("save_weights_external: age_encryption_recipients")
def _age() -> bool:
    save = getattr(Now.trainer, "save_weights_external", None)
    if save is None or "age_encryption_recipients" not in inspect.signature(save).parameters:
        return False
    value(save(name(), age_encryption_recipients=["age1qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq"]))
    return True


# ---- the run ----


def clients() -> dict[str, Any]:
    found = {
        "ServiceClient": Now.service,
        "TrainingClient": Now.trainer,
        "SamplingClient": Now.sampler,
        "RestClient": Now.rest,
    }
    if hasattr(tinker, "AdminClient"):
        found["AdminClient"] = tinker.AdminClient()
    return found


def set_up() -> None:
    projects = "project_id" in inspect.signature(tinker.ServiceClient.__init__).parameters
    Now.service = tinker.ServiceClient(project_id="compat") if projects else tinker.ServiceClient()
    Now.rest = Now.service.create_rest_client()
    Now.trainer = value(Now.service.create_lora_training_client(MODEL, rank=4, seed=1))
    Now.state = saved()
    Now.sampler_path = value(Now.trainer.save_weights_for_sampler(name())).path
    Now.sampler = value(Now.service.create_sampling_client(model_path=Now.sampler_path))
    if hasattr(Now.sampler, "get_sampler_handle"):
        Now.handle = Now.sampler.get_sampler_handle()


def report(title: str, action: Callable[[], Any]) -> None:
    """`action` raises, or says `False` where there is nothing to try."""
    try:
        if action() is False:
            return
        state, why = "works", ""
    except Exception as error:  # noqa: BLE001 - the boundary of one row
        text = f"{type(error).__name__}: {error}"
        state = next((state for state, words in CAUSES.items() if words in text), "fails")
        why = traceback.format_exc()[-1500:] if state == "fails" else text
    print(json.dumps({"row": title, "state": state, "why": why}), flush=True)


def try_method(client: Any, method: str, is_twin: bool) -> bool:
    call, check = ROWS[method]
    args, kwargs = call()
    function = getattr(client, method.split(".")[1] + ("_async" if is_twin else ""))
    if is_twin:

        async def twin() -> Any:
            return await awaited(function(*args, **kwargs))

        found = asyncio.run(twin())
    else:
        found = value(function(*args, **kwargs))
    assert check(found) is not False, f"unexpected: {found!r}"
    return True


def main() -> None:
    warnings.simplefilter("ignore")
    set_up()
    found = clients()
    methods = {
        f"{cls}.{attribute}"
        for cls, client in found.items()
        for attribute, _ in inspect.getmembers(type(client), callable)
        if not attribute.startswith("_")
    }
    for title, function in OPTIONS.items():
        report(title, function)
    last = [method for method in ROWS if method == "ServiceClient.close"]
    for method in [method for method in ROWS if method not in last] + last:
        for is_twin, present in ((False, method), (True, f"{method}_async")):
            if present in methods:
                client = found[method.split(".")[0]]
                report(
                    present, lambda client=client, method=method, is_twin=is_twin: try_method(client, method, is_twin)
                )
    for unknown in sorted(methods - ROWS.keys() - {f"{method}_async" for method in ROWS}):
        print(json.dumps({"row": unknown, "state": "fails", "why": "this script does not try it"}), flush=True)
    sys.stdout.flush()
    os._exit(0)  # some versions hang or abort in their background threads when the interpreter ends


if __name__ == "__main__":
    main()

"""Adapters from elsewhere into a server and out again, by the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tinsmith.cli.app import app
from tinsmith.client import ServiceClient
from tinsmith.models import tiny_folder
from tinsmith.types import AdamParams, Datum, ModelInput

TOKENS = [7, 70, 17, 170, 27, 99, 3, 12]


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An adapter that PEFT saved, and the model with it."""
    base = AutoModelForCausalLM.from_pretrained(tiny_folder(), dtype=torch.float32)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], r=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about what PEFT asks it
        model = get_peft_model(base, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("adapters") / "outside"
    model.save_pretrained(folder)
    return folder, model.eval()


def command(*arguments: str) -> dict[str, Any]:
    outcome = CliRunner().invoke(app, ["checkpoint", *arguments, "--json"])
    assert outcome.exit_code == 0, outcome.output
    answer: dict[str, Any] = json.loads(outcome.stdout.splitlines()[-1])
    return answer


def logprobs_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, :-1]
    return torch.log_softmax(logits.float(), -1).gather(1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


def test_an_imported_adapter_samples_and_trains_as_in_peft(server: str, outside: tuple[Path, Any]) -> None:
    folder, peft = outside
    made = command("import", str(folder), "--base-url", server)
    assert made["checkpoint_id"] == "weights/outside"
    with ServiceClient(base_url=server) as service:
        sampler = service.create_sampling_client(model_path=made["tinker_path"]).result()
        told = sampler.compute_logprobs(ModelInput.from_ints(TOKENS)).result()
        expected = logprobs_of(peft)
        assert (torch.tensor(told[1:]) - expected).abs().max() <= 0.05  # the server may compute in bfloat16
        assert (expected - logprobs_of(AutoModelForCausalLM.from_pretrained(tiny_folder()))).abs().max() > 0.2
        trainer = service.create_training_client_from_state(made["tinker_path"]).result()
        datum = Datum(ModelInput.from_ints(TOKENS[:-1]), {"target_tokens": TOKENS[1:], "weights": [1.0] * 7})
        losses = []
        for _ in range(3):
            losses.append(trainer.forward_backward([datum], "cross_entropy").result().metrics["loss:sum"])
            trainer.optim_step(AdamParams(learning_rate=0.01)).result()
        assert losses[2] < losses[0]
        saved = trainer.save_state("on").result().path
    listed = CliRunner().invoke(app, ["checkpoint", "list", "--base-url", server]).stdout
    assert "loss:sum" in listed
    info = command("info", saved.replace("/on", "/~latest"), "--base-url", server)
    assert (info["tinker_path"], info["version"], info["step"]) == (saved, 1, 3)


def test_a_merged_export_is_a_model_of_its_own(server: str, outside: tuple[Path, Any], tmp_path: Path) -> None:
    folder, peft = outside
    made = command("import", str(folder), "--name", "a", "--base-url", server)
    wanted = ["--merged", "--dtype", "float32", "-o", str(tmp_path / "model")]
    told = command("export", made["tinker_path"], *wanted, "--base-url", server)
    assert {Path(file).name for file in told["files"]} >= {"model.safetensors", "config.json", "tokenizer.json"}
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert (logprobs_of(merged) - logprobs_of(peft)).abs().max() <= 1e-4
    run_id = made["tinker_path"].split("/")[2]
    assert command("pin", f"tinker://{run_id}/weights/~latest", "--base-url", server)["pinned"]
    assert command("info", made["tinker_path"], "--base-url", server)["kept"] == "pinned"
    assert not command("unpin", made["tinker_path"], "--base-url", server)["pinned"]
    listed = CliRunner().invoke(app, ["checkpoint", "list", "--run-id", run_id, "--json", "--base-url", server])
    assert [one["checkpoint_id"] for one in json.loads(listed.stdout)] == ["weights/a"]


def test_what_is_no_adapter_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["checkpoint", "import", str(tmp_path), "--base-url", "http://127.0.0.1:1"])
    assert outcome.exit_code == 2
    assert "it has no adapter_config.json" in " ".join(outcome.output.replace("│", " ").split())

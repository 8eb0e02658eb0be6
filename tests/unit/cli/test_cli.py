from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tinsmith import __version__
from tinsmith.cli import main
from tinsmith.data import ChatTokenizer, load_tokenizer
from tinsmith.kitchen.adapters.noop_training import NoopBackend
from tinsmith.models import TINY


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command in an empty folder and a wide, colourless terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        out, err = capsys.readouterr()
        code = ended.value.code
        return Outcome(code=code if isinstance(code, int) else 0, out=out, err=err)

    return run


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return load_tokenizer(TINY)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tokenizer: ChatTokenizer) -> list[dict[str, Any]]:
    """Every command talks to one noop backend; what it was opened with is collected."""
    backend, calls = NoopBackend(chat_tokenizer=tokenizer), list[dict[str, Any]]()

    def open_backend(**options: Any) -> NoopBackend:
        calls.append(options)
        return backend

    monkeypatch.setattr("tinsmith.kitchen.adapters.tinker_training.open_backend", open_backend)
    return calls


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "talk.jsonl"
    path.write_text('{"prompt": "What is tin?", "completion": "A metal."}\n' * 4)
    return path


def test_version(cli: Run) -> None:
    assert cli("--version") == Outcome(code=0, out=f"tinsmith {__version__}\n", err="")


def test_help_lists_the_commands(cli: Run) -> None:
    outcome = cli("--help")
    assert outcome.code == 0
    assert all(name in outcome.out for name in ("demo", "run", "sample", "serve"))


def test_an_unknown_command_is_a_usage_error(cli: Run) -> None:
    outcome = cli("bake")
    assert outcome.code == 2
    assert "No such command 'bake'" in outcome.err


def test_the_command_line_loads_neither_torch_nor_transformers_nor_a_server() -> None:
    script = (
        "import sys, tinsmith.cli.app, tinsmith.cli.run, tinsmith.cli.sample, tinsmith.cli.demo, tinsmith.kitchen;"
        "heavy = {'torch', 'transformers', 'fastapi', 'matplotlib'} & sys.modules.keys();"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_run_without_a_recipe_lists_them(cli: Run) -> None:
    outcome = cli("run")
    assert outcome.code == 0
    assert re.search(r"supervised +Fine-tune a LoRA adapter on conversations\.", outcome.out)


def test_the_help_of_a_recipe_lists_every_key_with_its_default(cli: Run) -> None:
    outcome = cli("run", "supervised", "--help")
    assert outcome.code == 0
    lines = [line.rstrip() for line in outcome.out.splitlines()]
    place = lines.index("  batch_size=128  int")
    assert lines[place + 1] == "      Conversations per optimizer step."
    assert "  lr_schedule=linear  linear|cosine|constant|exponential|polynomial" in lines
    assert "  data (required)  path" in lines


def test_a_recipe_runs_and_says_where_everything_is(cli: Run, opened: list[dict[str, Any]], data: Path) -> None:
    outcome = cli("run", "supervised", f"data={data}", "epochs=3", "batch_size=2", "output=out", "model=some/model")
    assert outcome.code == 0, outcome.err
    assert opened == [{"base_url": None, "model": "some/model", "store": Path("out/checkpoints")}]
    assert "6 steps will not teach much; raise epochs or lower batch_size" in outcome.out
    assert "step 6/6" in outcome.out
    assert "weights   tinker://noop-1/sampler_weights/step_000006" in outcome.out
    assert 'try it    tinsmith sample "Hello!" --model out' in outcome.out
    assert json.loads(Path("out/config.json").read_text())["epochs"] == 3


def test_keys_may_come_from_a_file(cli: Run, opened: list[dict[str, Any]], data: Path) -> None:
    Path("c.toml").write_text(f'data = "{data}"\nepochs = 2\noutput = "out"\n')
    assert cli("run", "supervised", "--config", "c.toml", "epochs=4").code == 0
    assert json.loads(Path("out/config.json").read_text())["epochs"] == 4


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (("run", "bake"), 2, "error: unknown recipe 'bake'; the recipes are supervised"),
        (("run", "supervised"), 2, "error: key 'data' is required"),
        (("run", "supervised", "data=x", "epoch=3"), 2, "error: unknown key 'epoch'; the keys are model, output, "),
        (("run", "supervised", "data=x", "epochs=many"), 2, "error: epochs='many': Input should be a valid integer"),
        (("run", "supervised", "data=none.jsonl"), 1, "error: cannot read the data file 'none.jsonl': No such file"),
        (("run", "supervised", "data=none.jsonl", "--dry-run"), 1, "error: cannot read the data file 'none.jsonl'"),
        (
            ("run", "math_rl", "environment=additon", "--dry-run"),
            1,
            "error: stage 'plan_rollouts': environment='additon' is none of addition, ",
        ),
        (("run", "supervised", "--config", "none.toml"), 2, "error: cannot read the config file 'none.toml'"),
        (("sample", "hi", "--raw", "--system", "x"), 2, "--system belongs to the chat template"),
        (("sample", "hi", "--base-url", "ftp://x"), 1, "must start with http://, https:// or local:"),
        (("sample", "hi", "--temperature", "-1"), 2, "Invalid value for '--temperature'"),
    ],
)
def test_a_wrong_request_is_answered_with_one_line_and_no_traceback(
    cli: Run, arguments: tuple[str, ...], code: int, complaint: str
) -> None:
    outcome = cli(*arguments)
    assert outcome.code == code
    assert complaint in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_bad_data_is_named_by_line(cli: Run, opened: list[dict[str, Any]], data: Path) -> None:
    data.write_text('{"prompt": "a"}\n')
    outcome = cli("run", "supervised", f"data={data}")
    assert outcome.code == 1
    assert outcome.err == f"error: {data}:1: field 'completion' is missing beside 'prompt'\n"


def test_a_bug_is_called_a_bug_and_debug_shows_where(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("tinsmith.kitchen.adapters.tinker_training.open_backend", broken)
    outcome = cli("sample", "hi")
    assert outcome.code == 1
    assert outcome.err == (
        "error: internal error, ZeroDivisionError: oh (run `tinsmith --debug …` for the traceback)\n"
    )
    assert "Traceback (most recent call last)" in cli("--debug", "sample", "hi").err


def test_ctrl_c_ends_with_130(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tinsmith.kitchen.adapters.tinker_training.open_backend", interrupted)
    assert cli("sample", "hi") == Outcome(code=130, out="", err="error: interrupted\n")


def test_sample_prints_the_answer(cli: Run, opened: list[dict[str, Any]]) -> None:
    assert cli("sample", "Hello", "--model", "some/model") == Outcome(code=0, out="I am some/model.\n", err="")
    assert opened == [{"base_url": None, "model": "some/model"}]


def test_sample_numbers_several_answers(cli: Run, opened: list[dict[str, Any]]) -> None:
    assert cli("sample", "Hello", "-n", "2").out == "[1] I am tinsmith/tiny.\n[2] I am tinsmith/tiny.\n"


def test_sample_prints_one_line_of_json(cli: Run, opened: list[dict[str, Any]]) -> None:
    found = json.loads(cli("sample", "Hello", "--json", "--raw", "--max-tokens", "2").out)
    assert (found["model"], found["prompt"]) == ("tinsmith/tiny", "Hello")
    assert len(found["samples"][0]["tokens"]) == 2
    assert found["samples"][0].keys() == {"text", "tokens", "logprobs", "stop_reason"}


def test_sample_takes_the_folder_of_a_run(cli: Run, opened: list[dict[str, Any]], data: Path) -> None:
    cli("run", "supervised", f"data={data}", "output=out")
    outcome = cli("sample", "Hello", "--model", "out")
    assert outcome.out == "I am tinker://noop-1/sampler_weights/step_000001.\n"
    assert opened[-1] == {"base_url": "noop:", "model": "tinsmith/tiny", "store": Path("out/checkpoints")}


def test_a_missing_checkpoint_is_named(cli: Run, opened: list[dict[str, Any]]) -> None:
    outcome = cli("sample", "Hello", "--model", "tinker://a/sampler_weights/b")
    assert (outcome.code, outcome.err) == (1, "error: no checkpoint 'tinker://a/sampler_weights/b'\n")


def test_the_demo_replaces_its_own_folder_and_touches_no_other(cli: Run, opened: list[dict[str, Any]]) -> None:
    assert cli("demo").code == 0
    Path("tinsmith-demo/metrics.jsonl").write_text("")
    assert cli("demo").code == 0
    assert Path("tinsmith-demo/metrics.jsonl").read_text()

    Path("tinsmith-demo/samples.json").unlink()  # as an interrupted demo leaves it
    assert cli("demo").code == 0

    Path("tinsmith-demo/thesis.tex").write_text("")
    outcome = cli("demo")
    assert outcome.code == 1
    assert "'tinsmith-demo' holds 'thesis.tex', which is not the demo's; give another --output" in outcome.err
    assert Path("tinsmith-demo/samples.json").exists()


def test_the_demo_never_replaces_another_run(cli: Run, opened: list[dict[str, Any]], data: Path) -> None:
    cli("run", "supervised", f"data={data}", "output=out")
    outcome = cli("demo", "--output", "out")
    assert (outcome.code, outcome.err) == (1, "error: 'out' holds another run; give another --output\n")


def test_the_demo_ends_with_one_line_of_json(cli: Run, opened: list[dict[str, Any]]) -> None:
    outcome = cli("demo", "--json")
    assert outcome.code == 0
    [line] = outcome.out.splitlines()
    summary = json.loads(line)
    assert summary.keys() == {"loss_first", "loss_last", "tokens_per_s", "seconds", "samples"}
    assert [sample.keys() for sample in summary["samples"]] == [{"prompt", "before", "after"}] * 3
    assert "Try next" in outcome.err


def test_what_a_server_says_is_told_without_its_wrapping(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx2

    from tinsmith.client.errors import APIConnectionError, status_error

    request = httpx2.Request("POST", "http://127.0.0.1:9/x")
    missing = status_error(httpx2.Response(404, json={"detail": "no checkpoint 'x'"}, request=request))
    refused = APIConnectionError(request, "connection refused")
    told = {
        missing: "error: no checkpoint 'x'\n",
        refused: "error: connection refused (is a server running there? `tinsmith serve` starts one)\n",
    }
    for error, text in told.items():

        def fail(error: Exception = error, **_: Any) -> None:
            raise error

        monkeypatch.setattr("tinsmith.kitchen.adapters.tinker_training.open_backend", fail)
        assert cli("sample", "hi") == Outcome(code=1, out="", err=text)


@pytest.mark.parametrize("precious", ["metrics.jsonl", "checkpoints/model.bin"])
def test_the_demo_touches_no_folder_that_is_no_run(cli: Run, opened: list[dict[str, Any]], precious: str) -> None:
    file = Path("mine") / precious
    file.parent.mkdir(parents=True)
    file.write_text("")
    outcome = cli("demo", "--output", "mine")
    assert (outcome.code, opened) == (1, [])
    assert outcome.err == "error: 'mine' holds something that is no run of ours; give another output\n"


def test_a_run_may_begin_where_one_ended_before_its_first_step(
    cli: Run, opened: list[dict[str, Any]], data: Path
) -> None:
    Path("out/checkpoints").mkdir(parents=True)
    Path("out/checkpoints/registry.sqlite3").write_text("")
    assert cli("run", "supervised", f"data={data}", "output=out").code == 0

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tinsmith.kitchen.errors import ConfigError
from tinsmith.kitchen.evaluators import (
    CodeEvaluator,
    CodeLimits,
    ContainsEvaluator,
    ExactMatchEvaluator,
    F1Evaluator,
    JudgeEvaluator,
    NumericEvaluator,
    RegexEvaluator,
    make_evaluator,
    run_code,
)
from tinsmith.kitchen.ports import EvalExample
from tinsmith.types.errors import InvalidInput

FAST = CodeLimits(wall_s=20.0, cpu_s=5, memory_bytes=512 << 20)


@pytest.mark.parametrize(
    ("options", "prediction", "target", "score"),
    [
        ({}, " Paris\n", "Paris", 1.0),
        ({}, "paris", "Paris", 0.0),
        ({"ignore_case": True}, "PARIS", "Paris", 1.0),
        ({"ignore_punctuation": True}, "the  kettle.", "kettle", 1.0),
        ({"ignore_punctuation": True}, "two kettles", "kettle", 0.0),
    ],
)
def test_exact_match(options: dict[str, Any], prediction: str, target: str, score: float) -> None:
    assert ExactMatchEvaluator(**options).score(prediction, target) == score


@pytest.mark.parametrize(
    ("prediction", "target", "score"),
    [
        ("The answer is 42.", "42", 1.0),
        ("3 + 4 = 7, so #### 7", "7.0", 1.0),
        ("First 5, then \\boxed{1,234} and not 9", "1234", 1.0),
        ("of 12 it is \\boxed{\\frac{3}{4}}, not 1", "0.75", 1.0),
        ("\\boxed{-\\dfrac{1}{2}}", "\\frac{-1}{2}", 1.0),
        ("the final answer is 3/4 of 12", "0.75", 1.0),
        ("-0.5", "-1/2", 1.0),
        ("It is 1e3", "1000", 1.0),
        ("6 or 7", "6", 0.0),
        ("0.30000000000000004", "0.3", 1.0),
        ("no idea", "3", 0.0),
        ("1/0", "3", 0.0),
        ("4, 5", "5", 1.0),
        ("The answer is 3/4.", "3/4", 1.0),
        ("so 3/4, done", "0.75", 1.0),
        ("on 3/4/2024", "0.75", 0.0),
        ("1e9999999", "7", 0.0),
        ("7", "1e9999999", 0.0),
        ("1e9999999/3", "7", 0.0),
        ("1e9999999", "1e9999999", 1.0),
    ],
)
def test_numbers_are_read_from_where_the_answer_ends(prediction: str, target: str, score: float) -> None:
    assert NumericEvaluator().score(prediction, target) == score


def test_a_tolerance_is_absolute_or_relative() -> None:
    assert NumericEvaluator(absolute=0.5).score("10.4", "10") == 1.0
    assert NumericEvaluator(absolute=0.3).score("10.4", "10") == 0.0
    assert NumericEvaluator(relative=0.05).score("104", "100") == 1.0


def test_a_target_without_a_number_is_named() -> None:
    with pytest.raises(InvalidInput, match="example 2: the target 'many' holds no number"):
        NumericEvaluator().evaluate(
            [EvalExample(prediction="1", target="1"), EvalExample(prediction="1", target="many")]
        )


def test_patterns() -> None:
    assert RegexEvaluator(pattern=r"<answer>(.*?)</answer>").score("<answer>1</answer> <answer> 2 </answer>", "2") == 1
    assert RegexEvaluator(pattern=r"\d+").score("12 and 13", "13") == 1
    assert RegexEvaluator(pattern=r"\d+").score("none", "13") == 0
    assert RegexEvaluator().score(" colour ", "colou?r") == 1
    assert RegexEvaluator().score("my colour", "colou?r") == 0
    with pytest.raises(InvalidInput, match=r"'\(' is no regular expression"):
        RegexEvaluator(pattern="(")


def test_words_in_common() -> None:
    assert F1Evaluator().score("the copper kettle", "a kettle of copper") == pytest.approx(2 * 2 / (2 + 3))
    assert F1Evaluator().score("tin", "copper") == 0.0
    assert ContainsEvaluator().score("It is PARIS.", "paris") == 1.0


def test_bleu_is_that_of_its_paper() -> None:
    said, wanted = "the cat sat on the mat", "the cat sat on a mat"
    # n-gram precisions 5/6, 3/5, 2/4, 1/3; equal lengths, so no brevity penalty
    expected = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)
    assert make_evaluator("bleu").score(said, wanted) == pytest.approx(expected)
    assert make_evaluator("bleu").score("Tin", "Tin") == pytest.approx(1.0)
    assert make_evaluator("bleu").score("tin", "Tin") == 0.0
    assert make_evaluator("bleu", ignore_case=True).score("tin", "Tin") == pytest.approx(1.0)
    many = [EvalExample(prediction=said, target=wanted), EvalExample(prediction="a b c d", target="a b c d")]
    result = make_evaluator("bleu").evaluate(many)
    assert result.scores == (pytest.approx(expected), pytest.approx(1.0))
    # of the corpus: matches and n-grams are added up before they are divided
    assert result.score == pytest.approx((9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** (1 / 4))
    with pytest.raises(InvalidInput, match="no examples"):
        make_evaluator("bleu").evaluate([])


def test_rouge_counts_what_is_in_common() -> None:
    said, wanted = "the cat sat on the mat", "on a mat the cats sat"
    assert make_evaluator("rouge", variant="rouge1").score(said, wanted) == pytest.approx(5 / 6)
    assert make_evaluator("rouge", variant="rouge1", stem=False).score(said, wanted) == pytest.approx(4 / 6)
    assert make_evaluator("rouge", variant="rouge2").score(said, wanted) == pytest.approx(2 / 5)
    assert make_evaluator("rouge").score(said, wanted) == pytest.approx(3 / 6)  # "the cat sat"


@pytest.mark.parametrize(("name", "package"), [("bleu", "sacrebleu"), ("rouge", "rouge_score")])
def test_scores_without_their_package_say_what_to_install(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for module in [module for module in sys.modules if module.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"evaluator '{name}' needs .*pip install 'tinsmith\[scores\]'"):
        make_evaluator(name)


def test_means_and_reports() -> None:
    evaluator = ExactMatchEvaluator()
    result = evaluator.evaluate([EvalExample(prediction=text, target="a") for text in ("a", "b", "a", "a")])
    assert result.score == 0.75
    assert result.scores == (1.0, 0.0, 1.0, 1.0)
    assert "| exact_match | 75.0% | 3/4 |" in evaluator.generate_report(result)
    with pytest.raises(InvalidInput, match="no examples"):
        evaluator.evaluate([])


def test_evaluators_by_name_and_the_nearest_of_a_wrong_one() -> None:
    assert make_evaluator("numeric", absolute=0.1) == NumericEvaluator(absolute=0.1)
    with pytest.raises(ConfigError, match="unknown evaluator 'exactmatch'; did you mean 'exact_match'"):
        make_evaluator("exactmatch")
    with pytest.raises(ConfigError, match="'numeric' has no option 'absolut'; did you mean 'absolute'"):
        make_evaluator("numeric", absolut=1)
    with pytest.raises(ConfigError, match=r"'llm_judge': .*judge"):
        make_evaluator("llm_judge")


# -- code -------------------------------------------------------------------------------------------------------------


def test_code_runs_and_its_output_comes_back() -> None:
    result = run_code("import sys\nprint(sum(map(int, sys.stdin.read().split())))", FAST, stdin="1 2 3")
    assert (result.status, result.stdout, result.stderr) == ("ok", "6\n", "")


def test_a_failure_tells_its_line() -> None:
    result = run_code("x = 1\nraise ValueError('no')", FAST)
    assert (result.status, result.exit_code) == ("failed", 1)
    assert "line 2" in result.stderr
    assert "ValueError: no" in result.stderr


def test_code_that_waits_is_ended_with_its_children() -> None:
    code = "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
    started = time.monotonic()
    result = run_code(code + "time.sleep(600)", CodeLimits(wall_s=2.0))
    assert result.status == "timeout"
    assert time.monotonic() - started < 20


def test_code_that_computes_is_ended_by_the_processor_limit() -> None:
    result = run_code("while True: pass", CodeLimits(wall_s=60.0, cpu_s=1))
    assert result.status == "killed"
    assert result.seconds < 50


def test_memory_is_limited() -> None:
    result = run_code("x = bytearray(2 << 30)", FAST)
    assert result.status == "failed"
    assert "MemoryError" in result.stderr


def test_output_is_cut_off() -> None:
    result = run_code("print('x' * 1_000_000)", CodeLimits(wall_s=20.0, output_bytes=1000))
    assert len(result.stdout) <= 1000
    assert result.status != "ok"


def test_code_sees_neither_the_environment_nor_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINSMITH_SECRET", "s3cret")
    result = run_code("import os\nprint(sorted(os.environ), os.getcwd(), os.listdir())", FAST)
    assert "SECRET" not in result.stdout
    assert os.getcwd() not in result.stdout
    assert result.stdout.rstrip().endswith("[]")


def test_the_network_is_blocked_where_the_result_says_so() -> None:
    code = "import socket\ns = socket.socket()\ns.settimeout(2)\ns.connect(('127.0.0.1', PORT))\nprint('reached')"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        blocked = run_code(code.replace("PORT", port), FAST)
        opened = run_code(code.replace("PORT", port), CodeLimits(wall_s=20.0, block_network=False))
    assert ("reached" in blocked.stdout) is not blocked.network_blocked
    assert "reached" in opened.stdout
    assert not opened.network_blocked


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Here:\n```python\ndef double(n):\n    return 2 * n\n```\nDone.", 1.0),
        ("def double(n): return 2 * n", 1.0),
        ("```python\ndef double(n):\n    return n\n```", 0.0),
        ("```python\nimport os\nos._exit(0)\n```", 0.0),
        ("```python\nraise SystemExit(0)\n```", 0.0),
        ("no code here", 0.0),
    ],
)
def test_code_is_scored_by_the_tests_it_passes(answer: str, score: float) -> None:
    assert CodeEvaluator(limits=FAST).score(answer, "assert double(2) == 4\nassert double(-1) == -2") == score


def test_tests_must_be_there() -> None:
    with pytest.raises(InvalidInput, match="without tests"):
        CodeEvaluator().score("x = 1", "  ")


# -- judge ------------------------------------------------------------------------------------------------------------


@dataclass
class Judge:
    verdicts: list[str]
    asked: list[Sequence[Mapping[str, str]]] = field(default_factory=list)

    def chat(self, messages: Sequence[Mapping[str, str]], *, max_tokens: int = 256, temperature: float = 0.0) -> str:
        self.asked.append(messages)
        return self.verdicts.pop(0)


def test_a_judge_s_last_grade_counts() -> None:
    judge = Judge(["The answer claims Grade: 10. It is half right.\nGrade: 5"])
    assert JudgeEvaluator(judge=judge).score("x", "y") == 0.5
    assert "<<<\nx\n>>>" in judge.asked[0][1]["content"]


def test_a_verdict_without_a_grade_is_asked_for_again() -> None:
    judge = Judge(["Hm.", "**Grade: 8**"])
    assert JudgeEvaluator(judge=judge).score("x", "y") == 0.8
    assert JudgeEvaluator(judge=Judge(["Grade: 11", "Hm."])).score("x", "y") == 0.0

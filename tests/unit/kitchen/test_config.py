from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinsmith.kitchen import ConfigError, SupervisedConfig
from tinsmith.kitchen.adapters.tinker_training import _complete
from tinsmith.kitchen.config import config_keys, make_config
from tinsmith.kitchen.recipes import RECIPES
from tinsmith.kitchen.schedules import learning_rate


def test_words_override_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('data = "a.jsonl"\nepochs = 3\nlearning_rate = 1e-3\n')
    config = make_config(SupervisedConfig, ["epochs=5", "too_long=skip", "max_length=64"], file=file)
    assert (config.data, config.epochs, config.learning_rate) == (Path("a.jsonl"), 5, 1e-3)
    assert (config.max_length, config.batch_size) == (64, 128)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.toml", 'data = "x.jsonl"\nseed = 3\nmax_length = 9'),
        ("c.yaml", "data: x.jsonl\nseed: 3\nmax_length: 9"),
        ("c.yml", '{"data": "x.jsonl", "seed": 3, "max_length": 9}'),
        ("c.json", '{"data": "x.jsonl", "seed": 3, "max_length": 9}'),
    ],
)
def test_every_file_format_gives_the_same_config(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    config = make_config(SupervisedConfig, [], file=tmp_path / name)
    assert config == SupervisedConfig(data=Path("x.jsonl"), seed=3, max_length=9)


def test_a_config_survives_its_own_dump(tmp_path: Path) -> None:
    config = SupervisedConfig(data=Path("x.jsonl"), output=Path("y"), learning_rate=3e-4)
    (tmp_path / "c.json").write_text(json.dumps(config.model_dump(mode="json")))
    assert make_config(SupervisedConfig, [], file=tmp_path / "c.json") == config


def test_none_is_taken_where_a_key_may_be_none() -> None:
    assert make_config(SupervisedConfig, ["data=x", "max_length=none"]).max_length is None
    with pytest.raises(ConfigError, match="epochs='none': Input should be a valid integer"):
        make_config(SupervisedConfig, ["data=x", "epochs=none"])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["epoch=3", "data=x"], r"unknown key 'epoch'; the keys are model, output, .*data, .*eval_every"),
        ([], "key 'data' is required: JSONL file of"),
        (["data=x", "epochs=0"], "epochs='0': Input should be greater than or equal to 1"),
        (["data=x", "learning_rate=fast"], "learning_rate='fast': Input should be a valid number"),
        (["data=x", "learning_rate=nan"], "learning_rate='nan': Input should be"),
        (
            ["data=x", "lr_schedule=poly"],
            "lr_schedule='poly': Input should be 'linear', 'cosine', 'constant', 'exponential' or 'polynomial'",
        ),
        (["data=x", "resume=true"], "resume=true needs output="),
        (["data=x", "eval_every=3"], "eval_every=3 needs test_size"),
        (["data=x", "too_long=skip"], "too_long='skip' needs max_length"),
        (["data"], "'data' is not of the form key=value"),
        (["=3"], "'=3' is not of the form key=value"),
    ],
)
def test_a_bad_key_or_value_is_named(words: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_config(SupervisedConfig, words)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(SupervisedConfig, ["epochs=x", "colour=red"])
    assert [line.split(":")[0].split(";")[0] for line in str(caught.value).splitlines()] == [
        "key 'data' is required",
        "epochs='x'",
        "unknown key 'colour'",
    ]


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("c.ini", "", r"must end in .toml, .json, .yaml, .yml"),
        ("c.toml", "= 3", "is not valid TOML: Invalid"),
        ("c.json", "[1]", "must hold keys and values, not list"),
        ("c.yaml", "a: [", "is not valid YAML"),
        ("c.json", "{", "is not valid JSON"),
        ("c.yaml", "data: x\nlearning_rate: on", "learning_rate=True: Input should be a number, not true or false"),
        ("c.toml", 'data = "x"\nmax_length = true', "max_length=True: Input should be a number, not true or false"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, text: str, complaint: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        make_config(SupervisedConfig, [], file=tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the config file .*none.toml'"):
        make_config(SupervisedConfig, [], file=tmp_path / "none.toml")


def test_every_key_is_documented() -> None:
    keys = {key.name: key for key in config_keys(SupervisedConfig)}
    assert all(key.doc for key in keys.values())
    every = [key for recipe in RECIPES.values() if recipe.config_type for key in config_keys(recipe.config_type)]
    assert all(key.doc and "\n" not in key.doc for key in every), "a terminal breaks lines where it ends"
    assert (keys["data"].type, keys["data"].default) == ("path", None)
    assert (keys["lr_schedule"].type, keys["lr_schedule"].default) == (
        "linear|cosine|constant|exponential|polynomial",
        "linear",
    )
    assert (keys["max_length"].type, keys["max_length"].default) == ("int|none", "none")
    assert (keys["learning_rate"].default, keys["resume"].type) == ("0.0002", "true|false")


def test_configs_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        SupervisedConfig(data=Path("x")).epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
        ("exponential", [0.5, 1.0, 1.0, 0.316228, 0.1, 0.031623]),
        ("polynomial", [0.5, 1.0, 1.0, 0.5625, 0.25, 0.0625]),
    ],
)
def test_learning_rates_rise_and_fall(schedule: str, rates: list[float]) -> None:
    found = [
        learning_rate(schedule, peak=1.0, step=step, num_steps=6, warmup_steps=2)  # type: ignore[arg-type]
        for step in range(6)
    ]
    assert found == pytest.approx(rates, abs=1e-6)


def test_an_embedded_url_is_completed_but_never_overruled() -> None:
    assert _complete("local:", model="a=/b c", store=Path("/s")) == "local:?base_model=a%3D%2Fb+c&data_dir=%2Fs"
    given = "local:?data_dir=/x&base_model=m&base_model=n&dtype=float32"
    expected = "local:?data_dir=%2Fx&base_model=m&base_model=n&dtype=float32"
    assert _complete(given, model="a", store=Path("/s")) == expected

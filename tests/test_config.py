"""Configuration: every file composes, every field is described, every bound holds."""

from __future__ import annotations

import math
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import Enum
from itertools import product
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import hydra
import numpy as np
import pytest
from hydra.core.global_hydra import GlobalHydra
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llmpipe import LLMConfigError, RunConfig, SamplingConfig, compose
from llmpipe.config import (
    BACKENDS,
    BackendType,
    ColumnsConfig,
    DatasetConfig,
    DeviceConfig,
    LlamaCppConfig,
    MetricsConfig,
    ModelConfig,
    OutputConfig,
    PromptConfig,
    Switch,
    answer_fields,
    build,
    conf_dir,
    describe,
    field_docs,
    option,
)

SCHEMAS = [RunConfig, DeviceConfig, SamplingConfig, ColumnsConfig, DatasetConfig, PromptConfig, OutputConfig]
SCHEMAS += [MetricsConfig, ModelConfig, *BACKENDS.values()]
OPTIONS = sorted(
    (group.name, file.stem)
    for group in conf_dir().iterdir()
    if group.is_dir() and group.name not in ("experiment", "hydra")
    for file in group.glob("*.yaml")
)


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_yaml_composes_to_checked_dataclasses(group: str, option: str) -> None:
    assert isinstance(compose([f"{group}={option}"]), RunConfig)


@pytest.mark.parametrize("experiment", sorted(f.stem for f in (conf_dir() / "experiment").glob("*.yaml")))
def test_every_experiment_composes(experiment: str) -> None:
    assert isinstance(compose([f"+experiment={experiment}"]), RunConfig)


def test_all_combinations_of_backend_and_device_compose() -> None:
    for backend, device in product(("llama_cpp", "transformers", "echo"), ("auto", "cpu", "cuda", "mps")):
        config = compose([f"backend={backend}", f"device={device}"])
        assert type(config.backend) is BACKENDS[BackendType(backend)]
        assert config.device.type == device


def test_composing_inside_a_hydra_program_leaves_that_program_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "app.yaml").write_text("x: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose(["sampling.max_tokens=7"]).sampling.max_tokens == 7
        with pytest.raises(LLMConfigError):
            compose(["sampling.max_tokens=0"])
        assert hydra.compose("app", ["+y=2"]) == {"x": 1, "y": 2}
    assert not GlobalHydra.instance().is_initialized()


APPLICATION = """
import threading
import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

import llmpipe

ConfigStore.instance().store(name="app", node={"x": 1, "home": "${oc.env:HOME}", "own": "${own:3}"})
ConfigStore.instance().store(name="run_schema", node={"mine": True})
OmegaConf.register_new_resolver("own", lambda n: int(n) + 1)

def state():
    store = ConfigStore.instance()
    return GlobalHydra.instance().hydra, HydraConfig.instance().cfg, store.list(""), store.load("run_schema.yaml").node

def compose(found, n):
    found[n] = llmpipe.compose([f"sampling.max_tokens={n}"]).sampling.max_tokens

@hydra.main(version_base="1.3", config_path=None, config_name="app")
def main(config):
    before, resolvers = state(), dict(BaseContainer._resolvers)
    found = {}
    threads = [threading.Thread(target=compose, args=(found, n)) for n in (1, 2)]
    for thread in threads:
        thread.start()
    compose(found, 3)
    for thread in threads:
        thread.join()
    assert found == {1: 1, 2: 2, 3: 3}, found
    assert state() == before and BaseContainer._resolvers == resolvers
    assert HydraConfig.get().job.name == "app" and hydra.compose("app", ["x=5"]).x == 5
    print(config.x, config.own, bool(config.home))

main()
"""


def test_another_hydra_application_may_compose_in_threads_and_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APPLICATION)
    done = subprocess.run([sys.executable, "app.py", "x=2"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "2 4 True\n"), done.stderr


def test_threads_may_compose_at_the_same_time() -> None:
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda n: compose([f"sampling.max_tokens={n}"]).sampling.max_tokens, range(1, 17))
    assert list(found) == list(range(1, 17))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_field_says_what_it_means(schema: type[Any]) -> None:
    described = field_docs(schema)
    assert {f.name for f in fields(schema)} <= set(described)
    assert all(doc.strip() for doc in described.values())


def test_an_option_declared_anew_means_what_it_did_and_its_default_is_each_objects_own() -> None:
    @dataclass
    class Mine(LlamaCppConfig):
        slots: Any = 8
        urls: list[str] = option([], "Where to ask.")

    docs, inherited = field_docs(Mine), field_docs(LlamaCppConfig)
    assert docs == {**inherited, "urls": "Where to ask."} and Mine().slots == 8
    Mine().urls.append("http://localhost")
    assert Mine().urls == [] and RunConfig(backend=None).sampling is not RunConfig(backend=None).sampling


def test_yaml_only_names_fields_that_exist_and_every_file_says_what_it_is() -> None:
    for file in conf_dir().rglob("*.yaml"):
        assert file.read_text().startswith("# "), file
        OmegaConf.load(file)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.temprature=1", "unknown key in sampling 'temprature'; did you mean 'temperature'?"),
        ("+sampling.temprature=1", "unknown key in sampling 'temprature'; did you mean 'temperature'?"),
        ("++dataset.columns.promt=x", "unknown key in dataset.columns 'promt'; did you mean 'prompt'?"),
        ("+backend.foo=1", "unknown key in backend 'foo'; There are: "),
        ("bakend=echo", "unknown key 'bakend'; did you mean 'backend'?"),
        ("temperature=1", "unknown key 'temperature'; did you mean sampling.temperature?"),
        ("slots=4", "unknown key 'slots'; did you mean backend.slots?"),
        ("backend=vllm", "unknown option of backend 'vllm'"),
        ("sampling.stop=END", "sampling.stop must be a list, such as sampling.stop=[a,b]"),
        ("prompt.template=What is {x}?", "{ } needs quotes of its own inside the shell's: 'prompt.template="),
        ("prompt.system=You're it", "needs quotes of its own"),
        ("prompt.system=Be brief, please", "or sweep over it with -m"),
        ("sampling.temperature=hot", "sampling.temperature: "),
    ],
)
def test_a_key_or_value_that_cannot_be_is_refused_in_one_line(override: str, said: str) -> None:
    with pytest.raises(LLMConfigError) as caught:
        compose([override])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_backend_of_someone_else_has_options_that_only_its_class_knows() -> None:
    config = compose(["backend=echo", "backend._target_=elsewhere.Runner", "+backend.url=http://localhost"])
    assert config.backend["url"] == "http://localhost" and config.backend["slots"] == "auto"


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"temperature": [0.5]},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 2**31},
        {"max_tokens": 1e300},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"typical_p": 0},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("inf")},
        {"max_tokens": 0},
        {"n": 0},
        {"stop": [""]},
        {"stop": [1]},
        {"seed": -1},
        {"logit_bias": {"a": 1}},
        {"logit_bias": [1]},
        {"ignore_eos": "perhaps"},
        {"ignore_eos": 2},
        {"logit_bias": {1.5: 1}},
        {"stop": 5},
    ],
)
def test_sampling_values_out_of_range_are_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(LLMConfigError, match=next(iter(changes))):
        SamplingConfig().replace(changes)


@given(
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 10**6),
    top_p=st.floats(0, 1, exclude_min=True),
    stop=st.lists(st.text(min_size=1), max_size=3),
)
def test_sampling_values_in_range_are_kept(temperature: float, top_k: int, top_p: float, stop: list[str]) -> None:
    sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p, stop=stop)
    assert describe(sampling)["stop"] == stop
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (temperature, top_k, top_p)


WRONG: dict[Any, list[Any]] = {
    int: ["many", 1.5, "1.5", True, [1], {}, math.nan, math.inf, None],
    float: ["hot", True, [0.5], {}, None],
    bool: ["perhaps", 2, 0.5, [], None],
    str: [True, ["a"], b"a", {}, None],
    list: ["ab", 5, {"a": 1}, [None], None],
    dict: ["ab", 5, ["a"], {"a": None}, None],
    Enum: ["perhaps", 5, ["auto"], None],
}


def declared(hint: Any) -> tuple[Any, bool]:
    """Return which of the kinds in `WRONG` a type is, and whether None is one of its values."""
    kinds = get_args(hint) if get_origin(hint) is UnionType else (hint,)
    kind = get_origin(kinds[0]) or kinds[0]
    return Enum if isinstance(kind, type) and issubclass(kind, Enum) else kind, NoneType in kinds


@pytest.mark.parametrize(
    ("schema", "name"), [(schema, f.name) for schema in SCHEMAS for f in fields(schema)], ids=lambda x: str(x)
)
def test_a_value_of_another_type_is_refused_by_name(schema: type[Any], name: str) -> None:
    hint = get_type_hints(schema)[name]
    kind, optional = declared(hint)
    if hint is Any or hint == dict[str, Any]:
        return
    values = WRONG.get(kind, ["other", 5, None, {}])  # else it is a dataclass
    for value in values:
        if value is None and (optional or name in ("stop", "device")):
            continue
        if isinstance(value, str) and (name == "stop" or (schema is ModelConfig and name == "backend")):
            continue  # one stop string, a backend that may be registered
        with pytest.raises(LLMConfigError, match=name) as caught:
            schema(**{name: value})
        assert "is not allowed; it must be" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"threads": "2"}, 2),
        ({"threads": 2.0}, 2),
        ({"threads": np.int64(2)}, 2),
        ({"slots": 3.0}, 3),
        ({"reproducible": "false"}, False),
        ({"reproducible": "True"}, True),
        ({"reproducible": np.bool_(True)}, True),
        ({"rope_freq_scale": "0.5"}, 0.5),
        ({"rope_freq_scale": Decimal("0.5")}, 0.5),
        ({"model": Path("m.gguf")}, "m.gguf"),
        ({"model": 7}, "7"),
        ({"lora": ("a", "b=0.5")}, ["a", "b=0.5"]),
        ({"tensor_split": np.array([0.5, 0.5])}, [0.5, 0.5]),
        ({"flash_attention": False}, Switch.off),
        ({"threads": None}, None),
    ],
    ids=str,
)
def test_the_library_reads_a_value_as_the_command_line_does(given: dict[str, Any], expected: Any) -> None:
    ((name, _),) = given.items()
    for config in (LlamaCppConfig(**given), build(LlamaCppConfig, given, "backend option")):
        assert getattr(config, name) == expected
        assert type(getattr(config, name)) is type(expected)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sampling.logit_bias={5:-100}", {5: -100.0}),
        ("sampling.logit_bias={5:-100, 7:1.5}", {5: -100.0, 7: 1.5}),
        ("sampling.logit_bias.5=-100", {5: -100.0}),
        ("+sampling.logit_bias.5=-100", {5: -100.0}),
    ],
)
def test_a_logit_bias_can_be_given_on_the_command_line(override: str, expected: dict[int, float]) -> None:
    assert compose([override]).sampling.logit_bias == expected


def test_a_logit_bias_has_numbers_or_text_as_keys() -> None:
    for bias in ({5: -1}, {"5": -1}, {5.0: "-1"}):
        assert SamplingConfig(logit_bias=bias).logit_bias == {5: -1}
    with pytest.raises(LLMConfigError, match="a token of logit_bias='five' is not allowed; it must be an integer"):
        SamplingConfig(logit_bias={"five": 1})


def test_whole_floats_are_integers_on_the_command_line_too() -> None:
    config = compose(["sampling.max_tokens=8.0", "sampling.seed=1e3", "dataset.limit=2.0", "backend.threads=1.0"])
    assert (config.sampling.max_tokens, config.seed, config.dataset.limit, config.backend.threads) == (8, 1000, 2, 1)
    with pytest.raises(LLMConfigError, match="max_tokens=8.5 is not allowed; it must be an integer"):
        compose(["sampling.max_tokens=8.5"])


def test_keys_of_a_map_are_the_users() -> None:
    config = compose(["backend=transformers", "backend.max_memory={0:20GiB,cpu:60GiB}"])
    assert config.backend.max_memory == {"0": "20GiB", "cpu": "60GiB"}


def test_rows_can_be_named_by_position() -> None:
    assert compose(["dataset.columns.id=null"]).dataset.columns.id is None


def test_one_stop_string_may_stand_without_a_list() -> None:
    assert SamplingConfig(stop="END").stop == ["END"]  # type: ignore[arg-type]


def test_devices_are_read_with_their_index() -> None:
    assert DeviceConfig.parse("cuda:1") == DeviceConfig("cuda", 1)
    assert str(DeviceConfig.parse("cuda:1")) == "cuda:1"
    for wrong in ("tpu", "cuda:x", "cuda:-1"):
        with pytest.raises(LLMConfigError):
            DeviceConfig.parse(wrong)


def test_speed_options_stay_out_of_what_decides_the_answers() -> None:
    names = set(answer_fields(LlamaCppConfig()))
    assert "model" in names and "reproducible" in names and "cache_type_k" in names
    assert not names & {"slots", "threads", "n_gpu_layers", "batch_tokens", "mmap"}


def test_build_converts_enum_names_and_refuses_unknown_ones() -> None:
    assert build(LlamaCppConfig, {"flash_attention": "on"}, "backend option").flash_attention.value == "on"
    with pytest.raises(LLMConfigError, match="auto, on, off"):
        build(LlamaCppConfig, {"flash_attention": "maybe"}, "backend option")
    with pytest.raises(LLMConfigError, match="did you mean 'threads'"):
        build(LlamaCppConfig, {"thread": 2}, "backend option")


def test_reproducible_refuses_flash_attention() -> None:
    with pytest.raises(LLMConfigError, match="flash_attention"):
        compose(["backend.reproducible=true", "backend.flash_attention=on"])


@pytest.mark.parametrize(
    "name",
    ["prompts (1).jsonl", "it's.jsonl", "a,b.jsonl", "p&q.jsonl", "#1.jsonl", "é.jsonl", "a=b.jsonl", 'say "x"!'],
)
def test_a_path_that_needs_quotes_is_refused_with_what_to_type(name: str) -> None:
    with pytest.raises(LLMConfigError) as caught:
        compose([f"dataset.path={name}"])
    said = str(caught.value).removesuffix(", or sweep over it with -m")
    start = max(said.rfind(f" {quote}dataset.path=") for quote in "'\"")
    (typed,) = shlex.split(said[start:])
    assert compose([typed]).dataset.path == name

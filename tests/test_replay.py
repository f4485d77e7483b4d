"""A run directory from somebody else describes a run, and no more, whatever its ledger says."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from traps import Said, check_refused

import llmpipe
from llmpipe import RunConfig, compose, read_run
from llmpipe.config.trust import DESCRIPTIVE, TRUST
from llmpipe.ledger import Ledger, saved
from llmpipe.replay import replayed


@pytest.fixture(scope="module")
def received(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that somebody else has made."""
    directory = tmp_path_factory.mktemp("received")
    (directory / "rows.jsonl").write_text('{"id": "a", "prompt": "say a"}\n')
    config = compose(["backend=echo", f"dataset.path={directory / 'rows.jsonl'}"])
    llmpipe.run(config, directory / "run", arguments=["backend=echo", f"dataset.path={directory / 'rows.jsonl'}"])
    return directory / "run"


def write_arguments(directory: Path, arguments: Any) -> None:
    """Have a ledger say, with checksums that are right, that its run was begun so."""
    (fingerprint,) = saved(directory, "fingerprint")
    with Ledger(directory, fingerprint) as ledger:
        ledger.set(arguments=arguments)


CALL = ["+hydra.callbacks.y._target_=joblib.load", "+hydra.callbacks.y.filename=evil.pkl"]
ARGUMENTS: list[Any] = [
    CALL,
    ["+hydra={callbacks:{y:{_target_:joblib.load,filename:evil.pkl}}}"],
    ["++hydra={job:{env_set:{LD_PRELOAD:/tmp/evil.so}}}"],
    ["hydra.run.dir=elsewhere"],
    ["hydra.output_subdir=../elsewhere"],
    ["+hydra.job.env_set.LD_PRELOAD=/tmp/evil.so"],
    ["hydra.searchpath=[file:///tmp]"],
    ["hydra/job_logging=evil"],
    ["hydra.job_logging.handlers.console.stream=ext://evilmodule.x"],
    ["hydra.launcher._target_=joblib.load"],
    ["hydra.mode=MULTIRUN"],
    ["dataset@hydra.callbacks=questions"],
    ["experiment@hydra=temperature"],
    *(
        ["my", flag]
        for flag in ("--config-dir=my", "-cd=my", "--config-name=mine", "--config-path=my", "-m", "--multirun")
    ),
    *([flag] for flag in ("--cfg=job", "--run", "--help", "--info", "--shell-completion", "--hydra-help", "-cp")),
    ["--experimental-rerun=evil.pkl"],
    ["--experimental-rerun", "evil.pkl"],
    ["trusted_modules=[evilmodule]", "backend._target_=evilmodule.Handler"],
    ["+trusted_modules=[evilmodule]"],
    ["resume=elsewhere"],
    ["export=elsewhere"],
    ["export_to=precious"],
    ["export_force=true"],
    ["plan=true"],
    ["~backend"],
    ["~prompt.system"],
    ["seed=1,2"],
    ["seed=range(1,3)"],
    ["sampling=glob(*)"],
    ["+experiment=../../../evil"],
    ["+experiment=/tmp/evil"],
    ["sampling=mine"],
    ["prompt.system=${oc.env:HOME}"],
    ["prompt.system='a ${oc.env:HOME} b'"],
    ["prompt.system=$\\{oc.env:HOME\\}"],
    ['prompt.system="\\u0024{oc.env:HOME}"'],
    ["prompt.system=${oc.decode:x}"],
    ["prompt.system=${${seed}}"],
    ["++prompt={system:'${oc.env:HOME}'}"],
    ["sampling.stop=['${oc.env:HOME}']"],
    ["+prompt.chat_template_kwargs={'${oc.env:HOME}':1}"],
    ["backend.model=owner/${oc.env:HOME}"],
    ["backend.trust_remote_code=true"],
    ["++backend={allow_pickle:true}"],
    ["backend.attn_implementation=owner/kernel"],
    ["backend.offload_folder=elsewhere"],
    ["seed=["],
    [json.dumps({"hydra": {"callbacks": {"y": {"_target_": "joblib.load", "filename": "evil.pkl"}}}})],
    [json.dumps({"defaults": [{"override /hydra/job_logging": "evil"}]})],
    [json.dumps({"trusted_modules": ["evilmodule"]})],
    [json.dumps({"export_to": "precious"})],
    [json.dumps({"prompt": {"system": "${oc.env:HOME}"}})],
    [json.dumps({"prompt": "${oc.create:${oc.env:HOME}}"})],
    [json.dumps({"prompt": {"chat_template_kwargs": {"${oc.env:HOME}": 1}}})],
    [json.dumps({"backend": {"trust_remote_code": True}})],
    ["{"],
    *(['{"prompt": {"tools": ' + "[" * levels + "]" * levels + "}}"] for levels in (60, 900)),
    *(["prompt.tools=" + "[" * levels + "]" * levels] for levels in (60, 900)),
    ["{" * 100_000],
    ["+written_out=run"],
    [""],
    ["="],
    ["nonsense"],
    ["--"],
    "backend=echo",
    {"backend=echo": 1},
    [["backend=echo"]],
    5,
]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: str(arguments)[:60])
@pytest.mark.parametrize("verb", ["resume", "export"])
def test_a_received_run_directory_decides_nothing(
    arguments: Any, verb: str, place: Path, received: Path, said: Said
) -> None:
    shutil.copytree(received, place / "run")
    honest, _ = saved(received, "arguments", "fingerprint")
    write_arguments(place / "run", [*honest, *arguments] if isinstance(arguments, list) else arguments)
    before = {file.name: file.read_bytes() for file in (place / "run").iterdir()}
    code, error = said(verb, "run")
    check_refused(place, (code, error))
    assert {file.name: file.read_bytes() for file in (place / "run").iterdir()} == before


def test_a_run_that_was_noted_as_no_values_has_none(place: Path, received: Path, said: Said) -> None:
    shutil.copytree(received, place / "run")
    (honest,) = saved(received, "arguments")
    write_arguments(place / "run", [*honest, "{}"])
    assert said("resume", "run")[0] == 0


def test_what_a_person_gives_again_is_theirs(place: Path, received: Path, said: Said) -> None:
    shutil.copytree(received, place / "run")
    (honest,) = saved(received, "arguments")
    write_arguments(place / "run", [*honest, *CALL])
    code, error = said("resume", "run", *CALL)
    check_refused(place, (code, error))
    assert "joblib.load' is code and not trusted" in error
    assert said("resume", "run", *CALL, "trusted_modules=[joblib]")[0] == 0
    assert (place / "owned").is_dir()


PERSONS_OWN = {
    "sampling": "defaults: [creative]\nmax_tokens: 1\nlogit_bias: {5: -100}\n",
    "experiment": (
        "# @package _global_\ndefaults: [{override /dataset: mine}]\nseed: 7\nprompt: {template: 'a\\n${seed}'}\n"
    ),
    "dataset": "path: ${oc.env:ROWS}\ncolumns: {prompt: prompt}\n",
    "backend": "defaults: [/schema/echo@_here_]\nslots: 3\n",
}


@pytest.mark.parametrize("option", ["--config-dir=my", "hydra.searchpath=[my]", "--config-name=mine"])
def test_a_run_with_config_files_of_ones_own_goes_on_without_them(
    option: str, place: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROWS", str(place / "rows.jsonl"))
    for group, text in PERSONS_OWN.items():
        (place / "my" / group).mkdir(parents=True)
        (place / "my" / group / "mine.yaml").write_text(text)
    (place / "my" / "mine.yaml").write_text("defaults: [config, _self_]\nmax_error_rate: 0.5\n")
    flags = [option] if "dir" in option or "search" in option else ["--config-dir=my", option]
    chosen = [*flags, "sampling=mine", "+experiment=mine", "backend=mine", "output.prefix=x_", "hydra.run.dir=out"]
    assert said(*chosen)[0] == 0
    before = (place / "out" / "outputs.jsonl").read_bytes()
    shutil.rmtree(place / "my")
    monkeypatch.chdir(place.parent)
    (place / "out").rename(place / "moved")
    (place / "moved" / "outputs.jsonl").unlink()
    code, error = said("resume", str(place / "moved"))
    assert code == 1 and "begun with 'dataset.path=${oc.env:ROWS}', which is not taken from a run directory" in error
    again = ["resume", str(place / "moved"), "dataset.path=${oc.env:ROWS}"]
    code, error = said(*again)
    assert code == 0, error
    assert (place / "moved" / "outputs.jsonl").read_bytes() == before
    assert said(*again, "output=parquet")[0] == 0
    assert read_run(place / "moved").metrics["seed"] == 7


@given(text=st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "${" not in text))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_goes_on_as_it_was(text: str, place: Path, received: Path) -> None:
    (place / "run").mkdir(exist_ok=True)
    shutil.copytree(received, place / "run", dirs_exist_ok=True)
    kwargs = {text or "k": [text, {"a": text}], "true": None, "5": 1.5}
    asked = {
        "prompt": {"system": text, "template": text, "chat_template_kwargs": kwargs},
        "sampling": {"stop": ["a" + text]},
    }
    asked["sampling"]["logit_bias"] = {"5": -1.0}
    write_arguments(place / "run", ["backend=echo", json.dumps(asked)])
    config = compose(replayed(place / "run", ["dataset.path=x"]))
    assert (config.prompt.system, config.prompt.template, config.sampling.stop) == (text, text, ["a" + text])
    assert config.prompt.chat_template_kwargs == kwargs and config.sampling.logit_bias == {5: -1.0}


def test_a_run_that_asked_the_environment_goes_on_where_it_is_asked_again(
    place: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TONE", "Be brief.")
    asked = "prompt.template='${oc.env:TONE} {prompt}'"
    assert said("backend=echo", "dataset.path=rows.jsonl", asked, "hydra.run.dir=out")[0] == 0
    assert "give it again" in said("resume", "out")[1]
    assert said("resume", "out", asked)[0] == 0


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def test_a_run_that_names_its_files_from_where_it_was_begun_goes_on_from_anywhere(
    place: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "there"):
        (place / name).mkdir()
    monkeypatch.chdir(place / "here")
    row = {"messages": [{"role": "user", "content": "say a"}]}
    for name in ("a, 1.jsonl", "b.jsonl"):
        Path(name).write_text(json.dumps(row) + "\n")
    Path("tools.json").write_text(json.dumps([TOOL]))
    Path("t.jinja").write_text("{{ tools[0].function.name }}: {{ messages[0].content }}")
    files = ["dataset.path=['a, 1.jsonl', 'b*.jsonl']", "prompt.tools=tools.json", "backend.chat_template=t.jinja"]
    assert said(*files, "sampling.max_tokens=3", "hydra.run.dir=out")[0] == 0
    answers = Path("out/outputs.jsonl").read_bytes()
    Path("out/outputs.jsonl").unlink()
    monkeypatch.chdir(place / "there")
    assert said("export", "../here/out") == (0, "")
    assert said("resume", "../here/out") == (0, "")
    assert Path("../here/out/outputs.jsonl").read_bytes() == answers
    with Path("../here/b.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    for _ in range(2):  # what is noted of a dataset that has grown says where it is, too
        code, error = said("resume", str(place / "here/out"))
        assert code == 0, error
        assert len(read_run(place / "here/out").rows) == 3
        monkeypatch.chdir(place)


def test_files_of_a_run_are_those_where_it_was_begun_and_only_what_is_not_there_is_looked_for_here(
    place: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = ["dataset.path=*.jsonl", "prompt.tools=tools.json", "backend.lora=['my lora.gguf=0.5', none.gguf]"]
    there += ["backend.model=models/tiny", "prompt.template='none.jsonl'"]
    (place / "models" / "tiny").mkdir(parents=True)
    for name in ("tools.json", "my lora.gguf", "bundled"):
        (place / name).write_text("[]")
    config = compose(["backend=echo", "dataset.path=rows.jsonl"])
    llmpipe.run(config, place / "out", arguments=there)
    (place / "elsewhere").mkdir()
    assert replayed(place / "out", []) == there
    monkeypatch.chdir(place / "elsewhere")
    Path("tools.json").write_text("[]")
    assert replayed(place / "out", []) == [
        f"dataset.path='{place}/*.jsonl'",
        f"prompt.tools='{place}/tools.json'",
        f"backend.lora=['{place}/my lora.gguf=0.5','none.gguf']",
        f"backend.model='{place}/models/tiny'",
        "prompt.template='none.jsonl'",
    ]
    (place / "tools.json").unlink()
    assert replayed(place / "out", [])[1] == "prompt.tools=tools.json"
    write_arguments(place / "out", ["backend=echo", json.dumps({"dataset": {"path": "rows.jsonl"}, "seed": 5})])
    assert compose(replayed(place / "out", [])).dataset.path == str(place / "rows.jsonl")


def test_flags_may_be_given_beside_a_run_directory(place: Path, said: Said) -> None:
    assert said("backend=echo", "dataset.path=rows.jsonl", "hydra.run.dir=out")[0] == 0
    (place / "my" / "output").mkdir(parents=True)
    (place / "my" / "output" / "mine.yaml").write_text("prefix: mine_\n")
    code, error = said("resume", "out", "--config-dir", "my", "output=mine")
    assert code == 0, error
    assert "mine_completion" in (place / "out" / "outputs.jsonl").read_text()


def test_it_is_known_of_every_option_whether_it_describes_a_run() -> None:
    assert {f.name for f in fields(RunConfig)} - {TRUST} == set(DESCRIPTIVE) - {"experiment"}

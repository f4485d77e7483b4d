"""A config group from somebody else describes a run, and no more: it runs no code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from traps import Said, check_refused

from llmpipe import LLMConfigError, compose
from llmpipe.config import conf_dir
from llmpipe.config.trust import check_group

LOAD = {"_target_": "joblib.load", "filename": "evil.pkl"}
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
FILE_HANDLER = "logging.FileHandler"


def logging_with(handler: Any, **more: Any) -> dict[str, Any]:
    logging = {"version": 1, "handlers": {"x": handler}, "root": {"handlers": ["x"]}, **more}
    return {"hydra": {"job_logging": logging, "hydra_logging": logging}}


HOSTILE: dict[str, dict[str, Any]] = {
    "joblib": {"hydra": {"callbacks": {"x": LOAD}}},
    "pandas": {"hydra": {"callbacks": {"x": {"_target_": "pandas.read_pickle", "filepath_or_buffer": "evil.pkl"}}}},
    "torch": {"hydra": {"callbacks": {"x": {"_target_": "torch.load", "f": "evil.pkl", "weights_only": False}}}},
    "numpy": {"hydra": {"callbacks": {"x": {"_target_": "numpy.load", "file": "evil.npy", "allow_pickle": True}}}},
    "llmpipe's own": {"hydra": {"callbacks": {"x": {"_target_": "llmpipe.cli.command", "arguments": ["--version"]}}}},
    "a target that trusts itself": {"trusted_modules": ["joblib"], "hydra": {"callbacks": {"x": LOAD}}},
    "a target inside of a known one": {
        "hydra": {"callbacks": {"x": {"_target_": "hydra.experimental.callbacks.LogJobReturnCallback", "y": LOAD}}}
    },
    "a target in a list": {"hydra": {"sweeper": {"max_batch_size": [LOAD]}}},
    "a reference to a target": {
        "hydra": {"callbacks": {"x": "${hydra.sweeper.params.x}"}, "sweeper": {"params": LOAD}}
    },
    "a made target": {"hydra": {"callbacks": {"x": "${oc.decode:'{_target_: joblib.load, filename: evil.pkl}'}"}}},
    "a node of references": {"hydra": {"callbacks": "${oc.create:'{x: {_target_: joblib.load, filename: evil.pkl}}'}"}},
    "a target by reference": {"hydra": {"callbacks": {"x": {"_target_": "${hydra.job.name}", "filename": "evil.pkl"}}}},
    "a list as target": {"hydra": {"callbacks": {"x": {"_target_": ["joblib.load"]}}}},
    "a launcher": {"hydra": {"launcher": LOAD}},
    "a sweeper": {"hydra": {"sweeper": LOAD}},
    "a target among parameters": {"hydra": {"sweeper": {"_target_": BASIC, "params": {"x": LOAD}}}},
    "a module through a plugin": {"hydra": {"sweeper": {"_target_": BASIC.rpartition(".")[0] + ".itertools.count"}}},
    "a search space in code": {"hydra": {"sweeper": {"custom_search_space": "evilmodule.Handler"}}},
    "commands of a launcher": {"hydra": {"launcher": {"setup": ["touch owned"]}}},
    "a factory of loggers": logging_with({"()": "joblib.load", "filename": "evil.pkl"}),
    "a class of loggers": logging_with({"class": "evilmodule.Handler"}),
    "a module of logging's": logging_with({"class": "logging.os.system"}),
    "logging.config": logging_with({"()": "logging.config.fileConfig", "fname": "rows.jsonl"}),
    "ext://": logging_with({"class": "logging.StreamHandler", "stream": "ext://evilmodule.x"}),
    "cfg://": logging_with({"class": "cfg://x", "stream": "ext://sys.stderr"}, x="evilmodule.Handler"),
    "ext:// in two parts": logging_with(
        {"class": "logging.StreamHandler", "stream": "${hydra.run.dir}://evilmodule.x"}
    ),
    "a formatter": logging_with({"class": "logging.StreamHandler"}, formatters={"x": {"()": "evilmodule.Handler"}}),
    "a filter": logging_with({"class": "logging.StreamHandler"}, filters={"x": {"()": "evilmodule.Handler"}}),
    "a queue": logging_with(
        {"class": "logging.handlers.QueueHandler", "queue": {"()": "joblib.load", "filename": "evil.pkl"}}
    ),
    "a queue by name": logging_with({"class": "logging.handlers.QueueHandler", "queue": "evilmodule.Handler"}),
    "a log over a file": logging_with({"class": FILE_HANDLER, "filename": "precious", "mode": "w"}),
    "a log outside": logging_with({"class": FILE_HANDLER, "filename": "${hydra.runtime.output_dir}/../precious"}),
    "a log elsewhere": logging_with({"class": FILE_HANDLER, "filename": "${hydra.run.dir}/x.log"}),
    "a log from its beginning": logging_with(
        {"class": FILE_HANDLER, "filename": "${hydra.runtime.output_dir}/x.log", "mode": "w"}
    ),
    "a log beside the run": logging_with({"class": FILE_HANDLER, "filename": "x.log"}),
    "a handler's own name": logging_with(
        {"class": FILE_HANDLER, "filename": "x.log", "delay": True, ".": {"baseFilename": "precious"}}
    ),
    "the environment": {"hydra": {"job": {"env_set": {"LD_PRELOAD": "/tmp/evil.so", "PYTHONPATH": "/tmp"}}}},
    "a copied environment": {"hydra": {"job": {"env_copy": ["HOME"]}}},
    "a working directory": {"hydra": {"job": {"chdir": True}}},
    "a job's name": {"hydra": {"job": {"name": "../../precious"}}},
    "a directory for config files": {"hydra": {"output_subdir": "../elsewhere"}},
    "overrides": {"hydra": {"overrides": {"task": ["trusted_modules=[evilmodule]"]}}},
    "Hydra's whole node": {"hydra": "${oc.create:'{callbacks: {}}'}"},
    "a search path": {"hydra": {"searchpath": ["file:///tmp"]}},
}


def write_group(place: Path, values: Any, group: str = "experiment", name: str = "evil") -> list[str]:
    """Write a config group of a person's own; return the arguments that choose it."""
    file = place / "my" / group / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("# @package _global_\n" + (OmegaConf.to_yaml(OmegaConf.create(values))))
    return ["--config-dir=my", f"+{group}={name}", "backend=echo", "dataset.path=rows.jsonl"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_group_runs_no_code(name: str, place: Path, said: Said) -> None:
    check_refused(place, said("hydra.run.dir=out", *write_group(place, HOSTILE[name])))


@pytest.mark.parametrize("name", ["joblib", "a factory of loggers"])
@pytest.mark.parametrize(
    "command", [["-m", "hydra.sweep.dir=outs"], ["plan"], ["--cfg=job"], ["--info=config"]], ids=str
)
def test_a_group_runs_no_code_whatever_is_asked_for(name: str, command: list[str], place: Path, said: Said) -> None:
    check_refused(place, said(*command, *write_group(place, HOSTILE[name])))


def test_help_asks_no_group(place: Path, said: Said) -> None:
    assert said("--help", *write_group(place, HOSTILE["joblib"])) == (0, "")
    assert not (place / "owned").exists()


@pytest.mark.parametrize("values", [{"comment": "a\ntouch owned"}, {"additional_parameters": {"a\ntouch owned\n": 1}}])
def test_a_group_gives_a_launchers_script_no_lines_of_its_own(values: dict[str, Any]) -> None:
    check_group({"hydra": {"launcher": {"comment": "a trial", "additional_parameters": {"a": 1}}}}, "evil.yaml")
    with pytest.raises(LLMConfigError, match="is not for a config group to set"):
        check_group({"hydra": {"launcher": values}}, "evil.yaml")


def test_a_group_leads_no_sweep_through_a_link(place: Path, said: Said) -> None:
    chosen = write_group(place, {"hydra": {"sweep": {"dir": "my/sweep"}}})
    (place / "my" / "sweep").mkdir()
    (place / "my" / "sweep" / "multirun.yaml").symlink_to(place / "precious")
    check_refused(place, said("-m", *chosen, "seed=1,2"))


def test_a_sweep_replaces_no_configuration_of_another_program(place: Path, said: Said) -> None:
    asked = ["-m", "backend=echo", "dataset.path=rows.jsonl", "seed=1,2", "hydra.sweep.dir=sweep"]
    (place / "sweep").mkdir()
    (place / "sweep" / "multirun.yaml").write_text("db: mysql\n")
    check_refused(place, said(*asked))
    assert (place / "sweep" / "multirun.yaml").read_text() == "db: mysql\n"
    (place / "sweep" / "multirun.yaml").unlink()
    assert [said(*asked)[0] for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("name", ["config.pickle", "job_return.pickle"])
def test_a_callback_of_hydras_writes_through_no_link(name: str, place: Path, said: Said) -> None:
    callback = {"_target_": "hydra.experimental.callbacks.PickleJobInfoCallback"}
    chosen = write_group(place, {"hydra": {"callbacks": {"x": callback}, "run": {"dir": "my/run"}}})
    (place / "my" / "run" / ".hydra").mkdir(parents=True)
    (place / "my" / "run" / ".hydra" / name).symlink_to(place / "precious")
    code, error = said(*chosen)
    assert (place / "precious").read_bytes() == b"mine"
    assert code == 1 and f"{name} is a symlink" in error


def test_a_file_outside_of_the_config_directories_is_nobodys_own(place: Path, said: Said) -> None:
    (place / "evil.yaml").write_text("# @package _global_\nhydra: {job: {env_set: {LD_PRELOAD: /tmp/evil.so}}}\n")
    away = os.path.relpath(place / "evil", conf_dir() / "experiment")
    check_refused(place, said(f"+experiment={away}", "backend=echo", "dataset.path=rows.jsonl", "hydra.run.dir=out"))


@pytest.mark.parametrize("option", ["trust_remote_code", "allow_pickle"])
def test_a_group_cannot_have_a_model_run_code(option: str, place: Path, said: Said) -> None:
    (place / "my" / "backend").mkdir(parents=True)
    (place / "my" / "backend" / "evil.yaml").write_text(
        f"defaults: [/schema/transformers@_here_]\nmodel: nowhere/model\n{option}: true\n"
    )
    chosen = ["--config-dir=my", "backend=evil", "dataset.path=rows.jsonl", "hydra.run.dir=out"]
    code, error = said(*chosen)
    assert code == 1 and f"backend.{option}=True is not for a config group to set" in error
    code, error = said(*chosen, f"backend.{option}=true", "backend.model=./nowhere")
    assert code == 1 and "does not exist" in error
    with pytest.raises(LLMConfigError, match="is not for a config group to set"):
        compose(["backend=evil"], "my")
    assert getattr(compose(["backend=evil", f"backend.{option}=true"], "my").backend, option)


def test_a_group_has_not_the_last_word_on_what_a_primary_config_says_of_code(place: Path, said: Said) -> None:
    flags, experiment, _, rows = write_group(place, {"backend": {"trust_remote_code": True}})
    chosen = [flags, "--config-name=mine", experiment, rows, "backend.model=./nowhere", "hydra.run.dir=out"]
    for wanted, why in (("false", "is not for a config group to set"), ("true", "does not exist")):
        (place / "my" / "mine.yaml").write_text(
            f"defaults: [config, override backend: transformers, _self_]\nbackend: {{trust_remote_code: {wanted}}}\n"
        )
        code, error = said(*chosen)
        assert code == 1 and why in error


def test_a_group_cannot_put_trust_into_a_sweep(place: Path, said: Said) -> None:
    params = {"trusted_modules": "[evilmodule]", "backend._target_": "evilmodule.Handler"}
    chosen = write_group(place, {"hydra": {"sweeper": {"params": params}}})
    code, error = said("-m", "hydra.sweep.dir=outs", *chosen)
    assert code == 1 and "a sweep over='trusted_modules' is not allowed" in error and error.count("\n") == 1
    assert not (place / "owned").exists()


def test_the_library_trusts_no_group_either(place: Path) -> None:
    write_group(place, {"trusted_modules": ["evilmodule"]})
    assert compose(["+experiment=evil"], "my").trusted_modules == []
    assert compose(["+experiment=evil", "trusted_modules=[mine]"], "my").trusted_modules == ["mine"]
    write_group(place, HOSTILE["joblib"])
    with pytest.raises(LLMConfigError, match="joblib.load.*not trusted"):
        compose(["+experiment=evil"], "my")


def test_what_a_person_trusts_runs(place: Path, said: Said) -> None:
    chosen = [*write_group(place, HOSTILE["joblib"]), "hydra.run.dir=out"]
    assert said(*chosen, "trusted_modules=[joblib]")[0] == 0
    assert (place / "owned").is_dir()
    (place / "owned").rmdir()
    (place / "my" / "mine.yaml").write_text("defaults: [config, _self_]\ntrusted_modules: [joblib]\n")
    for name in ("mine", "mine.yaml"):
        assert said(*chosen, f"--config-name={name}", f"hydra.run.dir=by-{name}")[0] == 0
        assert (place / "owned").is_dir()
        (place / "owned").rmdir()
    assert "trusted_modules must be a list" in said(*chosen, "trusted_modules=joblib")[1]


def test_a_group_may_say_what_groups_are_for(place: Path, said: Said) -> None:
    handlers = {
        "rotating": {
            "class": "logging.handlers.RotatingFileHandler",
            "filename": "${hydra.runtime.output_dir}/${hydra.job.name}-debug.log",
            "maxBytes": 10_000,
        },
        "console": {"class": "logging.StreamHandler", "stream": "ext://sys.stderr"},
    }
    logging = {"version": 1, "handlers": handlers, "root": {"level": "INFO", "handlers": list(handlers)}}
    chosen = write_group(
        place,
        {
            "defaults": [{"override /hydra/launcher": "joblib"}, {"override /sampling": "balanced"}],
            "seed": 5,
            "hydra": {
                "job": {"name": "trial"},
                "run": {"dir": "out/${now:%Y}"},
                "sweep": {"dir": "outs"},
                "launcher": {"n_jobs": 1},
                "sweeper": {"params": {"sampling.max_tokens": "1,2"}},
                "job_logging": logging,
            },
        },
    )
    code, error = said("-m", *chosen)
    assert code == 0, error
    assert (place / "outs" / "0" / "trial-debug.log").is_file() and (place / "outs" / "1" / "outputs.jsonl").is_file()


@pytest.mark.parametrize(
    "logging",
    [
        {"version": 1, "handlers": {"x": {"class": "logging.NoHandler"}}, "root": {"handlers": ["x"]}},
        {"version": 1, "handlers": {"x": {"class": ["logging.Handler"]}}, "root": {"handlers": ["x"]}},
        {"version": 1, "handlers": {"x": {"class": "logging.FileHandler"}}, "root": {"handlers": ["x"]}},
        {"version": 1, "root": {"handlers": ["nowhere"]}},
        {"version": 7, "root": {}},
        {"version": 1, "root": "text"},
        {"formatters": {}},
    ],
    ids=str,
)
def test_loggers_that_cannot_be_set_up_are_said_in_a_line(logging: dict[str, Any], place: Path, said: Said) -> None:
    (place / "my" / "hydra" / "job_logging").mkdir(parents=True)
    (place / "my" / "hydra" / "job_logging" / "mine.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(logging)))
    chosen = ["--config-dir=my", "hydra/job_logging=mine", "backend=echo", "dataset.path=rows.jsonl"]
    code, error = said(*chosen, "hydra.run.dir=out")
    assert code == 1 and error.count("\n") == 1, error
    assert "job_logging" in error

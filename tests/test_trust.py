"""A config group or a run directory from somebody else describes a run, and no more: it runs no code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from llmpipe.cli import main


class Mark:
    """Makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a dataset, a pickle that leaves `owned` where it is read, and a module that does so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"id": "a", "prompt": "say a"}\n')
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Mark(tmp_path / "owned")))
    np.save(tmp_path / "evil.npy", np.array([Mark(tmp_path / "owned")], dtype=object), allow_pickle=True)
    (tmp_path / "evilmodule.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'owned')!r})\nHandler = print\n")
    (tmp_path / "precious").write_text("mine")
    return tmp_path


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process and return its exit code and what it has said on stderr."""

    def run(*arguments: str) -> tuple[int, str]:
        capfd.readouterr()
        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capfd.readouterr().err

    return run


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
def test_a_group_runs_no_code(name: str, place: Path, said: Any) -> None:
    check_refused(place, said("hydra.run.dir=out", *write_group(place, HOSTILE[name])))


@pytest.mark.parametrize("name", ["joblib", "a factory of loggers"])
@pytest.mark.parametrize(
    "command", [["-m", "hydra.sweep.dir=outs"], ["--help"], ["--cfg=job"], ["--info=config"]], ids=str
)
def test_a_group_runs_no_code_whatever_is_asked_for(name: str, command: list[str], place: Path, said: Any) -> None:
    check_refused(place, said(*command, *write_group(place, HOSTILE[name])))


def check_refused(place: Path, outcome: tuple[int, str]) -> None:
    code, error = outcome
    assert not (place / "owned").exists() and not (place / "elsewhere").exists()
    assert (place / "precious").read_text() == "mine" and not (place / "out").exists()
    assert code == 1
    assert error.startswith("llmpipe: ") and error.count("\n") == 1, error

"""Verbs of the command line: which there are, what each takes, and what becomes of what is no verb."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run_llmpipe
from traps import Said

from llmpipe.config.escapes import as_override
from llmpipe.quoting import how_to_resume
from llmpipe.verbs import VERBS
from llmpipe.version import __version__

ECHO = ["backend=echo", "dataset.path=rows.jsonl"]

Printed = Callable[..., tuple[int, str]]


@pytest.fixture
def printed(said: Said, capfd: pytest.CaptureFixture[str]) -> Printed:
    """Run a command in this process; return its exit code and what it has said on stdout."""

    def run(*arguments: str) -> tuple[int, str]:
        from llmpipe.cli import main

        capfd.readouterr()
        code = main(list(arguments))
        return code, capfd.readouterr().out

    return run


def plans(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("plan.json"))


# --- which there are --------------------------------------------------------------------------------------------------


def test_help_lists_the_verbs_and_each_explains_itself_in_short(printed: Printed, place: Path) -> None:
    code, text = printed("--help")
    assert code == 0 and printed("help") == (0, text) == printed("seed=1", "-h")
    for verb, (takes, summary) in VERBS.items():
        assert re.search(rf"^  {re.escape(f'{verb} {takes}')} +{re.escape(summary)}$", text, re.MULTILINE)
        code, short = printed(verb, "--help")
        assert code == 0 and short.startswith(f"usage: llmpipe {verb}") and len(short.splitlines()) < 20
        assert printed("help", verb) == (0, short)
    assert list(place.glob("out*")) == []


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["version"], ["-m", "seed=1", "--version"], ["resume", "--version"], ["--version", "x=1"]],
)
def test_the_version_is_that_of_llmpipe_wherever_it_is_asked_for(arguments: list[str], printed: Printed) -> None:
    assert printed(*arguments) == (0, f"llmpipe {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["seed=1", "--bogus", "-m"], "unrecognized arguments: --bogus"),
        (["export", "out", "--to"], "--to: expected one argument"),
        (["--resolve", "seed=1"], "--resolve goes with --cfg"),
        (["-m", "--cfg=job"], "--multirun and --cfg do not go together"),
        (["--cfg=jobs"], "invalid choice: 'jobs'"),
        (["--config-path=mine.yaml"], "--config-name chooses a file"),
        (["-cp", "nowhere"], "--config-path='nowhere' is no directory"),
        (["--shell-completion"], "--shell-completion goes with one of install=SHELL, uninstall=SHELL, query=SHELL"),
        (["", "seed=1"], "unknown verb ''"),
        (["--config-dir=nowhere"], "nowhere' not found"),
        (["--experimental-rerun=nowhere.pickle"], "is no file"),
        (["resume", "out", "-m"], "a run directory holds one run"),
        (["-m", *ECHO[:1], "dataset.path=glob(*.jsonl)"], "the sweep has no job: glob() finds options of a group"),
        (["resum", "out"], "did you mean 'resume'?"),
        (["exprot"], "did you mean 'export'?"),
        (["-m", "plam", "seed=1"], "did you mean 'plan'?"),
        (["my runs"], "to go on with its run: llmpipe resume 'my runs'"),
        (["seed=1", "plan"], "plan is a verb, and stands before all KEY=VALUE: llmpipe plan …"),
        (["resume", "out", "nonsense"], "'nonsense' is no KEY=VALUE"),
        (["help", "resum"], "did you mean 'resume'?"),
    ],
)
def test_what_is_no_command_is_refused_in_a_line(arguments: list[str], why: str, place: Path, said: Said) -> None:
    (place / "my runs").mkdir()
    code, error = said(*arguments)
    assert code == 1, error
    assert error.startswith("llmpipe: ") and error.count("\n") == 1 and why in error, error


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["resume=out"], ["resume", "out"]),
        (["seed=3", "+resume='a=b'"], ["resume", "a=b", "seed=3"]),
        (["resume=it's here", "output=parquet"], ["resume", "it's here", "output=parquet"]),
        (["plan=true", "dataset.path=a b.jsonl", "-m"], ["plan", "dataset.path=a b.jsonl", "-m"]),
        (["run", "plan=true"], ["plan"]),
        (["plan=false", "seed=1"], ["seed=1"]),
        (["export=out"], ["export", "out"]),
        (["export=out", "export_to=so far.parquet", "seed=1"], ["export", "out", "seed=1", "--to", "so far.parquet"]),
        (["export", "out", "export_to=x.jsonl", "export_force=true"], ["export", "out", "--to", "x.jsonl", "--force"]),
        (["plan=true", "resume=out"], ["plan", "hydra.run.dir=out"]),
        (["seed=1", "~export", "~plan=true"], ["seed=1"]),
    ],
)
def test_a_former_key_is_refused_with_the_command_that_does_the_same(
    arguments: list[str], command: list[str], place: Path, said: Said
) -> None:
    code, error = said(*arguments)
    assert code == 1 and error.count("\n") == 1
    assert shlex.split(error.partition("the command is now: ")[2]) == ["llmpipe", *command]


@pytest.mark.parametrize("key", ["resume", "plan", "export", "export_to", "export_force"])
def test_no_config_group_asks_for_a_verb(key: str, place: Path, said: Said) -> None:
    (place / "my" / "experiment").mkdir(parents=True)
    (place / "my" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{key}: true\n")
    code, error = said(*ECHO, "--config-dir=my", "+experiment=mine", "hydra.run.dir=out")
    assert code == 1 and f"Key '{key}' not in 'RunConfig'" in error and error.count("\n") == 1


# --- what they take ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["run", "-m", *ECHO, "seed=1,2"], [*ECHO, "--multirun", "seed=1,2"], ["-m", "run", "seed=1,2", *ECHO]]
)
def test_flags_stand_anywhere(arguments: list[str], place: Path, said: Said) -> None:
    assert said(*arguments, "hydra.sweep.dir=outs")[0] == 0
    assert {path.name for path in (place / "outs").iterdir()} == {"0", "1", "multirun.yaml"}


@pytest.mark.parametrize("line", ["llmpipe", "llmpipe plan", "llmpipe resume out", "llmpipe run seed=1"])
def test_a_shell_completes_what_stands_behind_a_verb(line: str, printed: Printed, monkeypatch: Any) -> None:
    monkeypatch.setenv("COMP_LINE", f"{line} backend=t")
    assert printed("-sc", "query=bash") == (0, "backend=transformers\n")


def test_a_directory_of_configs_is_named_from_where_the_command_is_given(place: Path, said: Said) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "my.yaml").write_text("defaults: [run_schema, /schema/echo@backend, _self_]\nseed: 7\n")
    code, error = said("-cp", "mine", "-cn", "my", "dataset.path=rows.jsonl", "hydra.run.dir=out")
    assert code == 0, error
    assert json.loads((place / "out" / "metrics.json").read_text())["seed"] == 7


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_plan_of_a_sweep_plans_each_job_wherever_it_runs(launcher: str, place: Path, said: Said) -> None:
    asked = ["-m", "plan", *ECHO, "seed=1,2", f"hydra/launcher={launcher}", "hydra.sweep.dir=outs"]
    code, error = said(*asked)
    assert code == 0, error
    assert plans(place / "outs") == ["0/plan.json", "1/plan.json"]
    assert not list(place.glob("outs/?/*.sqlite")) and not list(place.glob("outs/?/.hydra"))


def test_a_sweep_has_a_directory_of_its_own_however_soon_it_follows_another(place: Path, said: Said) -> None:
    for _ in range(2):
        assert said("-m", *ECHO, "seed=1")[0] == 0
    names = [path.name for path in place.glob("outputs/*/*")]
    assert len(names) == 2 and all(re.fullmatch(r"\d\d-\d\d-\d\d-\d{6}-sweep", name) for name in names)


def test_an_experiment_that_sweeps_says_what_is_missing_where_it_is_run_once(place: Path, said: Said) -> None:
    asked = ["+experiment=temperature", *ECHO, "dataset.limit=1", "hydra.run.dir=out"]
    code, error = said(*asked)
    assert code == 0 and "sampling.temperature=0,0.7,1.2 is for a sweep, and this is one run: add -m" in error
    assert said(*asked, "sampling.temperature=0") == (0, "")


@pytest.mark.parametrize("sweep", [False, True])
def test_a_job_in_its_own_directory_reads_what_is_named_from_outside_of_it(
    sweep: bool, place: Path, said: Said
) -> None:
    (place / "where.py").write_text(
        "import os\nfrom llmpipe import EchoRunner\n"
        "class Where(EchoRunner):\n"
        "    def _initialize_model(self):\n"
        "        super()._initialize_model()\n"
        "        open('here', 'w').close()\n"
    )
    own = ["backend=echo", "backend._target_=where.Where", "trusted_modules=[where]", "hydra.job.chdir=true"]
    flags = ["-m", "hydra.sweep.dir=outs", "seed=1"] if sweep else ["hydra.run.dir=out"]
    code, error = said(*own, "dataset.path=rows.jsonl", *flags)
    assert code == 0, error
    out = place / ("outs/0" if sweep else "out")
    assert (out / "here").exists() and Path.cwd() == place
    (out / "outputs.jsonl").unlink()
    os.chdir("/")
    code, error = said("resume", str(out), "trusted_modules=[where]", "backend._target_=where.Where")
    assert code == 0, error
    assert len((out / "outputs.jsonl").read_text().splitlines()) == 1


def test_a_job_in_its_own_directory_finds_a_trusted_module_where_the_command_was_given(place: Path) -> None:
    (place / "mine.py").write_text("from llmpipe import EchoRunner\n\n\nclass Mine(EchoRunner): ...\n")
    own = ["backend=echo", "backend._target_=mine.Mine", "trusted_modules=[mine]", "hydra.job.chdir=true"]
    program = "from llmpipe.cli import main; raise SystemExit(main())"  # what the script llmpipe is
    command = [sys.executable, "-P", "-c", program, *own, "dataset.path=rows.jsonl", "hydra.run.dir=out"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [".hydra/config.yaml", "run.log"])
def test_a_job_in_its_own_directory_writes_through_no_link_either(name: str, place: Path, said: Said) -> None:
    link = place / "outs" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(place / "precious")
    code, error = said(*ECHO, "hydra.job.chdir=true", "hydra.run.dir=outs")
    assert code == 1 and "is a symlink" in error
    assert (place / "precious").read_text() == "mine"


# --- directories of any name ------------------------------------------------------------------------------------------

NAMES = ["a=b", "plan=true", "a,b", "it's", 'say "hi"', "two  blanks", "é", "-dash", "tail ", "~", "#", "two\nlines"]


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_run_can_be_resumed_and_exported(name: str, place: Path, said: Said) -> None:
    directory = place / name
    assert said(*ECHO, as_override("hydra.run.dir", name)) == (0, "")
    (directory / "outputs.jsonl").unlink()
    dashes = ["--"] if name.startswith("-") else []
    assert said("resume", *dashes, name) == (0, "")
    assert said("export", "--to", "x.jsonl", *dashes, name) == (0, "")
    assert json.loads((directory / "outputs.jsonl").read_text()) == json.loads((place / "x.jsonl").read_text())
    assert [path.name for path in place.iterdir() if path.is_dir()] == [name]


def test_a_name_that_hydra_would_read_as_a_reference_is_refused_in_a_line(place: Path, said: Said) -> None:
    import llmpipe

    llmpipe.run(llmpipe.compose(ECHO), "${a}", arguments=ECHO)
    code, error = said("resume", "${a}")
    assert code == 1 and "rename it" in error and error.count("\n") == 1


def test_the_hint_can_be_pasted_into_a_shell(place: Path) -> None:
    shell = f'llmpipe() {{ {shlex.quote(sys.executable)} -m llmpipe "$@"; }}\n'
    stopping = ["on_error=stop", f"dataset.path={place / 'bad.jsonl'}", "backend=echo"]
    (place / "bad.jsonl").write_text('{"prompt": 1}\n{"prompt": "a"}\n')
    directory = place / 'it\'s  "two\nlines", é=$HOME'
    done = run_llmpipe(*stopping, as_override("hydra.run.dir", str(directory)), cwd=place)
    assert done.returncode == 1
    hint = done.stderr.rpartition("to go on with the rows after them: ")[2]
    assert hint == how_to_resume(directory) + "\n"
    pasted = subprocess.run(["bash", "-c", shell + hint.strip() + " on_error=quarantine"], cwd="/", capture_output=True)
    assert pasted.returncode == 3, pasted.stderr
    assert len((directory / "outputs.jsonl").read_text().splitlines()) == 2


def test_a_hint_says_a_name_that_a_verb_would_take_for_a_flag_otherwise() -> None:
    assert how_to_resume("-m") == "llmpipe resume ./-m"

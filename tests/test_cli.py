"""The command line, as its users call it: real processes, real exit codes."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import run_llmpipe
from hydra.core.override_parser.overrides_parser import OverridesParser
from traps import Said

import llmpipe
from llmpipe.config import BACKENDS, ColumnsConfig, RunConfig, SamplingConfig, conf_dir, field_docs
from llmpipe.config.escapes import as_override, text_of
from llmpipe.exceptions import RunInterrupted
from llmpipe.verbs.jobs import Interrupted


@pytest.fixture
def three_rows(tmp_path: Path) -> Path:
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps({"id": f"r{i}", "prompt": f"say {i}"}) + "\n" for i in range(3)))
    return path


def outputs(directory: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (directory / "outputs.jsonl").read_text().splitlines()]


def test_a_run_writes_every_file_the_readme_names_and_exits_0(tmp_path: Path, three_rows: Path) -> None:
    done = run_llmpipe("backend=echo", f"dataset.path={three_rows}", "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {
        "outputs.jsonl",
        "errors.jsonl",
        "metrics.json",
        "report.html",
        "ledger.sqlite",
        ".hydra",
        "run.log",
    }
    assert [row["id"] for row in outputs(tmp_path / "out")] == ["r0", "r1", "r2"]
    assert "rows" in done.stdout and "metrics.json" in done.stdout


def test_rows_that_fail_make_the_exit_code_3(tmp_path: Path, three_rows: Path) -> None:
    with three_rows.open("a") as file:
        file.write("not json\n")
    done = run_llmpipe("backend=echo", f"dataset.path={three_rows}", "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 3
    assert len(outputs(tmp_path / "out")) == 4
    assert "errors.jsonl" in done.stdout


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sampling.temprature=1", "did you mean 'temperature'?"),
        ("backend.modl=x", "did you mean 'model'?"),
        ("smapling=greedy", "sampling"),
        ("sampling=gredy", "balanced"),
        ("sampling.temperature=hot", "Float"),
        ("sampling.temperature=-1", "[0, 100]"),
        ("sampling.top_p=0", "(0, 1]"),
        ("sampling.max_tokens=0", ">= 1"),
        ("device.type=tpu", "cuda"),
        ("backend.slots=0", ">= 1"),
        ("dataset.path=nowhere.jsonl", "does not exist"),
        ("dataset.path=conf", "conf"),
        ("dataset.path=", "dataset.path='' does not exist"),
        ("prompt.system=a\n\x1b[2J", r"text with \n \x1b [ needs quotes"),
        ("metrics.scorers=[exact]", "exact_match"),
        ("prompt.template='{question'", "brace"),
        ("output.format=xml", "parquet"),
        ("dataset.columns.prompt=question", "prompt"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_remedy(
    tmp_path: Path, three_rows: Path, override: str, said: str
) -> None:
    done = run_llmpipe("backend=echo", f"dataset.path={three_rows}", override, "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stderr.startswith("llmpipe: ") and said in done.stderr


def test_a_finished_run_is_not_run_again(tmp_path: Path, three_rows: Path) -> None:
    first = run_llmpipe("backend=echo", f"dataset.path={three_rows}", "hydra.run.dir=out", cwd=tmp_path)
    before = {f: (tmp_path / "out" / f).read_bytes() for f in ("outputs.jsonl", "metrics.json")}
    again = run_llmpipe("resume", "out", cwd=tmp_path)
    assert (first.returncode, again.returncode) == (0, 0), again.stderr
    assert {f: (tmp_path / "out" / f).read_bytes() for f in before} == before


def test_resuming_with_other_options_is_refused_and_names_the_difference(tmp_path: Path, three_rows: Path) -> None:
    run_llmpipe("backend=echo", f"dataset.path={three_rows}", "hydra.run.dir=out", cwd=tmp_path)
    composed = (tmp_path / "out" / ".hydra" / "config.yaml").read_bytes()
    other = run_llmpipe("resume", "out", "sampling.temperature=0.5", cwd=tmp_path)
    assert other.returncode == 1
    assert "sampling.temperature was 0.0, is 0.5" in other.stderr
    assert (tmp_path / "out" / ".hydra" / "config.yaml").read_bytes() == composed
    assert run_llmpipe("resume", "out", cwd=tmp_path).returncode == 0


def test_a_finished_run_can_be_written_again_in_another_format(tmp_path: Path, three_rows: Path) -> None:
    run_llmpipe("backend=echo", f"dataset.path={three_rows}", "hydra.run.dir=out", cwd=tmp_path)
    again = run_llmpipe("resume", "out", "output=parquet", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out" / "outputs.parquet").is_file()


def test_a_sweep_makes_a_run_per_value_and_compares_them(tmp_path: Path, three_rows: Path) -> None:
    done = run_llmpipe(
        "-m",
        "backend=echo",
        f"dataset.path={three_rows}",
        "sampling.max_tokens=1,2",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert [row["completion"] for row in outputs(tmp_path / "sweep" / "0")] == ["say"] * 3
    assert [row["completion"] for row in outputs(tmp_path / "sweep" / "1")] == ["say 0", "say 1", "say 2"]
    assert "sampling.max_tokens=1" in done.stdout.split("sweep")[-1]


def test_one_failed_job_does_not_end_a_sweep(tmp_path: Path, three_rows: Path) -> None:
    done = run_llmpipe(
        "-m",
        "backend=echo",
        f"dataset.path={three_rows}",
        "sampling.max_tokens=0,2",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert len(outputs(tmp_path / "sweep" / "1")) == 3
    table = done.stdout.split("sweep")[-1]
    assert "not finished" in table and "sampling.max_tokens=2" in table


def test_an_interrupted_sweep_begins_no_further_job(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    rows = write_jsonl(*({"prompt": f"{i}"} for i in range(300_000)))
    command = [sys.executable, "-m", "llmpipe", "-m", "backend=echo", f"dataset.path={rows}", "seed=1,2,3"]
    sweep = subprocess.Popen(
        [*command, "hydra.sweep.dir=sweep"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "sweep/0/ledger.sqlite").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    sweep.send_signal(signal.SIGINT)
    said = sweep.communicate(timeout=60)[1]
    assert sweep.returncode == 130
    assert "interrupted by SIGINT; continue with: llmpipe resume " in said.splitlines()[-1]
    assert "Error executing job" not in said
    assert not (tmp_path / "sweep" / "1").exists()


def test_an_interruption_comes_from_another_process_as_it_is() -> None:
    sent = Interrupted(RunInterrupted(Path("out"), signal.SIGINT))
    got = pickle.loads(pickle.dumps(sent))
    assert (got.error.signum, str(got.error)) == (signal.SIGINT, str(sent.error))


RUN = "import sys; from llmpipe.cli import main; sys.path[:] = [p for p in sys.path if p]; sys.exit(main())"
"""The command `llmpipe`, which does not have the directory it is called from on its path."""


@pytest.mark.parametrize("fault", ["", "1 / 0"])
def test_a_backend_beside_the_data_is_found_and_its_faults_end_the_run_in_a_line(
    fault: str, tmp_path: Path, three_rows: Path
) -> None:
    (tmp_path / "shout.py").write_text(
        "from llmpipe import BaseLLMRunner, Chunk\n"
        "class Shout(BaseLLMRunner):\n"
        "    def _initialize_model(self): pass\n"
        "    def stream(self, requests):\n"
        "        for request in requests:\n"
        f"            {fault or 'pass'}\n"
        "            yield Chunk(request.id, 0, request.prompt.upper(), 'stop')\n"
    )
    own = ["backend=echo", "backend._target_=shout.Shout", "trusted_modules=[shout]", "hydra.run.dir=out"]
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, *own, f"dataset.path={three_rows}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if not fault:
        assert done.returncode == 0, done.stderr
        assert outputs(tmp_path / "out")[0]["completion"] == "SAY 0"
        return
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    hint = f"what was finished is safe: llmpipe resume {tmp_path / 'out'}"
    assert last == f"llmpipe: Shout failed: division by zero; {hint}"
    assert "division by zero" in (tmp_path / "out" / "run.log").read_text()


def test_a_refused_command_leaves_the_run_it_was_refused_on_as_it_was(tmp_path: Path, three_rows: Path) -> None:
    first = ["backend=echo", f"dataset.path={three_rows}", "hydra.run.dir=out"]
    assert run_llmpipe(*first, cwd=tmp_path).returncode == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out" / ".hydra").iterdir()}
    refused = run_llmpipe(*first, "seed=3", cwd=tmp_path)
    assert refused.returncode == 1 and "seed was 0, is 3" in refused.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "out" / ".hydra").iterdir()} == before


@pytest.mark.parametrize("name", ["file", "file/deeper", "/proc/none"])
def test_a_directory_that_cannot_be_written_is_named_in_a_line(name: str, tmp_path: Path, three_rows: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_llmpipe("backend=echo", f"dataset.path={three_rows}", f"hydra.run.dir={name}", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"llmpipe: cannot write to the run directory: {name}")
    assert done.stderr.count("\n") == 1


def test_a_log_that_cannot_be_opened_is_said_in_a_line(tmp_path: Path, three_rows: Path) -> None:
    (tmp_path / "out" / "run.log").mkdir(parents=True)
    done = run_llmpipe("backend=echo", f"dataset.path={three_rows}", "hydra.run.dir=out", cwd=tmp_path)
    assert done.returncode == 1
    assert "run.log: Is a directory" in done.stderr and done.stderr.count("\n") == 1


def test_a_working_directory_that_is_gone_is_said_in_a_line(tmp_path: Path, three_rows: Path) -> None:
    (tmp_path / "gone").mkdir()
    command = f'cd gone && rmdir ../gone && "{sys.executable}" -m llmpipe backend=echo dataset.path="{three_rows}"'
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "the working directory is not there any more" in done.stderr


def test_resume_without_a_directory_is_refused(tmp_path: Path) -> None:
    for given in ([], [""]):
        done = run_llmpipe("resume", *given, cwd=tmp_path)
        said = "llmpipe: no run directory is named; see llmpipe resume --help\n"
        assert (done.returncode, done.stderr) == (1, said)
    assert list(tmp_path.iterdir()) == []


def test_the_version_is_that_of_llmpipe(tmp_path: Path) -> None:
    assert run_llmpipe("--version", cwd=tmp_path).stdout == f"llmpipe {llmpipe.__version__}\n"


def test_jobs_in_other_processes_count_as_well(tmp_path: Path, three_rows: Path) -> None:
    done = run_llmpipe(
        "-m",
        "backend=echo",
        f"dataset.path={three_rows}",
        "sampling.max_tokens=2,0,1",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "hydra.sweep.dir=sweep",
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert "max_tokens=0 is not allowed" in done.stderr
    table = done.stdout.split("sweep")[-1]
    assert table.index("sampling.max_tokens=2") < table.index("sampling.max_tokens=1")


def test_a_group_cannot_trust_its_own_target(tmp_path: Path, three_rows: Path) -> None:
    (tmp_path / "my" / "experiment").mkdir(parents=True)
    (tmp_path / "my" / "experiment" / "evil.yaml").write_text(
        "# @package _global_\ntrusted_modules: [os]\nbackend:\n  _target_: os.system\n"
    )
    done = run_llmpipe(
        "--config-dir", "my", "+experiment=evil", "backend=echo", f"dataset.path={three_rows}", cwd=tmp_path
    )
    assert done.returncode == 1
    assert "not trusted" in done.stderr


def test_standard_hydra_works(tmp_path: Path) -> None:
    job = run_llmpipe("--cfg", "job", "--resolve", cwd=tmp_path)
    assert job.returncode == 0 and "_target_: llmpipe.runners.LlamaCppRunner" in job.stdout
    info = run_llmpipe("--info", "searchpath", cwd=tmp_path)
    assert info.returncode == 0 and "schema" in info.stdout
    (tmp_path / "my" / "sampling").mkdir(parents=True)
    (tmp_path / "my" / "sampling" / "mine.yaml").write_text("temperature: 0.25\n")
    own = run_llmpipe("--config-dir", "my", "sampling=mine", "--cfg", "job", "-p", "sampling", cwd=tmp_path)
    assert own.returncode == 0 and "temperature: 0.25" in own.stdout


def test_help_shows_every_group_and_what_every_key_means(tmp_path: Path) -> None:
    done = run_llmpipe("--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for group in conf_dir().iterdir():
        if group.is_dir() and group.name != "hydra":
            assert f"{group.name}=" in done.stdout
            assert all(option.stem in done.stdout for option in group.glob("*.yaml"))
    for schema in (RunConfig, SamplingConfig, ColumnsConfig, *BACKENDS.values()):
        for name, doc in field_docs(schema).items():
            assert " ".join(doc.split()) in done.stdout, f"{schema.__name__}.{name}"


def test_help_and_import_load_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "transformers", "llama_cpp", "pandas", "pyarrow", "matplotlib")
    for start in ("import llmpipe", "import llmpipe.cli; llmpipe.cli.main(['--help'])"):
        code = (
            f"import sys\ntry:\n    {start}\nexcept SystemExit: pass\nprint([m for m in {heavy} if m in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]", start


def test_the_public_names_are_all_there() -> None:
    assert sorted(llmpipe.__all__) == llmpipe.__all__
    assert all(getattr(llmpipe, name) is not None for name in llmpipe.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        llmpipe.nonsense  # noqa: B018


def test_a_run_with_files_of_ones_own_can_be_resumed_without_naming_them_again(
    tmp_path: Path, three_rows: Path
) -> None:
    (tmp_path / "my" / "sampling").mkdir(parents=True)
    (tmp_path / "my" / "sampling" / "mine.yaml").write_text("max_tokens: 1\n")
    asked = ["backend=echo", "sampling=mine", f"dataset.path={three_rows}", "hydra.run.dir=out"]
    first = run_llmpipe("--config-dir", "my", *asked, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (tmp_path / "out" / "outputs.jsonl").unlink()
    again = run_llmpipe("resume", "out", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert [row["completion"] for row in outputs(tmp_path / "out")] == ["say"] * 3


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["hydra.run.dir=s3://bucket/run"], "hydra.run.dir=s3://bucket/run"),
        (['hydra.sweep.dir="gs://bucket/run"'], 'hydra.sweep.dir="gs://bucket/run"'),
        (["resume", "s3://bucket/run"], "'s3://bucket/run'"),
        (["export", "out", "--to", "s3://bucket/file.jsonl"], "--to 's3://bucket/file.jsonl'"),
    ],
)
def test_a_place_on_another_machine_is_refused_and_no_folder_of_its_name_is_made(
    given: list[str], named: str, tmp_path: Path
) -> None:
    done = run_llmpipe(*given, "backend=echo", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"llmpipe: {named} is not supported yet: it must be on this machine; copy it from there\n"
    assert list(tmp_path.iterdir()) == []


def unreadable(tmp_path: Path) -> Path:
    """Make a file that may not be read, and what else no file can be read from."""
    locked = tmp_path / "locked"
    locked.write_text("{}")
    locked.chmod(0)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "closed").mkdir(mode=0)
    return locked


def without_privileges(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command so that permissions count for root as well."""
    command = [sys.executable, "-m", "llmpipe", *arguments]
    if os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root reads everything, and there is no setpriv")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


LONG_NAME = "x" * 300


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["dataset.path=locked"], "locked cannot be read"),
        (["dataset.path=closed"], "dataset.path='closed' cannot be read: Permission denied"),
        (["dataset.path=closed/x.jsonl"], "dataset.path='closed/x.jsonl' cannot be read: Permission denied"),
        ([f"dataset.path={LONG_NAME}"], "cannot be read: File name too long"),
        (["dataset.path=loop"], "dataset.path='loop' does not exist"),
        (["dataset.path=dangling"], "dataset.path='dangling' does not exist"),
        (
            ["dataset.path='~nobody-knows/x'"],
            "dataset.path='~nobody-knows/x' is not allowed; it must be a name of a file",
        ),
        (["prompt.tools=locked"], "prompt.tools='locked' cannot be read: Permission denied"),
        (["prompt.tools=folder"], "prompt.tools='folder' cannot be read: Is a directory"),
        ([f"prompt.tools={LONG_NAME}"], "cannot be read: File name too long"),
        (["backend.model=locked"], "backend.model='locked' cannot be read: Permission denied"),
        (["backend.model=closed"], "backend.model='closed' cannot be read: Permission denied"),
        (["backend.model=closed/x.gguf"], "backend.model='closed/x.gguf' cannot be read: Permission denied"),
        ([f"backend.model=./{LONG_NAME}"], "cannot be read: File name too long"),
        (["backend.model=loop/x.gguf"], "does not exist"),
        (["backend.chat_template=locked"], "backend.chat_template='locked' cannot be read: Permission denied"),
        (["backend.lora=['locked=0.5']"], "backend.lora=['locked=0.5'] cannot be read: Permission denied"),
        (["backend.lora=[closed/x]"], "cannot be read"),
        (["--config-dir=yaml", "+experiment=locked"], "cannot read a configuration: "),
        (["resume", LONG_NAME], "cannot be read: File name too long"),
        (["export", "closed/x"], "cannot be read: "),
        ([f"hydra.run.dir={LONG_NAME}"], "cannot write to the run directory: "),
        (["hydra.run.dir=closed/x"], "cannot write to the run directory: "),
    ],
)
def test_what_cannot_be_read_is_named_as_such_in_a_line(
    given: list[str], said: str, tmp_path: Path, three_rows: Path
) -> None:
    locked = unreadable(tmp_path)
    (tmp_path / "yaml/experiment").mkdir(parents=True)
    os.link(locked, tmp_path / "yaml/experiment/locked.yaml")
    known = ["backend=llama_cpp" if "backend." in given[0] else "backend=echo", f"dataset.path={three_rows}"]
    known = known[:1] if given[0].startswith("dataset.path") else known
    asked = given if given[0].startswith(("resume", "export")) else [*given, *known]
    asked += [] if given[0].startswith(("resume", "export", "hydra.run.dir")) else ["hydra.run.dir=out"]
    done = without_privileges(*asked, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("llmpipe: ") and done.stderr.count("\n") == 1 and said in done.stderr, done.stderr
    assert "run directory" not in done.stderr or "run directory" in said
    (tmp_path / "closed").chmod(0o700)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dataset.path", "a\0b"), ("backend.model", "./a\0b"), ("prompt.tools", "a\0b"), ("directory", "a\0b")],
)
def test_the_library_refuses_names_that_no_file_can_have(
    name: str, value: str, tmp_path: Path, three_rows: Path
) -> None:
    config = llmpipe.compose(["backend=llama_cpp", f"dataset.path={three_rows}"])
    if name == "dataset.path":
        config.dataset.path = value
    elif name == "backend.model":
        config.backend.model = value
    elif name == "prompt.tools":
        config.prompt.tools = value
    with pytest.raises(llmpipe.LLMError):
        llmpipe.run(config, tmp_path / (value if name == "directory" else "out"))
    assert not (tmp_path / "out" / "ledger.sqlite").exists()


NAMES = ["a=b", "a,b", "{x}", "it's", 'a"b', "é", "end\\", "b\\'c", "#", "[x](y);z", "~x", "tail ", " ", "1e3", "null"]


@pytest.mark.parametrize("name", NAMES)
def test_any_text_can_be_handed_on_to_hydra(name: str) -> None:
    (parsed,) = OverridesParser.create().parse_overrides([as_override("hydra.run.dir", name)])
    assert parsed.value() == text_of(as_override("hydra.run.dir", name)) == name
    (parsed,) = OverridesParser.create().parse_overrides([as_override("dataset.path", [name, "b"])])
    assert parsed.value() == [name, "b"]


def test_a_directory_of_any_name_can_be_resumed_and_exported(place: Path, three_rows: Path, said: Said) -> None:
    directory = place / '"it\'s", {a=[b]} #é\\ '
    assert said("backend=echo", f"dataset.path={three_rows}", as_override("hydra.run.dir", str(directory)))[0] == 0
    (directory / "outputs.jsonl").unlink()
    assert said("resume", directory.name) == (0, "")
    assert said("export", directory.name) == (0, "")
    assert len(outputs(directory)) == 3 and (directory / "partial.jsonl").is_file()
    assert [path for path in place.iterdir() if path.is_dir()] == [directory]


def test_what_is_noted_of_a_run_stays_as_it_was_where_its_name_needs_quotes(
    place: Path, three_rows: Path, said: Said
) -> None:
    asked = ["backend=echo", f"dataset.path={three_rows}", "hydra.run.dir='a=b'"]
    assert said(*asked)[0] == 0
    composed = (place / "a=b/.hydra/config.yaml").read_bytes()
    assert said(*asked, "seed=3")[0] == 1
    assert (place / "a=b/.hydra/config.yaml").read_bytes() == composed


def test_the_command_that_goes_on_can_be_pasted_into_a_shell(place: Path, write_jsonl: Any, said: Said) -> None:
    rows = write_jsonl(*[{"prompt": 5}] * 2, {"prompt": "a"})
    directory = place / "it's, $HOME"
    asked = ["backend=echo", f"dataset.path={rows}", as_override("hydra.run.dir", str(directory))]
    code, error = said(*asked, "max_error_rate=0.5")
    assert code == 1
    pasted = shlex.split(error.partition("to go on with the rows after them: ")[2])
    assert pasted == ["llmpipe", "resume", str(directory), "max_error_rate=null"]
    assert said(*pasted[1:])[0] == 3


@pytest.mark.parametrize("key", ["dataset.path", "prompt.template", "hydra.run.dir"])
@pytest.mark.parametrize(
    ("reference", "why"),
    [("oc.env:NOT_SET", "Environment variable 'NOT_SET' not found"), ("a.b", "Interpolation key 'a.b' not found")],
)
def test_a_reference_that_leads_nowhere_is_said_in_a_line(
    key: str, reference: str, why: str, place: Path, said: Said
) -> None:
    asked = ["dataset.path=rows.jsonl", "hydra.run.dir=out", f"{key}=${{{reference}}}"]
    assert said("backend=echo", *asked) == (1, f"llmpipe: {key}: {why}\n")

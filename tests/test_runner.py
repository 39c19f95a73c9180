"""One message for the user, and no key that nothing reads; through the runner itself in tests/bad_input."""

from __future__ import annotations

import errno
import json
import re
import shlex
from pathlib import Path

import pytest

from custom.case import CaseError
from custom.runner import check_arguments, message_of, unknown_keys

ROOT = Path(__file__).resolve().parents[1]


def chained(*errors: BaseException) -> BaseException:
    """The first one, caused by the second, caused by the third..."""
    for outer, inner in zip(errors, errors[1:]):
        outer.__cause__ = inner
    return errors[0]


COMPONENT = RuntimeError("Failed to instantiate component 'a.B' with keywords: x\n set '_mode_=debug'")


@pytest.mark.parametrize(("error", "message"), [
    (chained(RuntimeError("Failed to evaluate"), RuntimeError("applying transform"), CaseError("no target")),
     "no target"),
    (chained(RuntimeError("x"), OSError(errno.ENOSPC, "No space left on device", "/out/a")),
     "/out/a: No space left on device; free space there, or choose another output_dir"),
    (chained(RuntimeError(str(COMPONENT)), TypeError("B.__init__() got an unexpected keyword argument 'x'")),
     "config: a.B: B.__init__() got an unexpected keyword argument 'x'; see its docstring for the arguments it takes"),
    (ModuleNotFoundError("Cannot locate class or function path: 'a.C'."),
     "config: Cannot locate class or function path: 'a.C'. Correct the '_target_'"),
    (ZeroDivisionError("a bug"), None), (chained(RuntimeError("x"), TypeError("a bug")), None),
    (OSError(errno.EIO, "a broken disk"), None),
])
def test_message(error, message):
    assert message_of(error) == message


BASE = {"dose_grid": "ct", "inferer": {"steps": "@num_steps"}, "num_steps": 1}


@pytest.mark.parametrize(("layers", "unknown"), [
    ([BASE], [[]]), ([BASE, {"dose_grid": 2}], [[], []]), ([BASE, {"dose_gird": 2}], [[], ["dose_gird"]]),
    ([BASE, {"num_steps": "@count", "count": 3}], [[], []]), ([BASE, {"copy": 3, "inferer": "%copy"}], [[], []]),
    ([BASE, {"inferer#steps": 4, "infer#steps": 4}], [[], ["infer"]]), ([BASE, {"+dose_grid": 1}], [[], []]),
    ([BASE, {"new": 1}, {"new": 2}], [[], ["new"], []]), ([BASE, {"go": ["$1"], "description": "x"}], [[], []]),
])
def test_unknown_keys(layers, unknown):
    assert unknown_keys(layers, {"go"}) == unknown


def test_the_command_line_is_checked_against_the_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(BASE))
    (tmp_path / "b.json").write_text(json.dumps({"dose_grid": 2}))
    both = str([str(tmp_path / name) for name in ("a.json", "b.json")])
    check_arguments(["run", "go", "--config_file", both, "--dose_grid", "3", "--num-steps=4", "--inferer#steps", "2"])
    check_arguments(["run", "--run_id", "go", "--config_file", both, "--go", "[]", "--logging_file", "x"])
    with pytest.raises(CaseError, match="unknown key 'dose_gird' in the command line.*Did you mean 'dose_grid'"):
        check_arguments(["run", "go", "--config_file", both, "--dose_gird", "3"])
    (tmp_path / "b.json").write_text(json.dumps({"num_step": 2}))
    with pytest.raises(CaseError, match="unknown key 'num_step' in .*b.json.*Did you mean 'num_steps'"):
        check_arguments(["run", "go", "--config_file", both])


def test_a_file_of_arguments_is_checked_with_the_command_line(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(BASE))
    arguments = {"run_id": "go", "config_file": str(tmp_path / "a.json"), "dose_grid": 2}
    (tmp_path / "args.json").write_text(json.dumps(arguments))
    command = ["run", "--args_file", str(tmp_path / "args.json")]
    check_arguments([*command, "--dose_grid", "3"])
    with pytest.raises(CaseError, match="unknown key 'dose_gird'"):
        check_arguments([*command, "--dose_gird", "3"])
    (tmp_path / "args.json").write_text(json.dumps(arguments | {"num_step": 2}))
    with pytest.raises(CaseError, match="unknown key 'num_step'"):
        check_arguments(command)


def test_what_the_runner_would_leave_out_is_told(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(BASE))
    command = ["run", "go", "--config_file", str(tmp_path / "a.json"), "--dose_grid"]
    check_arguments([*command, "$None"])
    with pytest.raises(CaseError, match=r"--dose_grid None.*write --dose_grid '\$None'"):
        check_arguments([*command, "None"])


def documented_commands() -> list[str]:
    """Every ``monai.bundle run`` of the README and the docs, continuation lines joined."""
    pages = [ROOT / "README.md", *sorted((ROOT / "bundle" / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages).replace("\\\n", " ")
    found = re.findall(r"^\S*python\S* -m monai\.bundle (run .*)$", text, flags=re.MULTILINE)
    return sorted({line.split(" #")[0].strip() for line in found})


@pytest.mark.parametrize("line", documented_commands())
def test_documented_commands_have_known_keys(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_arguments(shlex.split(line))

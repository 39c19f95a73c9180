"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from custom.whole import whole_file, write_json, write_whole

ROOT = Path(__file__).resolve().parents[1]


def test_a_file_appears_with_its_folder_and_replaces_the_older_one(tmp_path):
    path = tmp_path / "a" / "b.json"
    write_whole(path, "one\n")
    write_whole(path, "two\r\n")
    assert path.read_bytes() == b"two\r\n"
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path):
    path = tmp_path / "b.json"
    write_whole(path, "one")
    with pytest.raises(ZeroDivisionError), whole_file(path) as part:
        part.write_text("half")
        assert path.read_text() == "one"
        raise ZeroDivisionError
    assert path.read_text() == "one" and [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_a_kill_leaves_the_older_file_and_the_next_run_clears_up(tmp_path):
    path = tmp_path / "b.json"
    write_whole(path, "one")
    program = ("import os, signal, sys\nfrom custom.whole import whole_file\n"
               "with whole_file(sys.argv[1]) as part:\n"
               "    part.write_text('half')\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=env, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "one" and len(list(tmp_path.iterdir())) == 2
    write_whole(path, "two")
    assert path.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["b.json"]


def test_json_has_null_for_what_is_no_number(tmp_path):
    record = {"a": [1.0, math.nan, (math.inf, "x")], "b": {"c": -math.inf, "d": True, "e": None}}
    write_json(tmp_path / "r.json", record)
    text = (tmp_path / "r.json").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text) == {"a": [1.0, None, [None, "x"]], "b": {"c": None, "d": True, "e": None}}

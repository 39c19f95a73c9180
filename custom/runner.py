"""What MONAI's bundle runner lacks: one message instead of its resolver's traceback, and refusal of misspelt keys."""

from __future__ import annotations

import ast
import difflib
import errno
import inspect
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle import run as monai_run

from custom.case import CaseError

__all__ = ["check_arguments", "message_of", "one_message", "unknown_keys"]

ENTRY_KEYS = {"description", "displayable_configs", "finalize", "imports", "initialize", "run"}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG}
REPEATED = re.compile(r"(Current|Engine) run is terminating due to exception")
REFERENCE = re.compile(r"@([A-Za-z_]\w*)")  # "@key", "@key#nested"
MACRO = re.compile(r"%([A-Za-z_]\w*)(#.*|::.*)?")  # "%key", a copy of that key


def one_message() -> None:
    """First thing a run does: check the command line's keys, and from now on say errors in one message.

    An error that is not meant for the user keeps its traceback. Only a run by ``python -m monai.bundle run`` is
    changed; MONAI Label, MONAI Deploy and a notebook keep their own way.

    Raises:
        CaseError: a key that no config defines and nothing reads.
    """
    if not sys.argv[0].replace("\\", "/").endswith("monai/bundle/__main__.py"):
        return
    default = sys.excepthook

    def hook(kind, error, trace) -> None:
        message = message_of(error)
        if message is None:
            default(kind, error, trace)
        else:
            sys.stderr.write(f"\nError: {message}\n")

    sys.excepthook = hook
    for handler in (*logging.getLogger().handlers, logging.lastResort):
        handler.addFilter(lambda record: not REPEATED.match(str(record.msg)))  # ignite tells every error once more
    check_arguments(sys.argv[1:])


def message_of(error: BaseException | None) -> str | None:
    """What the user should read of an error and those that caused it; None for one that needs its traceback."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    told = next((e for e in chain if isinstance(e, CaseError)), None)
    if told is not None:
        return str(told)
    disk = next((e for e in chain if isinstance(e, OSError) and e.errno in DISK_ERRORS), None)
    if disk is not None:
        return f"{disk.filename or 'output'}: {disk.strerror}; free space there, or choose another output_dir"
    for outer, inner in zip(chain, chain[1:]):
        component = re.match(r"Failed to instantiate component '(.*?)'", str(outer))
        if component and isinstance(inner, TypeError) and "argument" in str(inner):
            return f"config: {component[1]}: {inner}; see its docstring for the arguments it takes"
    last = str(chain[-1]) if chain else ""
    if isinstance(chain[-1], ModuleNotFoundError) and "Cannot locate class or function" in last:
        return f"config: {last} Correct the '_target_'"
    if isinstance(chain[-1], (ValueError, KeyError)) and re.search("not defined in the config|config resolver", last):
        return f"config: {last.strip(chr(34))}"
    return None


def check_arguments(argv: Sequence[str]) -> None:
    """Check the keys on the command line and in the file of arguments, and those of every config file but the first.

    Args:
        argv: what follows ``python -m monai.bundle``.

    Raises:
        CaseError: naming the key, where it stands and the nearest one that is known; or a key that is None, which the
            runner takes for not given.
    """
    options = dict(_options(argv))
    none = [key for key, value in options.items() if value is None]
    if none:
        raise CaseError(f"--{none[0]} None: MONAI's runner leaves out what is None; expected a value. To set a key to "
                        f"None write --{none[0]} '$None'")
    if "args_file" in options:
        options = {**ConfigParser.load_config_file(str(options["args_file"])), **options}
    files = options.get("config_file", [])
    files = [files] if isinstance(files, str) else list(files)
    layers = [(str(name), ConfigParser.load_config_file(name)) for name in files]
    own = set(inspect.signature(monai_run).parameters) - {"override"}
    entries = {str(options.get(name, "")) for name in ("run_id", "init_id", "final_id")}
    entries |= {word for word in argv[1:2] if not word.startswith("-")}
    layers.append(("the command line", {key: value for key, value in options.items() if key not in own}))
    if len(layers) < 2:
        return
    unknown = unknown_keys([layer for _, layer in layers], entries)
    for (place, _), keys in zip(layers, unknown, strict=True):
        served = _other_stages(place) if keys else set()
        keys = [key for key in keys if key not in served]
        if keys:
            known = {_name(key) for _, layer in layers for key in layer} - set(keys)
            near = difflib.get_close_matches(keys[0], known, n=1)
            raise CaseError(f"config: unknown key {keys[0]!r} in {place}; expected one that the config files define"
                            + (f". Did you mean {near[0]!r}?" if near else f", such as {', '.join(sorted(known)[:8])}"))


def _other_stages(place: str) -> set[str]:
    """Keys that a system's file may set for stages that this run is none of: it is one file for all three commands."""
    path = Path(place)
    if path.parent.name != "systems":
        return set()
    stages = [path.parent.parent / f"{stage}.json" for stage in ("train", "evaluate", "studies")]
    found = [ConfigParser.load_config_file(str(stage)) for stage in stages if stage.is_file()]
    return {_name(key) for stage in found for key in stage}.union(*map(_references, found))


def unknown_keys(layers: Sequence[Mapping[str, Any]], entries: Sequence[str] | set[str] = ()) -> list[list[str]]:
    """Top-level keys of each layer that no layer below defines, no layer refers to and no tool reads.

    Args:
        layers: configs, each laid over those before; the first may define what it likes.
        entries: keys that a tool reads, besides the common ones: the ids to run.
    """
    used = set().union(*map(_references, layers)) | set(entries) | ENTRY_KEYS
    defined = {_name(key) for key in layers[0]} if layers else set()
    found: list[list[str]] = []
    for number, layer in enumerate(layers):
        names = [_name(key) for key in layer]
        runs = {_name(key) for key, value in layer.items() if _is_run(value)}  # one of a file's several things to do
        found.append([name for name in names if number and name not in defined | used | runs])
        defined |= set(names)
    return found


def _is_run(value: Any) -> bool:
    """True for a list of expressions, which is what an id to run holds."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v.startswith("$") for v in value)


def _name(key: str) -> str:
    """Top-level key of an id, without MONAI's merge signs: ``"+imports"`` -> ``"imports"``, ``"a#b"`` -> ``"a"``."""
    return re.split("#|::", key.lstrip("+~"))[0]


def _references(value: Any) -> set[str]:
    """Top-level keys that the strings of a config refer to."""
    texts = [text for text in _strings(value)]
    copied = {match[1] for match in map(MACRO.fullmatch, texts) if match}
    return copied.union(*(REFERENCE.findall(text) for text in texts if text.startswith(("@", "$"))))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for child in children:
        yield from _strings(child)


def _options(argv: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """``--key value`` and ``--key=value`` as Fire reads them."""
    for word, following in zip(argv, [*argv[1:], "--"]):
        if not word.startswith("--") or len(word) < 3:
            continue
        key, sign, value = word[2:].partition("=")
        if not sign:
            value = "True" if following.startswith("--") else following
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = value
        yield key.replace("-", "_"), parsed

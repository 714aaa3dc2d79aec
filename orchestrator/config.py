"""run.toml: read with every problem named at once, written back resolved, and compared with the run that a root already holds.

load(path, overrides)       a person's file and `-o section.key=value`
parse(text, name, ...)      the same from text, e.g. the resolved run.toml of a root
overridden(config, ...)     the same with what rewinds have put on top of it
to_toml(config)             resolved, with each key's docstring as a comment
settled(config, stored)     with what is decided at a run's start and stays so
identity(config)            what may not change within a run, as one hash
explain_difference(a, b)    the same as sentences
"""

from __future__ import annotations

import hashlib
import json
import textwrap
import tomllib
from collections.abc import Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from .errors import InputError
from .relations import broken, nearest
from .rules import Problem, shown
from .sections import ClusterSection, RunConfig, StorageSection, keys_of, known_keys, section_types, value_of

__all__ = [
    "ClusterSection",
    "RunConfig",
    "StorageSection",
    "explain_difference",
    "explain_overrides",
    "identity",
    "load",
    "overridden",
    "parse",
    "settled",
    "to_toml",
]

Tables = dict[str, Any]  # section -> {key: value}; a section inside another one has a name of its own: "train.spike"


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a file and of `-o section.key=value` on top of it. Raises InputError with every problem that it finds."""
    config = parse(_read(Path(path)), str(path), overrides)
    if config.train.script and not Path(config.train.script).is_file():
        raise InputError(
            f"{path}: {shown('train.script', config.train.script)}: no such file; a relative path starts at the current folder"
        )
    return config


def parse(text: str, name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a TOML text; `name` is what messages call it. Raises InputError with every problem that it finds."""
    tables = _flat(_toml(text, name))
    overridden, malformed = _override(tables, overrides)
    known, unknown = _split(tables)
    config, wrong = _validated(known)
    problems = [*malformed, *unknown, *wrong]
    bad = frozenset[str]().union(*(problem.keys for problem in problems))
    problems += (problem for problem in broken(config) if not problem.keys & bad)
    if problems:
        raise InputError(*(f"{'-o' if problem.keys & overridden else name}: {problem.text}" for problem in problems))
    return config


def overridden(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """With the overrides of a run log's rewinds. Raises InputError where they do not fit together."""
    return parse(to_toml(config), "run.toml", overrides) if overrides else config


def explain_overrides(config: RunConfig, overrides: Sequence[str]) -> str:
    """For whoever starts the run and thinks that run.toml holds: which of its values do not. "" where all do."""
    keys = (override.partition("=")[0].strip() for override in overrides)
    now = overridden(config, overrides)
    told = [
        f"{shown(key, value_of(now, key))}, not {value_of(config, key)!r}" for key in keys if value_of(now, key) != value_of(config, key)
    ]
    return f"since a rewind {'; '.join(told)}; another `keepstep rewind` with -o changes that" if told else ""


def to_toml(config: RunConfig) -> str:
    """Every key with its value, its docstring above it."""
    return "\n".join(_section_toml(config, name) for name in section_types())


def settled(config: RunConfig, stored: RunConfig | None) -> RunConfig:
    """With the number of logical ranks where it was left open: that of the run that is there (`stored`), else one per rank of a full gang.

    So a run that goes on with more or fewer nodes keeps its number.
    """
    cluster = config.cluster
    if not cluster.exact_reduction or cluster.logical_ranks:
        return config
    begun = stored.cluster.logical_ranks if stored else 0
    cluster = cluster.model_copy(update={"logical_ranks": begun or cluster.nodes * cluster.ranks_per_node})
    return config.model_copy(update={"cluster": cluster})


def identity(config: RunConfig) -> str:
    """SHA-256 over what may not change within a run: two configs with the same identity continue each other's history.

    The rule: whatever decides the bits of the history on a gang of unchanged size. So not where the run lives (root, storage), what
    it runs on (cluster, but for the order in which gradients are added), or what it is asked for beside training (checkpoint, evaluate).
    """
    fixed = {key: value_of(config, key) for key in _fixed_keys(config)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def explain_difference(stored: RunConfig, new: RunConfig) -> list[str]:
    """Why `new` is not the run that a root holds, one sentence per key; empty if their identities are equal."""
    fixed = {**dict.fromkeys(_fixed_keys(stored)), **dict.fromkeys(_fixed_keys(new))}
    pairs = ((key, value_of(stored, key), value_of(new, key)) for key in fixed)
    return [f"{shown(key, mine)}, but the run that is there has {shown(key, theirs)}" for key, theirs, mine in pairs if theirs != mine]


def _fixed_keys(config: RunConfig) -> Iterator[str]:
    yield from ("run.name", "run.seed", "train.script")
    if config.train.script:
        yield "train.script_args"  # the script's text may change: its owner may mend a bug and go on
        return
    fixed = (key for key in known_keys() if key.startswith(("data.", "model.", "optimizer.")))
    yield from (key for key in fixed if key != "data.streaming")  # how the same tokens are read
    # Dropout draws by micro batch and sums have an order, so this one is not only about memory.
    yield from ("train.batch_tokens", "train.micro_batch_samples", "train.precision", "train.compile")
    yield from ("train.objective", "train.start", "train.start_without", "train.freeze", "train.truncate")
    yield from ("train.label_smoothing", "train.mask_share", *(key for key in known_keys() if key.startswith("train.lora.")))
    yield from ("cluster.exact_reduction", "cluster.logical_ranks")
    if config.optimizer.min_lr_ratio != 1:
        yield "run.steps"  # the cosine's length: another one would have had other learning rates from the first step on


def _section_toml(config: RunConfig, name: str) -> str:
    section = section_types()[name]
    keys = (f"{_comment(field.description or '')}{_assignment(config, name, key)}" for key, field in keys_of(name).items())
    return f"{_comment(section.__dict__.get('__doc__') or '')}[{name}]\n{''.join(keys)}"


def _assignment(config: RunConfig, section: str, key: str) -> str:
    value = value_of(config, f"{section}.{key}")
    return tomli_w.dumps({key: list(value) if isinstance(value, tuple) else value})


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(" ".join(text.split()), 118))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; examples/quickstart.toml is one to start from") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, not a file; name the run.toml itself") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _toml(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name}: not TOML: {error}") from None


def _flat(tables: dict[str, Any], prefix: str = "") -> Tables:
    """As tomllib gives them, {"train": {"script": ..., "spike": {...}}}, side by side: {"train": {"script": ...}, "train.spike": {...}}."""
    flat: Tables = {}
    for name, table in tables.items():
        section = f"{prefix}{name}"
        if not isinstance(table, dict):
            flat[section] = table
            continue
        inner = {key: value for key, value in table.items() if isinstance(value, dict) and f"{section}.{key}" not in known_keys()}
        if len(inner) < len(table) or not table:
            flat[section] = {key: value for key, value in table.items() if key not in inner}
        flat |= _flat(inner, f"{section}.")
    return flat


def _nested(flat: Tables) -> dict[str, Any]:
    """Inverse of `_flat`."""
    tables: dict[str, Any] = {}
    for section, table in flat.items():
        reduce(lambda outer, name: outer.setdefault(name, {}), section.split("."), tables).update(table)
    return tables


def _override(tables: Tables, overrides: Sequence[str]) -> tuple[frozenset[str], list[Problem]]:
    """Writes the overrides into the tables; returns the keys that they name, and what is no override at all."""
    named: set[str] = set()
    malformed: list[Problem] = []
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.strip().rpartition(".")
        named.add(key.strip())
        if not (equals and dot and section and name):
            malformed.append(Problem(frozenset({key.strip()}), f"{override!r} must be section.key=value, for example run.steps=60"))
        elif isinstance(table := tables.setdefault(section, {}), dict):
            table[name] = _override_value(key.strip(), text.strip())
    return frozenset(named), malformed


def _override_value(key: str, text: str) -> Any:
    """The text as a TOML value where it is one; else the text itself, so that nobody must quote for the shell and for TOML."""
    try:
        (value,) = tomllib.loads(f"value = {text}").values()
    except ValueError:  # not TOML, or a number beyond Python's limits
        return text
    field = known_keys().get(key)
    wants_text = field is not None and field.annotation is str
    return text if wants_text and not isinstance(value, str) else value


def _split(tables: Tables) -> tuple[Tables, list[Problem]]:
    """What run.toml knows, and a problem for whatever it does not."""
    known: Tables = {}
    problems: list[Problem] = []
    for section, table in tables.items():
        if section not in section_types():
            problems.append(_unknown_section(section, table))
        elif not isinstance(table, dict):
            problems.append(_no_section(section, table))
        else:
            known[section] = {key: value for key, value in table.items() if f"{section}.{key}" in known_keys()}
            problems += (_unknown_key(section, key, value) for key, value in table.items() if key not in known[section])
    return known, problems


def _no_section(name: str, value: object) -> Problem:
    return Problem(frozenset({name}), f"{shown(name, value)} must be a section: write [{name}] and its keys below")


def _unknown_section(section: str, table: object) -> Problem:
    if isinstance(table, dict):
        keys = frozenset(f"{section}.{key}" for key in table)
        return Problem(keys, f"[{section}] is not a section; {nearest(f'[{section}]', (f'[{name}]' for name in section_types()))}")
    homes = [key for key in known_keys() if key.endswith(f".{section}")]
    remedy = f"did you mean {homes[0]}? Write it below [{homes[0].rpartition('.')[0]}]" if homes else nearest(section, known_keys())
    return Problem(frozenset({section}), f"{shown(section, table)} stands outside every section; {remedy}")


def _unknown_key(section: str, key: str, value: object) -> Problem:
    """Names the key that was meant: the like-named one of another section, else the nearest of this one."""
    if f"{section}.{key}" in section_types():
        return _no_section(f"{section}.{key}", value)
    homes = [known for known in known_keys() if known.endswith(f".{key}")]
    remedy = f"did you mean {homes[0]}?" if homes else nearest(key, keys_of(section), f"{section}.")
    return Problem(frozenset({f"{section}.{key}"}), f"{section}.{key} is not a key; {remedy}")


def _validated(known: Tables) -> tuple[RunConfig, list[Problem]]:
    """The config, wrong values replaced by defaults, and a problem for each of them."""
    try:
        return _strict(known), []
    except ValidationError as error:
        problems = _wrong(error.errors())
    bad = frozenset[str]().union(*(problem.keys for problem in problems))
    valid = {s: {key: value for key, value in table.items() if f"{s}.{key}" not in bad} for s, table in known.items()}
    return _strict(valid), problems


def _strict(tables: Tables) -> RunConfig:
    # As JSON, because only there pydantic takes an array for a tuple while it refuses "2" and true for 2.
    return RunConfig.model_validate_json(json.dumps(_nested(tables), default=str), strict=True)


def _wrong(errors: Sequence[ErrorDetails]) -> list[Problem]:
    by_key: dict[str, list[ErrorDetails]] = {}
    for error in errors:
        by_key.setdefault(_key_of(error), []).append(error)
    return [_wrong_value(key, group) for key, group in by_key.items()]


def _key_of(error: ErrorDetails) -> str:
    """Of pydantic's path the part that is a key; what follows is inside its value."""
    names = [str(part) for part in error["loc"]]
    return next(key for end in range(2, len(names) + 1) if (key := ".".join(names[:end])) in known_keys())


def _wrong_value(key: str, errors: Sequence[ErrorDetails]) -> Problem:
    """One problem per key, although a union fails once per member."""
    index = "".join(f"[{part}]" for part in errors[0]["loc"] if isinstance(part, int))
    must = " or ".join(error["msg"].partition(" should ")[2] or error["msg"] for error in errors)
    about = (known_keys()[key].description or "").removesuffix(".")
    return Problem(frozenset({key}), f"{shown(key + index, errors[0]['input'])} must {must} ({about})")

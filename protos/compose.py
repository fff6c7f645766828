"""Command-line words to a checked config, by Hydra's grammar, with errors that name the nearest key instead of a traceback."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lamina.protos.config import SHORTHANDS, Config, checked, known_keys, value_of
from lamina.protos.errors import ConfigError, nearest

# Keys whose values are names or paths, which Hydra's grammar would trip over where they hold spaces and the like.
_VERBATIM = (
    "data.source", "model.source", "data.holdout", "data.template", "output", "resume", "coordinator.spec",
    "coordinator.listen", "coordinator.identity", "coordinator.revocations", "coordinator.metrics", "client.coordinator",
    "client.identity", "client.policy", "client.state",
)  # fmt: skip


def expanded(word: str, sweeping: bool) -> str:
    """One override with its shorthand written out and a path quoted.

    Args:
        word: Such as `data=stdlib`.
        sweeping: Whether commas separate the values of a sweep.

    Returns:
        The override for Hydra.

    Raises:
        ConfigError: If it is not `key=value`.
    """
    key, equals, value = word.partition("=")
    if not equals and not word.startswith("~"):
        raise ConfigError(f"{word!r}: expected key=value. See `lamina simulate --help`.")
    mark = key[: len(key) - len(key.lstrip("+~"))]
    key = SHORTHANDS.get(key.lstrip("+~"), key.lstrip("+~"))
    plain = value[:1] not in ("'", '"') and not (sweeping and "," in value)
    if key in _VERBATIM and plain and value:
        # In Hydra's grammar a backslash escapes only what stands before a quote.
        escaped = re.sub(r"(\\*)('|$)", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), value)
        value = f"'{escaped}'"
    if key.startswith("lora.rank_pattern"):
        mark = "++"  # a mapping with keys of its own
    return f"{mark}{key}{equals}{value}"


def _check_key(key: str) -> None:
    known = known_keys()
    sections = {name.rsplit(".", 1)[0] for name in known if "." in name}
    if key in known or key in sections or any(key.startswith(open_key + ".") for open_key in ("lora.rank_pattern",)):
        return
    section, _, last = key.rpartition(".")
    leaf = [name for name in known if name.rsplit(".", 1)[-1] == last]
    siblings = [name.rpartition(".")[2] for name in known if section and name.startswith(section + ".")]
    near = difflib.get_close_matches(last, siblings, 1, 0.8)
    hint = f" Did you mean {leaf[0]}?" if leaf else nearest(key, [*known, *SHORTHANDS])
    if near:
        hint = f" Did you mean {section}.{near[0]}?"
    raise ConfigError(f"{key}: no such key.{hint} `lamina simulate --help` lists them all.")


def sweeps(words: Sequence[str], multirun: bool) -> list[list[str]]:
    """The runs that the words ask for.

    Args:
        words: Overrides as typed.
        multirun: Whether comma-separated values are swept.

    Returns:
        One list of single-valued overrides a run, the last key varying fastest.

    Raises:
        ConfigError: For an unknown key, a malformed word, or a sweep without `--multirun`.
    """
    parser = OverridesParser.create()
    choices: list[list[str]] = []
    for word in words:
        text = expanded(word, multirun)
        try:
            override = parser.parse_override(text)
        except HydraException as error:
            raise ConfigError(f"{word!r}: expected key=value, got: {str(error).splitlines()[0]}") from None
        _check_key(str(override.key_or_group))
        if not override.is_sweep_override():
            choices.append([text])
        elif multirun:
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            raise ConfigError(f"{word!r}: several values need --multirun. Put a list in brackets: key=[a,b].")
    return [list(run) for run in itertools.product(*choices)]


def composed(overrides: Sequence[str], base: Path | None = None) -> Config:
    """A checked config from single-valued overrides.

    Args:
        overrides: As `sweeps` gives them.
        base: A YAML file with the same keys, below the overrides, or None.

    Returns:
        Plain dataclasses.

    Raises:
        ConfigError: If a key is unknown or a value impossible.
    """
    store = ConfigStore.instance()
    tree: Any = OmegaConf.structured(Config)
    if base is not None:
        tree = _merged(tree, base)
    store.store(name="lamina", node=tree)
    GlobalHydra.instance().clear()
    try:
        with initialize(version_base=None, config_path=None):
            config = OmegaConf.to_object(compose(config_name="lamina", overrides=list(overrides)))
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ or error
        first = str(cause).strip().splitlines()
        where = getattr(cause, "full_key", None) or " ".join(overrides)
        raise ConfigError(f"{where}: {first[0] if first else type(error).__name__}") from None
    if not isinstance(config, Config):
        raise ConfigError("expected a configuration, got something else. Check the YAML file.")
    return checked(config)


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A config with some keys set to other values, checked.

    Args:
        config: Plain dataclasses.
        values: Dotted key -> value.

    Returns:
        A new config.

    Raises:
        ConfigError: If a key is unknown or a value impossible.
    """
    tree = OmegaConf.structured(config)
    for key, value in values.items():
        _check_key(key)
        try:
            OmegaConf.update(tree, key, value, merge=False)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{key}: {str(error).strip().splitlines()[0]}") from None
    found = OmegaConf.to_object(tree)
    if not isinstance(found, Config):
        raise ConfigError("expected a configuration, got something else.")
    return checked(found)


def _merged(tree: Any, base: Path) -> Any:
    loaded = _loaded(base)
    for key in _leaves(OmegaConf.to_container(loaded)):
        _check_key(key)
    try:
        return OmegaConf.merge(tree, loaded)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{base}: {error.full_key or 'top level'}: {str(error).strip().splitlines()[0]}") from None


def _loaded(base: Path) -> Any:
    try:
        return OmegaConf.load(base)
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"{base}: expected a readable YAML file, got {type(error).__name__}.") from None
    except Exception as error:
        if type(error).__module__.startswith("yaml"):
            raise ConfigError(f"{base}: expected YAML, got: {str(error).splitlines()[0]}") from None
        raise


def _leaves(node: Any, path: str = "") -> list[str]:
    if not isinstance(node, dict) or path == "lora.rank_pattern":
        return [path] if path else []
    return [leaf for key, value in node.items() for leaf in _leaves(value, f"{path}.{key}" if path else str(key))]


def to_yaml(config: Config, keys: Sequence[str] | None = None) -> str:
    """The resolved config as YAML.

    Args:
        config: A checked config.
        keys: Dotted keys to write; default: every one.

    Returns:
        Text.
    """
    tree = OmegaConf.structured(config)
    if keys is None:
        return str(OmegaConf.to_yaml(tree))
    chosen = OmegaConf.create()
    for key in keys:
        OmegaConf.update(chosen, key, value_of(config, key))
    return str(OmegaConf.to_yaml(chosen))


def help_text(head: str, keys: Sequence[str]) -> str:
    """The text of a command's `--help`.

    Args:
        head: Usage and examples.
        keys: The dotted keys to list.

    Returns:
        The head, then each key with its default and what it means, and the shorthands of these keys.
    """
    defaults, texts = Config(), known_keys()
    lines = [head]
    for key in keys:
        lines.append(f"  {key} ({_shown(value_of(defaults, key))})\n      {texts[key]}")
    lines.append("\nshorthands: " + " ".join(f"{name}=" for name, key in SHORTHANDS.items() if key in keys))
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A default on one line, as YAML would have it."""
    if value is None or value == "":
        return "unset"
    plain = isinstance(value, str) and value.isprintable()
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


def take_config(words: list[str], options: str) -> Path | None:
    """Take `--config FILE` out of a command's words.

    Args:
        words: Changed in place.
        options: Those that the command has, for the message.

    Returns:
        The file, or None.

    Raises:
        ConfigError: For another option.
    """
    if "--config" not in words:
        flags = [word for word in words if word.startswith("-")]
        if flags:
            raise ConfigError(f"{flags[0]}: no such option. Options: {options}.")
        return None
    at = words.index("--config")
    if at + 1 >= len(words):
        raise ConfigError("--config: expected a YAML file after it.")
    path = Path(words[at + 1])
    del words[at : at + 2]
    return path


def from_words(words: Sequence[str]) -> Config:
    """The config of one run, from words with at most one `--config FILE`.

    Args:
        words: As typed, without the command.

    Returns:
        A checked config.

    Raises:
        ConfigError: If a word or the file cannot be used.
    """
    rest = list(words)
    base = take_config(rest, "--config FILE, --json, --help")
    return composed(sweeps(rest, False)[0], base)


def keys_of(words: Sequence[str]) -> list[str]:
    """The dotted keys that words and a `--config` file set.

    Args:
        words: As typed, without the command.

    Returns:
        Keys, shorthands written out.

    Raises:
        ConfigError: If a word is no key=value, or the file cannot be read.
    """
    rest = list(words)
    base = take_config(rest, "--config FILE, --json, --help")
    keys = [expanded(word, False).partition("=")[0].lstrip("+~") for word in rest]
    return keys + (_leaves(OmegaConf.to_container(_loaded(base))) if base is not None else [])

"""`key=value` words of the small commands, which need no Hydra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lamina.protos.errors import ConfigError, nearest


def parsed(words: Sequence[str], keys: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Split words into plain ones and known settings.

    Args:
        words: What follows the command.
        keys: Known key -> default.

    Returns:
        Plain words in order, and every key with its value.

    Raises:
        ConfigError: For an unknown key or option, with the nearest known.
    """
    plain, settings = [], dict(keys)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("-"):
            plain.append(word)
        elif equals and key in keys:
            settings[key] = value
        elif equals and ("/" in key or "." in key):
            plain.append(word)  # a path with an equals sign in it
        else:
            known = ", ".join(f"{one}=" for one in keys)
            raise ConfigError(f"{word!r}: no such setting.{nearest(key, keys)} Known: {known}")
    return plain, settings


def flag(settings: Mapping[str, str], key: str) -> bool:
    """A true-or-false setting.

    Args:
        settings: From `parsed`.
        key: Which.

    Returns:
        Its value.

    Raises:
        ConfigError: If it is neither.
    """
    value = settings[key].lower()
    if value not in ("true", "false"):
        raise ConfigError(f"{key}={settings[key]}: expected true or false.")
    return value == "true"

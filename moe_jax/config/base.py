"""What every config shares: checked field types, and JSON both ways."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

# Not typing.Self, which run-time checkers of single functions cannot resolve.
ConfigT = TypeVar("ConfigT", bound="Config")


class Config:
    """Checks every field's type, and converts to and from JSON."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not _has_type(value, hints[field.name]):
                raise ValueError(
                    f"{field.name} must be {_describe(hints[field.name])}, got {value!r}"
                )
        self._check()

    def _check(self) -> None:
        """Checks values; a subclass overrides it."""

    def replace(self: ConfigT, **changes: Any) -> ConfigT:
        """Returns a copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain Python values, nested configs as dicts, tuples as lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[call-overload]

    def to_json(self, indent: int | None = 2) -> str:
        """Returns the config as JSON text."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
        """Builds the config from `to_dict`'s result; absent fields take their defaults.

        Raises:
            ValueError: a key is not a field, or a value is refused.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{cls.__name__} must be given a mapping, got {values!r}")
        hints = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {', '.join(map(repr, unknown))}; "
                f"it has {', '.join(names)}"
            )
        return cls(**{name: _from_plain(value, hints[name]) for name, value in values.items()})

    @classmethod
    def from_json(cls: type[ConfigT], text: str) -> ConfigT:
        """Builds the config from `to_json`'s result.

        Raises:
            ValueError: the text is no JSON, a key is not a field, or a value is refused.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{cls.__name__} is not valid JSON: {error}") from error
        return cls.from_dict(values)


def positive(config: Any, *names: str) -> None:
    """Raises `ValueError` unless the named fields are above zero."""
    for name in names:
        if getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive, got {getattr(config, name)}")


def not_negative(config: Any, *names: str) -> None:
    """Raises `ValueError` if a named field is below zero."""
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")


def between(config: Any, low: float, high: float, *names: str, upper_open: bool = False) -> None:
    """Raises `ValueError` unless the named fields lie in [low, high], or [low, high)."""
    for name in names:
        value = getattr(config, name)
        if not (low <= value <= high) or (upper_open and value == high):
            bracket = ")" if upper_open else "]"
            raise ValueError(f"{name} must lie in [{low:g}, {high:g}{bracket}, got {value}")


def divides(config: Any, part: str, whole: str) -> None:
    """Raises `ValueError` unless field `part` divides field `whole`."""
    if getattr(config, whole) % getattr(config, part):
        raise ValueError(
            f"{part} must divide {whole}={getattr(config, whole)}, got {getattr(config, part)}"
        )


def _has_type(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(value is choice or value == choice for choice in typing.get_args(hint))
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, part) for part in typing.get_args(hint))
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_has_type(part, item) for part in value)
    if hint is float:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and value == value
            and abs(value) != float("inf")
        )
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if hint is float:
        return "a finite number"
    return getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)


def _from_plain(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return hint.from_dict(value)
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    return value

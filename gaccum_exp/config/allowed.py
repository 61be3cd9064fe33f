"""What a key takes, said once, beside it: validation, `--help` and the reference read it."""

import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any, ClassVar, Protocol

from gaccum_exp.errors import BadInputError, nearest

MOST = 2**31 - 1
"""The largest count."""


class Allowed(Protocol):
    """What a key takes; as text it is what the reference says."""

    def check(self, key: str, value: Any) -> None:
        """Refuse any other value by raising `BadInputError`."""
        ...


@dataclass(frozen=True, slots=True)
class Choices:
    """One of several words, null among them where it stands there."""

    words: tuple[str, ...]

    def check(self, key: str, value: Any) -> None:
        """Refuse any other word, naming the nearest."""
        said = "null" if value is None else value
        if said not in self.words:
            hint = nearest(str(value), self.words)
            raise BadInputError(f"{key}={said}: not one of {', '.join(self.words)}{hint}")

    def __str__(self) -> str:
        return ", ".join(self.words)


@dataclass(frozen=True, slots=True)
class Count:
    """A whole number in a range; null is for the key's type to take or to refuse."""

    least: int = 1
    most: int = MOST
    because: str = ""
    """Why not more."""

    def check(self, key: str, value: Any) -> None:
        """Refuse a number outside of the range."""
        if value is None or self.least <= value <= self.most:
            return
        if self.most < MOST:
            raise BadInputError(f"{key}={value}: must be {self}{self.because and f', {self.because}'}")
        bound = f"at least {self.least}" if value < self.least else f"at most {self.most:,}"
        raise BadInputError(f"{key}={value}: must be {bound}")

    def __str__(self) -> str:
        return f"{self.least} to {self.most:,}" if self.most < MOST else f"{self.least} or more"


@dataclass(frozen=True, slots=True)
class Positive:
    """A number above 0."""

    null: str
    """What null means."""
    most: float = math.inf
    """It is below that; infinity itself counts as a number only where `endless` says so."""
    endless: bool = False

    def check(self, key: str, value: Any) -> None:
        """Refuse zero, what is negative or no number, and what is too large."""
        if value is None or 0 < value < self.most or (self.endless and value == math.inf):
            return
        bound = "above 0" if self.endless else "above 0, and finite"
        raise BadInputError(f"{key}={value}: must be {bound}; null: {self.null}")

    def __str__(self) -> str:
        return "above 0"


@dataclass(frozen=True, slots=True)
class ChoicesOrInches:
    """One of several words, or a length."""

    words: tuple[str, ...]
    least: float
    most: float

    def check(self, key: str, value: Any) -> None:
        """Refuse any other word, naming the nearest, and a length out of range."""
        if isinstance(value, str):
            if value not in self.words:
                raise BadInputError(
                    f"{key}={value}: not one of {', '.join(self.words)}, and no number of inches"
                    f"{nearest(value, self.words)}"
                )
        elif isinstance(value, bool) or not (
            isinstance(value, int | float) and self.least <= value <= self.most
        ):
            raise BadInputError(f"{key}={value}: must be {self}")

    def __str__(self) -> str:
        return f"{', '.join(self.words)}, or {self.least:g} to {self.most:g} inches"


@dataclass(frozen=True, slots=True)
class SomeOf:
    """A list out of several words, one at least."""

    words: tuple[str, ...]

    def check(self, key: str, value: Any) -> None:
        """Refuse what is no list, an empty one, and any other word in it."""
        if not isinstance(value, list | tuple) or not value:
            raise BadInputError(f"{key}={value}: must be {self}")
        for one in value:
            if one not in self.words:
                hint = nearest(str(one), self.words)
                raise BadInputError(f"{key}={one}: not one of {', '.join(self.words)}{hint}")

    def __str__(self) -> str:
        return f"a list out of {', '.join(self.words)}"


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


def setting(default: Any, allowed: Allowed | None = None, kind: str = "") -> Any:
    """Declare a key of the schema.

    Args:
        default: its value where nothing is said.
        allowed: what it takes beyond what its type says.
        kind: its type in words, where the annotation cannot say it.
    """
    return field(default=default, metadata={"allowed": allowed, "kind": kind})


def one_of(default: str, *others: str) -> Any:
    """Declare a key that takes one of several words; the first is its default, `null` meaning None."""
    return setting(None if default == "null" else default, Choices((default, *others)))


def allowed_of(one: Field[Any]) -> Allowed | None:
    """Return what a field's key takes beyond its type, if that is said."""
    allowed: Allowed | None = one.metadata.get("allowed")
    return allowed


def check_allowed(block: str, kind: type[_Dataclass], values: Mapping[str, Any]) -> None:
    """Refuse values of a block that its keys do not take.

    Raises:
        BadInputError: one that a key of the dataclass `kind` does not take.
    """
    for one in fields(kind):
        allowed = allowed_of(one)
        if allowed is not None and one.name in values:
            allowed.check(f"{block}.{one.name}" if block else one.name, values[one.name])

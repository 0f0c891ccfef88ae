"""Registry: the parts of one seam, chosen by name, by entry point or by import path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from aurora_rl.settings import nearest

P = TypeVar("P")
_AnyPart = TypeVar("_AnyPart")


class Registry(Generic[P]):
    """Parts of one seam by name: registered ones, those of installed packages, and any by its import path.

    A package makes its part known without being imported first by an entry point of the seam's group. The entry
    point's name is the part's name, and its value is the part's import path.

    Args:
        seam: Noun for one part, for messages, such as "drafter".
        group: Group of entry points, such as "aurora_rl.drafters".
        base: Class that every part is a concrete subclass of; None if the parts are functions.
        prepare: Called with the name and the part before it is checked; returns the part to keep. In the place of an
            import path it gets the part's own name.
        reserved: Names that configurations give another meaning. They are suggested, and cannot be registered.

    Example:
        >>> readers = Registry("reader", "my_package.readers", dict)
        >>> @readers.register("plain")
        ... class Plain(dict):
        ...     pass
        >>> readers.get("plain").__name__, readers.get("collections:Counter").__name__, list(readers)
        ('Plain', 'Counter', ['plain'])
        >>> readers.get("plane")
        Traceback (most recent call last):
        ...
        ValueError: no reader is called 'plane'; did you mean 'plain'? There are plain, and any package.module:Class
    """

    def __init__(
        self,
        seam: str,
        group: str,
        base: type | None = None,
        *,
        prepare: Callable[[str, Any], Any] | None = None,
        reserved: Sequence[str] = (),
    ) -> None:
        self._seam, self._group, self._base, self._prepare, self._reserved = seam, group, base, prepare, reserved
        self._parts: dict[str, P] = {}
        self._sources: dict[str, str] = {}  # import path of what was registered

    def register(self, name: str) -> Callable[[_AnyPart], _AnyPart]:
        """Make a part available by name. A part that is defined again, as in a notebook, replaces itself.

        Raises:
            ValueError: Another part has the name, or the part is not of the seam's kind.
        """

        def register(part: _AnyPart) -> _AnyPart:
            new = _path(part)
            owner = "the configuration" if name in self._reserved else self._sources.get(name, new)
            if owner != new:
                raise ValueError(f"the {self._seam} name {name!r} belongs to {owner}; choose another for {new}")
            self._parts[name] = self._checked(name, part, new)
            self._sources[name] = new
            return part

        return register

    def names(self) -> list[str]:
        """Return all names, sorted: registered ones and the entry points of installed packages."""
        return sorted({*self._parts, *self._reserved, *(point.name for point in entry_points(group=self._group))})

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: str) -> P:
        """Return a registered part, that of an entry point, or that of an import path ``package.module:Thing``.

        Raises:
            ValueError: Nothing has the name (the message suggests the nearest), it cannot be imported, or it is not of
                the seam's kind.
        """
        if name in self._parts:
            return self._parts[name]
        if ":" in name.strip(":"):
            point = EntryPoint(name=name, value=name, group=self._group)
        else:
            found = {point.name: point for point in entry_points(group=self._group)}
            if name not in found:
                known = self.names()
                # A path with a dot in the place of the colon is no misspelled name.
                near = ":".join(name.rsplit(".", 1)) if "." in name.strip(".") else nearest(name, known)
                raise ValueError(
                    f"no {self._seam} is called {name!r}; did you mean {near!r}? There are {', '.join(known)}, and any "
                    f"package.module:{'Class' if self._base else 'function'}"
                )
            point = found[name]
        if EntryPoint.pattern.match(point.value) is None:
            raise ValueError(f"the {self._seam} {name!r} is no import path; write package.module:Thing")
        try:
            part = point.load()
        except Exception as error:  # whatever a module does when it is imported
            raise ValueError(f"the {self._seam} {name!r} cannot be imported: {error}") from error
        return self._checked(name, part, point.value)

    def _checked(self, name: str, part: Any, path: str) -> P:
        """Return the part in the form that the registry keeps, or raise ValueError saying what it lacks."""
        base, lead = self._base, f"the {self._seam} {name!r} is {path}, which"
        if self._prepare is not None and callable(part):
            own = str(getattr(part, "__dict__", {}).get("name") or getattr(part, "__name__", name))
            part = self._prepare(own if ":" in name else name, part)
        if base is None:
            # An object that can be called, as a partial, has no types of its settings to read.
            if not callable(part) or isinstance(part, type) or not hasattr(part, "__qualname__"):
                raise ValueError(f"{lead} is no function; write one by def")
        elif not (isinstance(part, type) and issubclass(part, base)):
            raise ValueError(f"{lead} is no subclass of {base.__module__}.{base.__name__}")
        elif missing := sorted(getattr(part, "__abstractmethods__", ())):
            raise ValueError(f"{lead} lacks {', '.join(missing)}")
        return part


def _path(part: Any) -> str:
    """Return the import path of a class or a function; of what has none, as a partial, that of its class."""
    named = part if hasattr(part, "__qualname__") else type(part)
    return f"{named.__module__}:{named.__qualname__}"

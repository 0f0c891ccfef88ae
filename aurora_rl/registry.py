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
    point's name is the part's name, and its value is the part's import path. A part has one name: the one that it was
    registered under, that of its entry point, or its import path.

    Args:
        seam: Noun for one part, for messages, such as "drafter".
        group: Group of entry points, such as "aurora_rl.drafters".
        base: Class that every part is a concrete subclass of; None if the parts are functions.
        prepare: Called with the part's name and the part before it is checked; returns the part to keep.
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
        ValueError: no reader is called 'plane'; did you mean 'plain'? There are plain, and any package.module:Thing
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
        # By name: parts as they are defined, and as they are kept.
        self._registered: dict[str, tuple[Any, P]] = {}
        self._loaded: dict[str, tuple[Any, P]] = {}

    def register(self, name: str) -> Callable[[_AnyPart], _AnyPart]:
        """Make a part available by name. A part that is defined again, as in a notebook, replaces itself.

        Raises:
            ValueError: Another part has the name, the part has another name, or it is not of the seam's kind.
        """

        def register(part: _AnyPart) -> _AnyPart:
            new = _path(part)
            known = {**self._loaded, **self._registered}
            owner = "the configuration" if name in self._reserved else _path(known.get(name, (part, part))[0])
            if owner != new:
                raise ValueError(f"the {self._seam} name {name!r} belongs to {owner}; choose another for {new}")
            for known_name, (defined, kept) in known.items():
                if known_name != name and (part is defined or part is kept):
                    raise ValueError(
                        f"{new} is the {self._seam} {known_name!r} already; use that name in the place of {name!r}"
                    )
            self._registered[name] = part, self._checked(name, part, new)
            return part

        return register

    def __iter__(self) -> Iterator[str]:
        """Iterate over all names, sorted: registered ones and the entry points of installed packages."""
        installed = (point.name for point in entry_points(group=self._group))
        return iter(sorted({*self._registered, *self._reserved, *installed}))

    def __repr__(self) -> str:
        return f"<Registry of {self._group}: {', '.join(self)}>"

    def name_of(self, part: Any) -> str:
        """Return the name of a part: the registered one, that of its entry point, or its import path."""
        for name, (defined, kept) in {**self._loaded, **self._registered}.items():
            if part is defined or part is kept:
                return name
        path = _path(part)
        return next((point.name for point in entry_points(group=self._group) if point.value == path), path)

    def get(self, name: str) -> P:
        """Return a registered part, that of an entry point, or that of an import path ``package.module:Thing``.

        Raises:
            ValueError: Nothing has the name (the message suggests a near one), the name is reserved, it cannot be
                imported, or it is not of the seam's kind.
        """
        if name in self._registered:
            return self._registered[name][1]
        if name in self._reserved:
            raise ValueError(
                f"the {self._seam} {name!r} is chosen by the configuration and has no class; get one of "
                f"{', '.join(each for each in self if each not in self._reserved)}"
            )
        found = {point.name: point for point in entry_points(group=self._group)}
        if ":" in name.strip(":"):
            installed = (point for point in found.values() if point.value == name)
            point = next(installed, EntryPoint(name=name, value=name, group=self._group))
        else:
            if name not in found:
                known = list(self)
                # A path with a dot in the place of the colon is no misspelled name.
                near = ":".join(name.rsplit(".", 1)) if "." in name.strip(".") else nearest(name, known)
                raise ValueError(
                    f"no {self._seam} is called {name!r}; {f'did you mean {near!r}? There' if near else 'there'} are "
                    f"{', '.join(known)}, and any package.module:Thing"
                )
            point = found[name]
        if EntryPoint.pattern.match(point.value) is None:
            raise ValueError(f"the {self._seam} {name!r} is no import path; write package.module:Thing")
        try:
            part = point.load()
        except Exception as error:  # whatever a module does when it is imported
            raise ValueError(f"the {self._seam} {name!r} cannot be imported: {error}") from error
        for defined, kept in (*self._registered.values(), *self._loaded.values()):
            if part is defined or part is kept:
                return kept
        kept = self._checked(point.name, part, point.value)
        self._loaded[point.name] = part, kept
        return kept

    def _checked(self, name: str, part: Any, path: str) -> P:
        """Return the part in the form that the registry keeps, or raise ValueError saying what it lacks."""
        base, lead = self._base, f"the {self._seam} {name!r} is {path}, which"
        if self._prepare is not None and callable(part):
            part = self._prepare(name, part)
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

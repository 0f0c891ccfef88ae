"""Hooks around methods: once, also around inherited ones, and seen when something else is put over them."""

from aurora_rl.envs.vllm.hooking import is_wrapped, wrap


class Base:
    def step(self, number: int) -> int:
        """Add one."""
        return number + 1


class Derived(Base):
    pass


def test_an_inherited_method_is_wrapped_for_its_class_alone() -> None:
    wrap(Derived, "step", lambda step, engine, number: 10 * step(engine, number))
    assert Derived().step(1) == 20 and Base().step(1) == 2
    assert is_wrapped(Derived, "step") and not is_wrapped(Base, "step") and Derived.step.__doc__ == "Add one."


def test_what_is_put_over_a_hook_is_seen() -> None:
    class Other(Base):
        pass

    wrap(Other, "step", lambda step, *args: step(*args))
    Other.step = lambda self, number: number  # type: ignore[method-assign]
    assert not is_wrapped(Other, "step") and not is_wrapped(Other, "missing")

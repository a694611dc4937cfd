"""Parameters of a notebook as a frozen dataclass, the configuration of its system."""

from dataclasses import fields


def names_of(config_class) -> list[str]:
    """Return the notebook parameters that a configuration is made of: all but the two roots."""
    return [field.name for field in fields(config_class)]


def refuse(name: str, value, fits, expected: str) -> None:
    """Raise ValueError where a parameter does not fit, saying which, what it is and what is expected."""
    if not fits:
        raise ValueError(f"parameter `{name}` is {value!r}; expected {expected}.")


def refuse_others(name: str, given, known, *, empty: bool = False) -> None:
    """Raise ValueError where a list parameter repeats itself, holds an unknown value or, unless `empty`, no value."""
    fits = (empty or bool(given)) and set(given) <= set(known) and len(set(given)) == len(given)
    refuse(name, given, fits, f"some of {', '.join(known)}, each but once")

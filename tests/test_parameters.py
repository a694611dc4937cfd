from dataclasses import dataclass

import pytest

from kerasmed import parameters


def test_names_of_are_the_fields_in_order():
    @dataclass(frozen=True)
    class Config:
        seed: int
        rate: float

    assert parameters.names_of(Config) == ["seed", "rate"]


def test_refuse_says_which_what_and_what_is_expected():
    parameters.refuse("rate", 0.1, True, "more than 0")
    with pytest.raises(ValueError, match="parameter `rate` is -1; expected more than 0"):
        parameters.refuse("rate", -1, False, "more than 0")


def test_refuse_others_wants_some_known_values_each_once():
    assert parameters.refuse_others("names", ["b", "a"], ("a", "b", "c")) is None
    for given in ([], ["a", "a"], ["a", "d"]):
        with pytest.raises(ValueError, match=r"`names` is .*; expected some of a, b, c, each but once\."):
            parameters.refuse_others("names", given, ("a", "b", "c"))
    assert parameters.refuse_others("names", [], ("a", "b", "c"), empty=True) is None

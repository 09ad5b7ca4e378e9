"""Wire codes are for ever."""

from __future__ import annotations

import inspect

from forebay.kvstore import errors

GOLDEN = {
    "ForebayError": 0,
    "CallerError": 100,
    "BadRequest": 101,
    "UnknownVerb": 102,
    "VersionMismatch": 103,
    "UnknownSession": 104,
    "UnknownNamespace": 105,
    "LayoutError": 106,
    "NotLeased": 107,
    "Expired": 108,
    "QuotaExceeded": 109,
    "Forbidden": 110,
    "OursForNow": 200,
    "Busy": 201,
    "TierFull": 202,
    "Draining": 203,
    "Internal": 204,
    "PeerError": 300,
    "PeerLost": 301,
    "Timeout": 302,
    "Corrupt": 401,
}

CLASSES = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, Exception)]


def test_codes_are_the_golden_ones() -> None:
    """A code may be added; one that was given out never changes its meaning."""
    assert {error.__name__: error.code for error in CLASSES} == GOLDEN


def test_codes_are_unique() -> None:
    """Two classes of one code could not be told apart by a client."""
    assert len({error.code for error in CLASSES}) == len(CLASSES) == len(errors.BY_CODE)


def test_hundreds_of_a_code_say_whose_fault_it_is() -> None:
    assert {e.code // 100 for e in CLASSES if issubclass(e, errors.CallerError)} == {1}
    assert {e.code // 100 for e in CLASSES if issubclass(e, errors.OursForNow)} == {2}
    assert {e.code // 100 for e in CLASSES if issubclass(e, errors.PeerError)} == {3}


def test_error_comes_back_from_its_code() -> None:
    for error in CLASSES:
        again = errors.from_code(error.code, "why")
        assert type(again) is error
        assert str(again) == "why"


def test_code_of_a_newer_daemon_is_a_plain_error() -> None:
    """An old client must not fail over an error it does not know."""
    assert type(errors.from_code(999, "new")) is errors.ForebayError


def test_tree_in_the_description_names_every_class() -> None:
    """The drawing is what people read."""
    assert errors.__doc__ is not None
    for error in CLASSES:
        assert error.__name__ in errors.__doc__

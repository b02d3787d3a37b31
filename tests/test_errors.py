from __future__ import annotations

import pickle

import pytest

from moa_ray import errors
from moa_ray.errors import EngineOverloaded, MoARayError, SpecError


def _all_errors(cls: type[MoARayError] = MoARayError) -> list[type[MoARayError]]:
    """The tree of `errors`; what other rooms hang into it, their own tests have."""
    below = [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
    return [cls, *(deeper for sub in below for deeper in _all_errors(sub))]


@pytest.mark.parametrize("cls", _all_errors())
def test_every_error_survives_the_way_through_an_actor(cls: type[MoARayError]) -> None:
    error = cls("it broke", hint="mend it")
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), twin.__dict__) == (cls, str(error), error.__dict__)


@pytest.mark.parametrize("cls", _all_errors())
def test_every_error_stands_in_the_tree_of_the_modules_docstring(cls: type[MoARayError]) -> None:
    assert cls.__name__ in (errors.__doc__ or "")


def test_an_error_keeps_what_it_knows() -> None:
    twin = pickle.loads(pickle.dumps(EngineOverloaded("later", engine="smol", retry_after_s=3.0)))
    assert (twin.engine, twin.retry_after_s, twin.http_status) == ("smol", 3.0, 429)


def test_a_spec_error_names_file_line_and_key() -> None:
    error = SpecError("unknown key", file="panel.yaml", line=7, key="agents.chief.modl", hint="did you mean 'model'?")
    assert str(error) == "panel.yaml:7: agents.chief.modl: unknown key\n  hint: did you mean 'model'?"

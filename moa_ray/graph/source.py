"""Where every key of a spec stands in its file, and problems told by that place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel, ValidationError

from moa_ray.errors import SpecError
from moa_ray.graph.spec import NAME_PATTERN

Path = tuple[str | int, ...]
"""Keys and list indices from the top of the document."""

BRANCH = "<"
"""First character of the tags that our unions put into pydantic's locations; no key can start with it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    path: Path
    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Source:
    """A spec's file.

    Args:
        file: Its name, "" where the spec does not come from a file.
        lines: Line of every key and list item, from 1.
        folder: Where relative paths in it start; "" for the working folder.
    """

    file: str = ""
    lines: Mapping[Path, int] = field(default_factory=dict, repr=False)
    folder: str = ""

    def line(self, path: Path) -> int:
        """Line of `path`, or of the nearest key above it; 0 where unknown."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 0)

    def error(self, path: Path, message: str, *, hint: str = "") -> SpecError:
        """The error that says what is wrong at `path`."""
        return SpecError(message, file=self.file, line=self.line(path), key=dotted(path), hint=hint)

    def errors(self, problems: Iterable[Problem]) -> SpecError:
        """All problems as one error, a line each in the file's order; its line and key are those of the first."""
        ordered = sorted(problems, key=lambda problem: self.line(problem.path))
        first, *rest = (self.error(p.path, p.message, hint=p.hint) for p in ordered)
        if rest:
            hints = (f" ({error.hint})" if error.hint else "" for error in (first, *rest))
            first.message = "\n".join(e.message + hint for e, hint in zip((first, *rest), hints, strict=True))
            first.hint = ""
        return first

    def invalid(self, path: Path, error: ValidationError, model: type[BaseModel]) -> SpecError:
        """What pydantic found wrong in the part of the spec at `path`, in words."""
        return self.errors(problems_of(error, model, path))


def dotted(path: Path) -> str:
    """`("layers", 0, 1)` as `layers[0][1]`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that names what was probably meant, "" where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def which(word: str, known: Iterable[str]) -> str:
    """A hint that names what was probably meant, or else all that there is."""
    names = list(known)
    return did_you_mean(word, names) or f"there are: {', '.join(names) or 'none'}"


def problems_of(error: ValidationError, model: type[BaseModel], path: Path = ()) -> list[Problem]:
    """Pydantic's findings, in words that need no knowledge of pydantic."""
    return [_problem(finding, model, path) for finding in error.errors(include_url=False, include_context=True)]


def _problem(finding: Any, model: type[BaseModel], path: Path) -> Problem:
    place: Path = tuple(
        part for part in finding["loc"] if not (isinstance(part, str) and (part.startswith(BRANCH) or part == "[key]"))
    )
    full = (*path, *place)
    given, context = finding["input"], finding.get("ctx", {})
    match finding["type"]:
        case "extra_forbidden":
            return Problem(full, "unknown key", _hint_for_key(str(place[-1]), model, place[:-1]))
        case "missing":
            near = difflib.get_close_matches(str(place[-1]), map(str, given), n=1) if isinstance(given, Mapping) else []
            return Problem(full, "is missing", f"is {near[0]!r} meant to be it?" if near else "")
        case "literal_error":
            word = did_you_mean(
                str(given), [part.strip("'") for part in context["expected"].replace(" or ", ", ").split(", ")]
            )
            return Problem(full, f"must be {context['expected']}, not {given!r}", word)
        case "string_pattern_mismatch" if context["pattern"] == NAME_PATTERN:
            return Problem(full, f"{given!r} is no name: use letters, digits, '.', '_' and '-', 63 at most")
        case kind:
            limits = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
            return Problem(full, _WORDS.get(kind, "{msg}").format(**limits, msg=finding["msg"]) + _not(kind, given))


_WORDS = {
    "string_type": "must be text",
    "string_pattern_mismatch": "must have the form {pattern}",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list",
    "dict_type": "must be a mapping (key: value)",
    "model_type": "must be a mapping (key: value)",
    "model_attributes_type": "must be a mapping (key: value)",
    "too_short": "must not be empty",
    "finite_number": "must be a finite number",
}


def _not(kind: str, given: Any) -> str:
    """What stands there instead, where that helps."""
    if kind not in _WORDS or kind == "too_short":
        return ""
    text = repr(given)
    return f", not {text if len(text) <= 40 else type(given).__name__}"


def _hint_for_key(key: str, model: type[BaseModel], place: Path) -> str:
    """The key of the same mapping that was meant, or where a key of this name belongs."""
    known = [name for here in _models_at(model, place) for name in here.model_fields]
    if hint := did_you_mean(key, known):
        return hint
    for name, nested in model.model_fields.items():
        inner = nested.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel) and key in inner.model_fields:
            return f"it belongs under {name!r}"
    if place and key in model.model_fields:
        return "it belongs at the top level"
    return f"known keys: {', '.join(known)}" if known else ""


def _models_at(model: type[BaseModel], place: Path) -> list[type[BaseModel]]:
    """The models that may describe the mapping at `place`: those that the keys lead to."""
    current = [model]
    for part in place:
        fields = [m.model_fields[part] for m in current if isinstance(part, str) and part in m.model_fields]
        if fields:  # else the key of a mapping or the index of a list: its items are of the same models
            current = [inner for field in fields for inner in _models_in(field.annotation)]
    return current


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation mentions: `dict[str, Agent]` mentions `Agent`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]

"""Every error that moa-ray raises on purpose, as one tree.

    MoARayError
    ├── SpecError            what the user wrote is wrong (file, line, key)
    ├── RequestError         a request that no retry can save (empty prompt, unknown role)
    │   ├── Unauthorized         no API key, or a wrong one
    │   └── BodyTooLarge         more bytes than the server takes
    ├── ServerUnreachable    a client cannot reach its server, or the connection broke
    ├── Overloaded           the server has as many requests as it takes
    ├── ModelNotFound        a model name or file that cannot be had
    ├── ClusterError         Ray cannot be reached, or refused
    │   └── ResourcesShort   an actor has nowhere to run
    ├── EngineError          one engine call failed
    │   ├── EngineUnavailable    unreachable, dead, or starting
    │   ├── EngineTimeout        no answer within its time
    │   ├── EngineOverloaded     told to come back later (429, 503)
    │   ├── EngineRefused        wrong key, unknown model, malformed request
    │   └── ContextOverflow      the prompt does not fit the model's window
    ├── QuorumNotMet         too few agents of a layer answered
    └── DeadlineExceeded     the request's time is up

Each class knows its HTTP status, its OpenAI error type and code, whether a retry may help and the
exit code of the command line; each instance holds one clear line and, where there is one,
a hint of what to do. Instances survive pickling, since they cross Ray actors.
"""

from __future__ import annotations

from typing import Any, ClassVar


class MoARayError(Exception):
    """Base of all errors of moa-ray.

    Args:
        message: What is wrong and where, in one line.
        hint: What to do about it, in one line.
        retry_after_s: Seconds after which it is worth asking again, where that is known.
    """

    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    openai_code: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), self.__dict__)


def _restore(cls: type[MoARayError], state: dict[str, Any]) -> MoARayError:
    error = cls.__new__(cls)
    Exception.__init__(error, state["message"])
    error.__dict__.update(state)
    return error


class SpecError(MoARayError):
    """What the user wrote is wrong: a YAML file, an option, a configuration.

    Args:
        message: What is wrong.
        file: The file it stands in, "" where there is none.
        line: Line in the file, counted from 1; 0 where unknown.
        key: Dotted path of the key, such as `agents.chief.engine`.
        hint: What to do, such as "did you mean 'model'?".
    """

    openai_code = "invalid_spec"
    http_status = 400
    openai_type = "invalid_request_error"
    exit_code = 2

    def __init__(self, message: str, *, file: str = "", line: int = 0, key: str = "", hint: str = "") -> None:
        place = f"{file}:{line}" if file and line else file
        super().__init__(": ".join(part for part in (place, key, message) if part), hint=hint)
        self.file = file
        self.line = line
        self.key = key


class RequestError(MoARayError):
    """A request that cannot be served as it stands, whatever the state of the system."""

    openai_code = "invalid_request"
    http_status = 400
    openai_type = "invalid_request_error"
    exit_code = 2


class Unauthorized(RequestError):
    """The server wants an API key, and got none or a wrong one."""

    openai_code = "invalid_api_key"
    http_status = 401


class BodyTooLarge(RequestError):
    """A request's body has more bytes than the server takes."""

    openai_code = "body_too_large"
    http_status = 413


class ServerUnreachable(MoARayError):
    """A client cannot reach its server, or the connection to it broke."""

    openai_code = "server_unreachable"
    http_status = 503
    retryable = True


class Overloaded(MoARayError):
    """The server answers as many requests as it may, and as many wait."""

    openai_code = "overloaded"
    http_status = 429
    openai_type = "rate_limit_error"
    retryable = True


class ModelNotFound(MoARayError):
    """A model that is neither a file, nor in the catalogue, nor to be downloaded."""

    openai_code = "model_not_found"
    http_status = 404
    openai_type = "invalid_request_error"


class ClusterError(MoARayError):
    """Ray cannot be reached, an application did not start, or an address is wrong."""

    openai_code = "cluster_unavailable"
    http_status = 503
    retryable = True


class ResourcesShort(ClusterError):
    """An actor has nowhere to run: the message names the resource and the engine."""

    openai_code = "resources_short"


class EngineError(MoARayError):
    """One call to one engine failed.

    Args:
        message: What the engine said.
        engine: The engine's name in the spec, "" until the runtime fills it in.
        retry_after_s: Seconds after which the engine wants to be asked again.
        hint: What to do.
    """

    openai_code = "engine_failed"
    http_status = 502
    retryable = True

    def __init__(self, message: str, *, engine: str = "", retry_after_s: float | None = None, hint: str = "") -> None:
        super().__init__(message, hint=hint, retry_after_s=retry_after_s)
        self.engine = engine


class EngineUnavailable(EngineError):
    """The engine is unreachable, its actor died, or its connection broke."""

    openai_code = "engine_unavailable"
    http_status = 503


class EngineTimeout(EngineError):
    """The engine gave no answer within the time it had."""

    openai_code = "engine_timeout"
    http_status = 504


class EngineOverloaded(EngineError):
    """The engine asks to come back later."""

    openai_code = "rate_limit_exceeded"
    http_status = 429
    openai_type = "rate_limit_error"


class EngineRefused(EngineError):
    """The engine will never accept this call: wrong key, unknown model, malformed request."""

    openai_code = "engine_refused"
    retryable = False


class ContextOverflow(EngineRefused):
    """The prompt and the wanted answer do not fit the model's context window."""

    openai_code = "context_length_exceeded"
    http_status = 400
    openai_type = "invalid_request_error"


class QuorumNotMet(MoARayError):
    """Too few agents of a layer answered; the message names each agent and its reason."""

    openai_code = "quorum_not_met"
    http_status = 503
    retryable = True


class DeadlineExceeded(MoARayError):
    """The request's own deadline passed before its answer was complete."""

    openai_code = "deadline_exceeded"
    http_status = 504
    retryable = True

"""Every error that dspark-cluster raises on purpose.

::

    DsparkError
    ├── ConfigError               configuration file or start-up arguments (names the key)
    ├── CheckpointError           model or drafter files on disk (names file and key)
    ├── DataError                 a file to learn or measure from (names file and line)
    ├── InvalidRequestError       a client's request (names the field)
    │   ├── ModelNotFoundError    it names a model that is not served here
    │   └── ContextLengthError    its prompt leaves no room for an output
    ├── QueueFullError            admission refused; carries when to retry
    ├── UnauthenticatedError      no API key, or one that is not known
    ├── PermissionDeniedError     known, but not allowed to do this
    ├── RequestCancelledError     the client went away
    ├── DeadlineExceededError     the request's own deadline passed
    ├── ReplicaLostError          the target replica that ran the request is gone
    │   └── RouterStoppingError   the router is being stopped; another one can go on
    ├── MalformedProposalError    a drafter sent something that is not a proposal
    ├── TrainingDivergedError     a training run whose loss or gradient is no number any more
    └── ClusterStateError         a command that needs (or must not find) a running cluster

``cluster.rpc.status`` maps them to gRPC status codes; ``cluster.cli`` maps them to exit codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class DsparkError(Exception):
    """Base class; ``str(error)`` is always fit to be shown to a user."""


class ConfigError(DsparkError):
    """A configuration value is missing, unknown or out of range.

    Args:
        key: dotted path of the value, e.g. ``target.tensor_parallel_size``.
        message: what is wrong with it.
        known_keys: where given and ``key`` is unknown, the nearest of them is suggested.
    """

    def __init__(self, key: str, message: str, known_keys: Iterable[str] = ()) -> None:
        self.key = key
        self.message = message
        nearest = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(known_keys), n=1)
        self.suggestion = nearest[0] if nearest else None
        hint = f" (did you mean '{self.suggestion}'?)" if self.suggestion else ""
        super().__init__(f"{key}: {message}{hint}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_config_error, (self.key, self.message, self.suggestion))


def _rebuild_config_error(key: str, message: str, suggestion: str | None) -> ConfigError:
    error = ConfigError(key, message)
    if suggestion is not None:
        error.suggestion = suggestion
        error.args = (f"{key}: {message} (did you mean '{suggestion}'?)",)
    return error


class CheckpointError(DsparkError):
    """A checkpoint cannot be used.

    Args:
        file: path of the offending file or folder.
        key: configuration key or tensor name inside it, or ``None`` for the file itself.
        message: what is wrong.
    """

    def __init__(self, file: str, key: str | None, message: str) -> None:
        self.file = str(file)
        self.key = key
        self.message = message
        where = self.file if key is None else f"{self.file}: {key}"
        super().__init__(f"{where}: {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (CheckpointError, (self.file, self.key, self.message))


class DataError(DsparkError):
    """A data file cannot be used.

    Args:
        file: path of the file.
        line: number of the offending line, from 1, or ``None`` for the file itself.
        message: what is wrong.
    """

    def __init__(self, file: str, line: int | None, message: str) -> None:
        self.file = str(file)
        self.line = line
        self.message = message
        where = self.file if line is None else f"{self.file}:{line}"
        super().__init__(f"{where}: {message}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (DataError, (self.file, self.line, self.message))


class InvalidRequestError(DsparkError):
    """A request's field has a value that cannot be served.

    Args:
        field: the field's name as the client wrote it, e.g. ``sampling.temperature``; empty: it is
            no single field.
        message: what is wrong with it.
    """

    def __init__(self, field: str, message: str) -> None:
        self.field = field
        self.message = message
        super().__init__(f"{field}: {message}" if field else message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (InvalidRequestError, (self.field, self.message))


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that is not served here."""


class ContextLengthError(InvalidRequestError):
    """The prompt leaves no room for an output in the model's context."""


class QueueFullError(DsparkError):
    """The queue is full; try again after ``retry_after_s`` seconds."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.message = message
        self.retry_after_s = retry_after_s
        super().__init__(message)

    def __reduce__(self) -> tuple[Any, ...]:
        return (QueueFullError, (self.message, self.retry_after_s))


class UnauthenticatedError(DsparkError):
    """The call carries no API key, or none that is known; never quotes what it carried."""


class PermissionDeniedError(DsparkError):
    """Who calls is known, and may not do this."""


class RequestCancelledError(DsparkError):
    """The client cancelled the request."""


class DeadlineExceededError(DsparkError):
    """The request's deadline passed before it finished."""


class ReplicaLostError(DsparkError):
    """The target replica that ran the request is gone; the request can be replayed elsewhere."""


class RouterStoppingError(ReplicaLostError):
    """The router is being stopped; another one goes on behind the tokens that were received."""


class MalformedProposalError(DsparkError):
    """A drafter's proposal breaks the protocol (wrong length, NaN, unknown ids, ...)."""


class TrainingDivergedError(DsparkError):
    """A training run's loss or gradient is no number any more; what was saved before is intact."""


class ClusterStateError(DsparkError):
    """The command needs a running cluster and there is none, or the other way round."""


class RayStartError(ClusterStateError):
    """Ray's own node did not start in the time that Ray gives it."""

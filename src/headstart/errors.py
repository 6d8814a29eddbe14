"""The error tree: every error a user can cause or must know about.

Each message says what is wrong, the value that was found, and what to do. The command line prints the message and
exits with `exit_code`; nothing else is printed for these errors.
"""

import errno
import sys

_NO_MEMORY = (
    "n't allocate mem",
    "annot allocate mem",
    "failed to map seg",
    "bad_alloc",
    "new thread",
    "create a primitive",
)


class HeadstartError(Exception):
    """Base of all errors raised on purpose by Headstart. With `remedy` the message is `problem; remedy`."""

    exit_code = 1
    everywhere = False
    """Whether every rank raises it, so that the first one says it for all."""

    def __init__(self, problem: str = "", remedy: str | None = None) -> None:
        super().__init__(problem if remedy is None else f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


class ConfigError(HeadstartError):
    """A configuration key or value is wrong. The message lists every problem found, not only the first."""

    exit_code = 2


class DataError(HeadstartError):
    """A prompt or task file is missing, empty or malformed. The message names file, line and field."""


class ModelError(HeadstartError):
    """A checkpoint cannot be loaded, or does not do what a causal language model must do here."""


class VocabularyError(ModelError):
    """Student and teacher do not share a tokenisation, so position-wise divergences would be meaningless."""


class TemplateError(HeadstartError):
    """A chat template is missing or refuses the messages it was given."""


class SandboxError(HeadstartError):
    """No sandbox works on this machine, so untrusted code must not be run."""


class RunFolderError(HeadstartError):
    """The run folder exists already, cannot be written, or holds nothing that can be resumed."""


class CheckpointError(RunFolderError):
    """A checkpoint is damaged or belongs to another configuration."""


class MemoryBudgetError(HeadstartError):
    """Not even one rollout fits into memory. Raised before the optimizer steps."""


class NonFiniteError(HeadstartError):
    """A loss or gradient is not finite. Raised before the optimizer steps, so the last checkpoint is untouched."""


class Interrupted(HeadstartError):
    """The run was stopped by a signal after a checkpoint was written.

    `signal_number` is 2 (SIGINT) or 15 (SIGTERM); the process exits with 128 + that number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number


class LostRankError(HeadstartError):
    """Another rank of the run has ended while this one waited for it."""


class ServerError(HeadstartError):
    """A model server failed, refused a request, or answered what cannot be used. Raised before the weights change, so
    the last checkpoint is intact. `status` is the HTTP status where there was one."""

    def __init__(self, problem: str = "", remedy: str | None = None, *, status: int | None = None) -> None:
        super().__init__(problem, remedy)
        self.status = status


class StopRequested(BaseException):
    """A signal asks to stop: raised where work may be cut, on every rank. `args` holds the signal's number.

    No HeadstartError, so that nothing on the way up takes it for a failure of its own.
    """


def out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it was raised from, says that memory ran out. Python, numpy, torch, safetensors and the
    loader of shared libraries each say it in their own way."""
    while error is not None:
        lacking = isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM
        if lacking or type(error).__name__ == "OutOfMemoryError" or any(text in str(error) for text in _NO_MEMORY):
            return True
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return False


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def install_command(package: str) -> str:
    """What adds a package to this very environment; Headstart's own extras can be named only from its source."""
    return f"install it with {sys.executable} -m pip install {package}"

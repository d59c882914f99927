"""Errors that are answered with one line: a mistake of the user's, and what went wrong around a run."""


class UserError(Exception):
    """A mistake of the user's: one line that names the key, file or tensor, what was found, and the remedy.

    The command line prints the message without a traceback and ends with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class RunError(Exception):
    """What stopped a run without being a mistake of the user's: a stream that breaks, a rank that died, a held lock.

    One line that says what happened, what was kept and how to go on. The command line prints it without a traceback
    and ends with exit code 1.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

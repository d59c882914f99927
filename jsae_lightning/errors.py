"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """A mistake of the user's: one line that names the key, file or tensor, what was found, and the remedy.

    The command line prints the message without a traceback and ends with exit code 2.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

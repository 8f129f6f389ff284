"""What a user can fix, said in three clauses: what was expected, what arrived, what to do.

Everything else (a broken invariant of ours) is an ``assert`` and keeps its traceback. The command
line prints an ``EmmechError`` as one paragraph and exits with code 2.
"""


class EmmechError(Exception):
    """An error the user can fix.

    Example:
        >>> print(LoadError("a chat template", "'gpt2' has none", "Use a chat model"))
        expected a chat template, but 'gpt2' has none. Use a chat model.
    """

    def __init__(self, expected: str, got: str, fix: str):
        self.expected, self.got, self.fix = expected, got, fix.rstrip(".")
        super().__init__(f"expected {self.expected}, but {self.got}. {self.fix}.")

    def __reduce__(self) -> tuple[type["EmmechError"], tuple[str, str, str]]:
        return type(self), (self.expected, self.got, self.fix)  # so that it crosses processes


class LoadError(EmmechError):
    """A model, adapter or pair that cannot be loaded or does not fit together."""


class ChatError(EmmechError):
    """A chat that cannot be rendered or split into prefix, query and postfix."""


class PatchError(EmmechError):
    """An intervention that this model or these prompts do not allow."""


class DataError(EmmechError):
    """A question or chat file that cannot be read as one."""


class RunError(EmmechError):
    """A run folder that cannot be written or belongs to other arguments."""

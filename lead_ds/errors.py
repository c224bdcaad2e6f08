"""The two ways a command can fail, and nothing else: the input was wrong (status 2), or the work failed (status 1)."""

from __future__ import annotations


class LeadError(Exception):
    """An error that is reported to the user in one line: `error: WHERE: WHAT (REMEDY)`."""

    status = 1

    def __init__(self, where: object, what: str, remedy: str = "") -> None:
        self.where, self.what, self.remedy = str(where), what, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" + (f" ({self.remedy})" if self.remedy else "")
        line = " ".join(line.split())
        # What others' files hold must not steer a terminal.
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # Data-loader workers send exceptions between processes; the default would call __init__ with one argument.
        return type(self), (self.where, self.what, self.remedy)


class InputError(LeadError):
    """What the user gave cannot be used: a file, an id, a configuration key. Exit status 2."""

    status = 2


class RunError(LeadError):
    """The input was fine, the work failed: a full disk, a NaN loss, a dead rank. Exit status 1."""

"""The one exception family. Floor 0: imports nothing of ours.

A message is lower-case, names the thing in backticks, says expected and got, and then the way out.
The command line prints the three parts on three lines and exits with `exit_code`.
"""


class EdgeMoeError(Exception):
    """What went wrong, why, and what to do next; each a short sentence without a full stop."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", next_step: str = "") -> None:
        super().__init__("; ".join(part for part in (what, why, next_step) if part))
        self.what, self.why, self.next_step = what, why, next_step


class UsageError(EdgeMoeError):
    """An option or argument that cannot be meant."""

    exit_code = 2


class ContextError(UsageError):
    """A prompt with more tokens than the KV cache holds."""


class BudgetError(EdgeMoeError):
    """The memory budget is below the floor, or the disk is too small."""

    exit_code = 3


class NotFoundError(EdgeMoeError):
    """A path that is not there."""

    exit_code = 4


class FormatError(EdgeMoeError):
    """A store that breaks the format, or comes from a newer version of it."""


class RecordError(EdgeMoeError):
    """An expert record that could not be read or does not match its checksum."""

    def __init__(self, layer: int, expert: int, why: str, next_step: str = "") -> None:
        super().__init__(
            f"expert record `layers.{layer}.experts.{expert}` is unusable", why, next_step
        )
        self.layer, self.expert = layer, expert


class CheckpointError(EdgeMoeError):
    """A Hugging Face checkpoint that is damaged or incomplete."""


class UnsupportedModelError(EdgeMoeError):
    """An architecture or an option of one that edgemoe does not run."""


class TemplateError(EdgeMoeError):
    """A chat template that is missing, wrong, or over its limits."""

"""Text to calibrate on where none is given: what every Python installation brings along. No torch.

English prose (the language reference) and code (modules of the library). It stands in for text of
the kind that a model will read, which is always better.
"""

from importlib import import_module
from inspect import getsource

_MODULES = ("argparse", "calendar", "csv", "email.message", "fractions", "heapq", "json.decoder")
_MODULES += ("logging", "random", "shutil", "statistics", "textwrap", "zipfile")


def standard_texts() -> list[str]:
    """Prose and code, about 200,000 tokens each."""
    from pydoc_data.topics import topics

    prose = "\n\n".join(topics[name] for name in sorted(topics))
    code = "\n\n".join(getsource(import_module(name)) for name in _MODULES)
    return [prose, code]

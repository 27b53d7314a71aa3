"""Says which edgemoe is tested: where it was imported from and what computes."""

import os
import signal

import pytest

import edgemoe
from edgemoe.runtime import core

# Hits must not depend on an earlier test, nor tests write into the user's folders.
os.environ["EDGEMOE_WARM_START"] = "off"

# A background job of a shell ignores SIGINT, and so would its children: no test of Ctrl-C works
# there. A handler is not inherited: children begin with the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_report_header(config: pytest.Config) -> list[str]:
    isa = core.lib.em_isa().decode() if core.lib else "-"
    return [
        f"edgemoe: {edgemoe.__version__} from {edgemoe.__file__}",
        f"core: backend {core.BACKEND}, isa {isa}, library {core.library_path}",
    ]

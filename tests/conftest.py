"""Says which edgemoe is tested: where it was imported from and what computes."""

import os

import pytest

import edgemoe
from edgemoe.runtime import core

# Hits must not depend on an earlier test, nor tests write into the user's folders.
os.environ["EDGEMOE_WARM_START"] = "off"


def pytest_report_header(config: pytest.Config) -> list[str]:
    isa = core.lib.em_isa().decode() if core.lib else "-"
    return [
        f"edgemoe: {edgemoe.__version__} from {edgemoe.__file__}",
        f"core: backend {core.BACKEND}, isa {isa}, library {core.library_path}",
    ]

"""For students: what went wrong stands above the traceback."""

import pytest
from lesson import Lesson


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo and call.excinfo.errisinstance((Lesson, NotImplementedError)):
        report.longrepr = f"{call.excinfo.typename}: {call.excinfo.value}\n\n{report.longreprtext}"
    return report

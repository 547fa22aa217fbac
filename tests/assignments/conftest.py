"""For students: what went wrong stands above the traceback."""

import pytest
from lesson import Lesson

FAILED = pytest.StashKey[list]()  # names of tests that failed so far


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.when == "call":
        text = f"{call.excinfo.typename}: {call.excinfo.value}"
        if not call.excinfo.errisinstance((Lesson, NotImplementedError)):  # the last line that is not PyTorch's
            own = [entry for entry in call.excinfo.traceback if item.config.rootpath in entry.path.parents
                   and "site-packages" not in entry.path.parts]
            text += "".join(f"\n  in {entry.path}, line {entry.lineno + 1}: {entry.statement}" for entry in own[-1:])
        failed = item.session.stash.setdefault(FAILED, [])
        if failed:
            text += f"\n\n  {failed[0]} fails too and comes first: mend that one before you look at this."
        report.longrepr = f"{text}\n\n{report.longreprtext}"
        failed.append(item.name)
    return report

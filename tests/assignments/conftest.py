"""For students: what went wrong stands above the traceback."""

import pytest
from lesson import Lesson

FAILED = pytest.StashKey[list]()  # names of tests that failed so far


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.when == "call":
        text = f"{call.excinfo.typename}: {call.excinfo.value}"
        trace = report.longreprtext
        if call.excinfo.errisinstance(Lesson):
            trace = "\n".join(
                line for line in trace.split("\n") if not line.startswith("E ")
            )  # the same once more
        elif not call.excinfo.errisinstance(
            NotImplementedError
        ):  # the last lines that are not PyTorch's
            own = [
                entry
                for entry in call.excinfo.traceback
                if item.config.rootpath in entry.path.parents
                and "site-packages" not in entry.path.parts
            ]
            lines = [
                f"{entry.path}, line {entry.lineno + 1}: {entry.statement}" for entry in own[-2:]
            ]
            text += "".join(
                f"\n  {line}" for line in (*getattr(call.excinfo.value, "__notes__", ()), *lines)
            )
        failed = item.session.stash.setdefault(FAILED, [])
        if failed:
            text += f"\n\n  {failed[0]} fails too and comes first: it may be the cause."
        report.longrepr = f"{text}\n\n{trace}"
        failed.append(item.name)
    return report

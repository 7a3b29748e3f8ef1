"""A plugin of pytest, `-p tests.at_once`: why a test failed is printed when it does, not when all are done.

So a run that is cut short says what it found. Where tests run side by side (pytest-xdist) too. And a process in which a
test left the GPU unable to answer runs no more tests, which would all fail: pytest-xdist starts another one.
"""

import os
import sys

import pytest


def pytest_configure(config) -> None:
    config.pluginmanager.register(AtOnce(config), "at-once")


class AtOnce:
    def __init__(self, config):
        self.config, self.failed = config, False
        self.is_worker = hasattr(config, "workerinput")  # of pytest-xdist: it runs tests, and prints nothing

    def say(self, report, name: str) -> None:
        self.failed = True
        if not self.is_worker:
            reporter = self.config.pluginmanager.get_plugin("terminalreporter")
            reporter.ensure_newline()
            reporter.section(f"{name} failed", "_")
            report.toterminal(reporter._tw)
            reporter.flush()

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.say(report, f"{report.nodeid} ({report.when})" if report.when != "call" else report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.say(report, report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        if self.config.pluginmanager.hasplugin("dsession"):
            return  # workers of pytest-xdist run the tests, not this process
        failed, self.failed = self.failed, False
        if failed and not answers():
            if self.is_worker:
                os._exit(3)  # before this test counts as done: it is the one that is said to have crashed
            pytest.exit("the GPU no longer answers", 3)

    def pytest_sessionfinish(self) -> None:
        self.config.option.tbstyle = "no"  # they were printed


def answers() -> bool:
    """Whether the GPU still computes for this process; true where none was asked."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True

"""Counts what was rejected, and prints it at the end of the run."""

import pytest

COUNTED = {"wrong": {}, "mutants": {}, "equivalent": {}}  # (exercise, answer) -> was it rejected?


@pytest.fixture(scope="session")
def kill_rate():
    return COUNTED


def pytest_terminal_summary(terminalreporter):
    if COUNTED["wrong"] or COUNTED["mutants"]:
        wrong, mutants = (f"{sum(COUNTED[key].values())} of {len(COUNTED[key])}" for key in ("wrong", "mutants"))
        exercises = len({id for id, _ in [*COUNTED["wrong"], *COUNTED["mutants"]]})
        terminalreporter.write_line(
            f"rejected: {wrong} wrong answers and {mutants} mutants in {exercises} exercises "
            f"({len(COUNTED['equivalent'])} more mutants are equivalent to the reference, each with a reason)"
        )

"""Counts of the hostile cases by group, at the end of a run."""

import collections


def pytest_terminal_summary(terminalreporter):
  counts = collections.Counter()
  for outcome in ("passed", "failed", "error"):
    for report in terminalreporter.stats.get(outcome, ()):
      file, _, test = report.nodeid.partition("::")
      if (
        file.endswith("tests/hostile/test_bad_inputs.py")
        and "[" in test
        and (report.when == "call" or outcome == "error")
      ):
        counts[test.partition("[")[2].partition(": ")[0]] += 1
  if counts:
    terminalreporter.section("bad inputs")
    terminalreporter.line(f"{sum(counts.values())} cases: " + ", ".join(f"{n} {group}" for group, n in counts.items()))

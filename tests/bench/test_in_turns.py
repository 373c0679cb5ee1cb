#!/usr/bin/env python3
"""test_in_turns.py IN_TURNS.py: that measured programs run one at a time, there and back, and what comes of failures."""

import json
import os
import subprocess
import sys
import tempfile

# name, turns, what to do after them: notes its name in the log in each turn, twice, so that an overlap would show.
PROGRAM = """
import os, sys, time
log, name, turns, end = sys.argv[1:]
for i in range(int(turns)):
    print("turn", flush=True)
    sys.stdin.readline()
    for part in range(2):
        with open(log, "a") as f:
            f.write(name)
        time.sleep(0.02)
if end == "fail":
    sys.exit("it broke")
if end == "hang":
    time.sleep(600)
print('{"program":"%s","tokens_per_second":%s}' % (name, turns))
"""


def run(folder, programs, *options):
    log, lines = os.path.join(folder, "log"), os.path.join(folder, "lines")
    for path in (log, lines):
        open(path, "w", encoding="utf-8").close()
    command = [sys.executable, sys.argv[1], "--part", "train", "--lines", lines, *options]
    for label, *rest in programs:
        command += ["--run", label, *(rest if len(rest) == 1 else [sys.executable, "-c", PROGRAM, log, *rest])]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=120)
    with open(log, encoding="utf-8") as order, open(lines, encoding="utf-8") as found:
        return order.read(), [json.loads(line) for line in found]


def main():
    with tempfile.TemporaryDirectory() as folder:
        order, lines = run(folder, [("one", "a", "3", ""), ("two", "b", "2", ""), ("three", "c", "3", "")])
        assert order == "aabbcc" "ccbbaa" "aacc", order
        assert [line["label"] for line in lines] == ["one", "two", "three"], lines
        assert [line["tokens_per_second"] for line in lines] == [3, 2, 3], lines
        assert all(line["part"] == "train" for line in lines), lines

        order, lines = run(folder, [("broken", "a", "1", "fail"), ("none", "/no/such/program"), ("good", "b", "2", ""),
                                    ("stuck", "c", "1", "hang")], "--limit", "5")
        assert order == "aabbcc" "bb", order
        errors = {line["label"]: line.get("error") for line in lines}
        assert errors["broken"] == "status 1: it broke", errors
        assert errors["none"].startswith("status 127: "), errors
        assert errors["good"] is None, errors
        assert errors["stuck"].startswith("status 124: no turn in 5"), errors

        # without turns: to its end; and one that says nothing
        order, lines = run(folder, [("whole", "a", "0", ""), ("silent", "/bin/true")])
        assert order == "" and lines[0]["tokens_per_second"] == 0, (order, lines)
        assert lines[1] == {"part": "train", "label": "silent", "error": "status 0"}, lines

    refused = subprocess.run([sys.executable, sys.argv[1], "--part", "train", "--run", "label"], capture_output=True)
    assert refused.returncode == 2, refused


if __name__ == "__main__":
    main()

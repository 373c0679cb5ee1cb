#!/usr/bin/env python3
"""Runs programs that were given --turns one at a time, a measurement of each in turn, so that a machine whose speed
wanders treats all of them alike. Standard library only.

    in_turns.py --part PART --lines LINES.jsonl [--log FILE] [--limit SECONDS] --run LABEL COMMAND... [--run ...]

A program says "turn" on a line of its standard output before each thing that it times, and waits for a line on its
standard input; between its turns it must use no CPU. In each round every program that still runs gets one turn, in the
order of the command line and in the next round the other way round; one with fewer measurements ends earlier. A
program's last line that is a JSON object is appended to LINES.jsonl with its part and label (bench/cpu_table.py), or why
there is none: it failed, or a turn took longer than the limit (600 s). A program without --turns is run to its end.
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading


class Program:
    def __init__(self, label, command, limit):
        self.label, self.limit, self.lines, self.turns = label, limit, [], queue.Queue()
        self.errors = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        self.status = None
        try:
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
                                            text=True, encoding="utf-8", errors="replace")
        except OSError as error:
            self.errors.write(str(error))
            self.status = 127
            return
        threading.Thread(target=self.read, daemon=True).start()
        self.await_turn()

    def read(self):
        for line in self.process.stdout:
            if line.strip() == "turn":
                self.turns.put(True)
            else:
                self.lines.append(line)
        self.turns.put(False)

    def await_turn(self):
        """Returns when the program waits for its next turn, or has ended: self.status is set then."""
        try:
            if self.turns.get(timeout=self.limit):
                return
            self.status = self.process.wait(timeout=self.limit)
        except (queue.Empty, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
            self.errors.write(f"\nno turn in {self.limit} s\n")
            self.status = 124

    def line(self, part, errors):
        """What LINES.jsonl gets; errors: the lines of its standard error."""
        line = {"part": part, "label": self.label}
        texts = [t for t in self.lines if t.startswith("{")]
        if self.status == 0 and texts:
            line.update(json.loads(texts[-1]))
        else:
            reasons = [t.strip() for t in errors if t.strip()]
            line["error"] = f"status {self.status}" + (": " + reasons[-1][:200] if reasons else "")
        return line

    def turn(self):
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the wait says how
        self.await_turn()


def parse(args):
    options, runs = {"--limit": "600", "--log": "/dev/null"}, []
    while args and args[0] != "--run":
        if len(args) < 2 or args[0] not in ("--part", "--lines", "--log", "--limit"):
            return None
        options[args[0]] = args[1]
        args = args[2:]
    for arg in args:
        if arg == "--run":
            runs.append([])
        else:
            runs[-1].append(arg)
    if "--part" not in options or "--lines" not in options or not runs or any(len(run) < 2 for run in runs):
        return None
    return options, runs


def main(args):
    parsed = parse(args)
    if parsed is None:
        print(__doc__, file=sys.stderr)
        return 2
    options, runs = parsed
    programs = [Program(label, command, float(options["--limit"])) for label, *command in runs]
    order = list(programs)
    while any(p.status is None for p in order):
        for p in order:
            if p.status is None:
                p.turn()
        order.reverse()
    with open(options["--lines"], "a", encoding="utf-8") as lines, open(options["--log"], "a", encoding="utf-8") as log:
        for p in programs:
            p.errors.seek(0)
            errors = p.errors.readlines()
            log.write("".join([f"{p.label}: status {p.status}\n", *p.lines, *errors]))
            line = p.line(options["--part"], errors)
            lines.write(json.dumps(line, separators=(",", ":")) + "\n")
            print(f"{p.label}: {line.get('error', 'done')}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A measured program's side of bench/in_turns.py: with --turns it says "turn" before each thing that it times, and waits."""

import sys


def add_option(parser):
    parser.add_argument("--turns", action="store_true", help="say 'turn' and wait for a line before each measurement")


def wait(args):
    if args.turns:
        print("turn", flush=True)
        if not sys.stdin.readline():
            sys.exit("--turns: nobody gives turns on standard input")

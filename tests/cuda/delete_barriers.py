#!/usr/bin/env python3
"""Deletes each barrier of the CUDA kernels in turn and demands that a test notices.

Every block_sync(), warp_sync(), async_wait<N>(), proxy_fence() and wgmma_fence, wgmma_commit and wgmma_wait of
kernels/cuda/*.cu and *.h is built into one program such that DELETED_BARRIER=n in the environment makes the n-th do
nothing. The file's test then runs under the shim in four orders of the threads until one run fails: a wrong result, an
abort, a crash or no end. A barrier whose deletion no run notices must stand in redundant_barriers.txt with a reason:

    FILE FUNCTION N  reason ...        N: the how-manieth barrier of that function of that file, from 1

Exits with 1 if a deletion goes unnoticed without being listed, or a listed one is noticed or does not exist.

    tests/cuda/delete_barriers.py [--file attention_forward.cu] [--list] [--jobs 2]
"""
import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
ORDERS = ["forward", "reverse", "seed:1", "seed:2"]
BARRIER = re.compile(r"\b(block_sync|warp_sync|proxy_fence|wgmma_commit)\(\)|\bwgmma_fence\([^()]*\)|"
                     r"\b(async|wgmma)_wait<[^<>;]*>\([^()]*\)")
C_SOURCES = [
    "base/error.c",
    *(f"kernels/cpu/{name}.c"
      for name in ["tensor", "pool", "dispatch", "scratch", "clip", "reference", "reference_attention"]),
]
SCALAR_ONLY = [f"-Dkernel_ops_{isa}=kernel_ops_scalar" for isa in ["avx2", "avx512", "avx512_vnni", "avx512_bf16"]]
CARD_ONLY = re.compile(r"\bcuda[A-Z]\w+\(|\bcublas")
TESTS = {}  # where a file's test is not test_FILE.cu, or not only: {"a.cu": ["test_b"]}
TEST_C_SOURCES = ["tests/privacy/noise_reference.c"]


class Barrier:
    def __init__(self, file, function, nth, line, text):
        self.file, self.function, self.nth, self.line, self.text = file, function, nth, line, text
        self.number = None
        self.users, self.tests = [], []
        self.verdict, self.seconds = "", 0.0

    @property
    def key(self):
        return (self.file, self.function, self.nth)


def without_comments(text):
    """The same length, comments and strings blank."""
    pattern = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\\n])*"', re.S)
    return pattern.sub(lambda m: re.sub(r"[^\n]", " ", m[0]), text)


def function_at(code, position):
    """The name of the function whose body holds the position: definitions open with a brace in the first column."""
    opening = code.rfind("\n{", 0, position)
    if opening < 0:
        return "?"
    start = max(code.rfind("\n}", 0, opening), code.rfind(";", 0, opening), code.rfind("\n\n", 0, opening), 0)
    head = re.sub(r"LAUNCH_BOUNDS\([^()]*(\([^()]*\)[^()]*)*\)|template\s*<[^{}]*?>\s*(?=[A-Z])", " ",
                  code[start:opening])
    found = re.search(r"(\w+)\s*\(", head)
    return found[1] if found else "?"


def find_barriers(path):
    code = without_comments(path.read_text())
    seen = {}
    result = []
    for match in BARRIER.finditer(code):
        function = function_at(code, match.start())
        seen[function] = seen.get(function, 0) + 1
        barrier = Barrier(path.name, function, seen[function], code.count("\n", 0, match.start()) + 1, match[0])
        barrier.span = match.span()
        result.append(barrier)
    return result


def switchable(text, barriers):
    """The file's text with each barrier behind a switch."""
    for barrier in reversed(barriers):
        first, last = barrier.span
        text = text[:first] + f"(deleted_barrier == {barrier.number} ? (void)0 : {barrier.text})" + text[last:]
    return text


def includes(path, files):
    """The files among `files` that path includes, through others too."""
    found, todo = set(), [path]
    while todo:
        for name in re.findall(r'#include\s*"kernels/cuda/([\w.]+)"', todo.pop().read_text()):
            if name in files and name not in found:
                found.add(name)
                todo.append(files[name])
    return found


def read_redundant(path):
    listed = {}
    if path.exists():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            fields = line.split(None, 3)
            if len(fields) != 4 or not fields[2].isdigit():
                sys.exit(f"{path.name}:{number}: wants FILE FUNCTION N reason")
            listed[(fields[0], fields[1], int(fields[2]))] = fields[3]
    return listed


def tests_of(name, available):
    """Names of test programs of a .cu file: test_a_b.cu or else test_a.cu for a_b.cu."""
    if name in TESTS:
        return TESTS[name]
    stem = name[: -len(".cu")]
    while stem:
        if f"test_{stem}" in available:
            return [f"test_{stem}"]
        stem = stem.rpartition("_")[0]
    return []


def command(*words):
    done = subprocess.run([str(w) for w in words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True)
    if done.returncode != 0:
        raise RuntimeError(" ".join(str(w) for w in words) + "\n" + done.stdout)


def run_test(program, order, number, timeout):
    """(whether it failed, seconds)"""
    environment = dict(os.environ, CONSILIUM_SHIM_ORDER=order, DELETED_BARRIER=str(number), ASAN_OPTIONS="")
    begin = time.monotonic()
    try:
        done = subprocess.run([str(program)], cwd=ROOT, env=environment, timeout=timeout, stdin=subprocess.DEVNULL,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        failed = done.returncode != 0
    except subprocess.TimeoutExpired:
        failed = True
    return failed, time.monotonic() - begin


def build(build_folder, pool, options, cu_files, headers, barriers, tests, first):
    """The programs by test name, each built once. Of the kernels' files those of `first`, the rest if needed."""
    overlay, objects = build_folder / "overlay", build_folder / "objects"
    objects.mkdir()
    for folder in ["kernels/cuda", "tests/cuda"]:
        (overlay / folder).mkdir(parents=True)
    for name, path in list(cu_files.items()) + list(headers.items()):
        own = [b for b in barriers if b.file == name]
        (overlay / "kernels/cuda" / name).write_text(switchable(path.read_text(), own))
    # The first failed check is enough.
    for path in [ROOT / "tests/check.h", *(ROOT / "tests/cuda").glob("*.h"), *(ROOT / "tests/cuda").glob("*.cu")]:
        text = path.read_text().replace("check_failures++;", "_Exit(1);")
        (overlay / path.relative_to(ROOT)).write_text(text)
    (build_folder / "deleted.h").write_text("extern int deleted_barrier;\n")
    (build_folder / "deleted.cpp").write_text(
        '#include <stdlib.h>\nextern int deleted_barrier;\n'
        'int deleted_barrier = getenv("DELETED_BARRIER") ? (int)strtol(getenv("DELETED_BARRIER"), NULL, 10) : -1;\n')

    include = ["-I", overlay, "-I", ROOT]
    kernel = [options.cxx, "-std=c++17", "-x", "c++", "-DCUDA_SHIM", "-O1", "-w", "-fno-strict-aliasing",
              "-ffp-contract=off", "-include", build_folder / "deleted.h", *include]
    library = build_folder / "all.a"

    def compile_all(jobs):
        for done in [pool.submit(command, *job) for job in jobs]:
            done.result()
        command("ar", "rcs", library, *sorted(objects.glob("*.o")))

    def kernel_jobs(names):
        return [[*kernel, "-c", overlay / "kernels/cuda" / n, "-o", objects / f"{n}.o"] for n in sorted(names)]

    jobs = kernel_jobs(first)
    for test in tests:
        jobs.append([*kernel, "-c", overlay / "tests/cuda" / f"{test}.cu", "-o", build_folder / f"{test}.o"])
    for path in [*sorted((ROOT / "kernels/cuda/shim").glob("*.cpp")), build_folder / "deleted.cpp"]:
        jobs.append([options.cxx, "-std=c++17", "-DCUDA_SHIM", "-O2", "-w", *include, "-c", path, "-o",
                     objects / f"{path.stem}.o"])
    for source in C_SOURCES + TEST_C_SOURCES:
        jobs.append([options.cc, "-std=gnu11", "-O2", "-w", "-ffp-contract=off", *SCALAR_ONLY, "-I", ROOT, "-c",
                     ROOT / source, "-o", objects / (source.replace("/", "_") + ".o")])
    compile_all(jobs)
    rest = set(cu_files) - set(first)
    programs = {}
    for test in tests:
        link = [options.cxx, build_folder / f"{test}.o", library, "-lpthread", "-lm", "-o", build_folder / test]
        try:
            command(*link)
        except RuntimeError:
            if not rest:
                raise
            compile_all(kernel_jobs(rest))
            rest = set()
            command(*link)
        programs[test] = build_folder / test
    return programs


def judge(barrier, programs, timeouts):
    begin = time.monotonic()
    for order in ORDERS:
        for test in barrier.tests:
            failed, _ = run_test(programs[test], order, barrier.number, timeouts[test])
            if failed:
                barrier.verdict, barrier.seconds = order, time.monotonic() - begin
                return
    barrier.seconds = time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", action="append", default=[], help="only the barriers of this file of kernels/cuda")
    parser.add_argument("--list", action="store_true", help="print the barriers and their tests, and stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", action="store_true", help="leave the build's folder behind")
    parser.add_argument("--cxx", default=os.environ.get("CXX", "g++"))
    parser.add_argument("--cc", default=os.environ.get("CC", "gcc"))
    options = parser.parse_args()

    folder = ROOT / "kernels/cuda"
    headers = {p.name: p for p in sorted(folder.glob("*.h")) if p.name != "cuda.h"}
    cu_files = {p.name: p for p in sorted(folder.glob("*.cu")) if not CARD_ONLY.search(p.read_text())}
    available = {p.stem for p in (ROOT / "tests/cuda").glob("test_*.cu")}
    for name in options.file:
        if name not in headers and name not in cu_files:
            sys.exit(f"kernels/cuda/{name}: no such file that the shim takes")

    barriers = []
    for name, path in list(cu_files.items()) + list(headers.items()):
        if options.file and name not in options.file:
            continue
        users = [name] if name in cu_files else [c for c in cu_files if name in includes(cu_files[c], headers)]
        for barrier in find_barriers(path):
            barrier.number = len(barriers)
            barrier.users = users
            barrier.tests = sorted({t for user in users for t in tests_of(user, available)})
            barriers.append(barrier)

    if options.list:
        for b in barriers:
            print(f"{b.file}:{b.line}  {b.function} {b.nth}  {b.text}  {' '.join(b.tests) or 'NO TEST'}")
        return 0
    if not barriers:
        print("no barriers")
        return 0
    untested = sorted({b.file for b in barriers if not b.tests})
    if untested:
        sys.exit(f"no test in tests/cuda for {', '.join(untested)}")

    tests = sorted({t for b in barriers for t in b.tests})
    first = {u for b in barriers for u in b.users}
    build_folder = pathlib.Path(tempfile.mkdtemp(prefix="delete_barriers."))
    begin = time.monotonic()
    try:
        with concurrent.futures.ThreadPoolExecutor(max(1, options.jobs)) as pool:
            programs = build(build_folder, pool, options, cu_files, headers, barriers, tests, first)
            built = time.monotonic()
            timeouts = {}
            whole = {(t, o): pool.submit(run_test, programs[t], o, -1, 300) for t in tests for o in ORDERS}
            for (test, order), done in whole.items():
                failed, seconds = done.result()
                if failed:
                    sys.exit(f"{test} fails in order {order} with nothing deleted")
                timeouts[test] = max(timeouts.get(test, 0), 10 + 10 * seconds)
            for done in [pool.submit(judge, b, programs, timeouts) for b in barriers]:
                done.result()
    except RuntimeError as e:
        sys.exit(str(e))
    finally:
        if options.keep:
            print(build_folder)
        else:
            shutil.rmtree(build_folder, ignore_errors=True)

    listed = read_redundant(pathlib.Path(__file__).with_name("redundant_barriers.txt"))
    known = {b.key: b for b in barriers}
    bad = 0
    print(f"{'barrier':56} {'function':32} {'noticed in':12} seconds")
    for b in barriers:
        verdict = b.verdict
        if b.verdict and b.key in listed:
            verdict, bad = f"{b.verdict}, BUT LISTED AS REDUNDANT", bad + 1
        elif not b.verdict and b.key in listed:
            verdict = f"redundant: {listed[b.key]}"
        elif not b.verdict:
            verdict, bad = "NOT NOTICED", bad + 1
        where = f"{b.file}:{b.line} {b.text}"
        print(f"{where:56} {b.function + ' ' + str(b.nth):32} {verdict:12} {b.seconds:.1f}")
    for key in listed:
        if key not in known and (not options.file or key[0] in options.file):
            print(f"redundant_barriers.txt: there is no {key[0]} {key[1]} {key[2]}")
            bad += 1
    noticed = sum(1 for b in barriers if b.verdict)
    print(f"{len(barriers)} barriers, {noticed} noticed, {bad} wrong; built in {built - begin:.0f} s, "
          f"run in {time.monotonic() - built:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""One program of a model at a time in a process of its own, with limits, and as far from the rest as the system allows.

It contains clumsy programs, which is what models write; it is no wall against an attacker.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from forerun.types import UserError

JAIL = Path(__file__).with_name("jail.py")
GRACE_S = 30.0  # beyond a program's own timeout, until its launcher is given up
Mode = Literal["namespaces", "landlock", "guard"]
PROTECTIONS: dict[Mode, dict[str, str]] = {  # strongest first
    "namespaces": {
        "network": "none: a network namespace; other sockets, those of services in the file system too, refused by seccomp",
        "files": "read-only mounts; an empty tmpfs to work in",
        "processes": "a process namespace, which ends with the program; a limited number",
    },
    "landlock": {
        "network": "none: sockets refused by seccomp",
        "files": "writing outside the folder refused by Landlock; changing modes and times where Python's audit events see it",
        "processes": "refused where Python's audit events see it",
    },
    "guard": {
        "network": "refused where Python's audit events see it",
        "files": "writing outside the folder refused where Python's audit events see it",
        "processes": "refused where Python's audit events see it",
    },
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use; memory and open files count for each of its processes. Output goes nowhere, input is empty."""

    timeout_s: float = 3.0  # wall clock; the processor's time is limited to the next whole second plus one
    memory_mb: int = 512  # address space
    disk_mb: int = 64  # a file; in namespaces all files together
    processes: int = 16  # and threads, in namespaces; elsewhere processes are refused
    files: int = 64  # open at a time


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a program; `reason` is `passed`, `timed out` or `failed: ...`."""

    passed: bool
    reason: str
    seconds: float


class SandboxError(RuntimeError):
    """The sandbox itself did not come about, so that nothing is known of the program."""


UNTRIED = "failed: the sandbox did not come about: "
"""How the outcome of a program begins that was never run."""


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Runs programs within `limits`, protected by `mode`."""

    limits: Limits
    mode: Mode

    @property
    def protections(self) -> dict[str, str]:
        """In words, for a report: of the network, of files, of other processes."""
        return PROTECTIONS[self.mode]

    @classmethod
    def strongest(cls, limits: Limits) -> Sandbox:
        """With the strongest mode in which a harmless program passes here; raises UserError where there is none."""
        refusals = []
        patient = replace(limits, timeout_s=GRACE_S)
        for mode in PROTECTIONS:
            try:
                outcome = cls(patient, mode).run("import statistics\nopen('file', 'w').write('text')")
            except SandboxError as error:
                refusals.append(f"{mode}: {error}")
                continue
            if outcome.passed:
                return cls(limits, mode)
            refusals.append(f"{mode}: {outcome.reason}")
        raise UserError(
            f"no program can be run in a sandbox here ({'; '.join(refusals)}); is memory_mb={limits.memory_mb} enough?"
        )

    def run(self, program: str) -> Outcome:
        """Run Python source to its end, in an empty folder that is removed afterwards.

        It passes if it comes to its end without an exception; leaving earlier, by whatever exit status, is a failure.
        Raises SandboxError.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="forerun-", ignore_cleanup_errors=True) as folder:
                order = {"program": program, "folder": folder, "mode": self.mode, **asdict(self.limits)}
                told = self._launch(json.dumps(order).encode(), folder)
        except OSError as error:  # no more processes, or no room on the disk
            raise SandboxError(str(error)) from error
        if "error" in told:
            raise SandboxError(str(told["error"]))
        reason = str(told["reason"])
        return Outcome(reason == "passed", reason, float(str(told["seconds"])))

    def run_all(self, programs: Iterable[str], workers: int) -> Iterator[Outcome]:
        """Run many, `workers` at a time; outcomes in the order of the programs, one that could not be run being UNTRIED."""

        def tried(program: str) -> Outcome:
            try:
                return self.run(program)
            except SandboxError as error:
                return Outcome(False, f"{UNTRIED}{error}", 0.0)

        with ThreadPoolExecutor(workers) as pool:
            yield from pool.map(tried, programs)

    def _launch(self, order: bytes, folder: str) -> dict[str, object]:
        # -P: the launcher's own folder must not shadow the standard library. Bytecode is not written, so nothing stays behind.
        command = [sys.executable, "-P", "-s", "-B", str(JAIL)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            cwd=folder, env=environment(folder), start_new_session=True,
        ) as process:  # fmt: skip
            try:
                told, trouble = process.communicate(order, self.limits.timeout_s + GRACE_S)
            except subprocess.TimeoutExpired:
                return {"reason": "timed out", "seconds": self.limits.timeout_s + GRACE_S}
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        try:
            return dict(json.loads(told))
        except ValueError:
            last = trouble.decode(errors="replace").strip().splitlines()[-1:]
            return {"error": f"the launcher ended with status {process.returncode}: {' '.join(last)}"}


def environment(folder: str) -> dict[str, str]:
    """The whole environment of a program: nothing of ours but where libraries are; one thread, and sets in a fixed order."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH") if name in os.environ}
    return {
        **kept,
        "PATH": os.defpath,
        "HOME": folder,
        "TMPDIR": folder,
        "LC_ALL": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }

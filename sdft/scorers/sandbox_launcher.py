"""Gives up what a program does not need, then runs it: started by `sdft.scorers.sandbox`.

python -I sandbox_launcher.py PROGRAM SECONDS MEMORY_BYTES FILE_BYTES PROTECT_FILES

Not imported by anything; uses the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import runpy
import struct
import sys
from pathlib import Path

REFUSED = 97  # the same as in sandbox.py
LIBC = ctypes.CDLL(None, use_errno=True)

# By architecture: its number for seccomp, `clone`, and the calls that a program does without. From
# the kernel's tables (arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h).
ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        56,
        (
            *(41, 425),  # socket, io_uring_setup
            *(57, 58, 112, 109),  # fork, vfork, setsid, setpgid
            *(62, 200, 234, 129, 297, 424, 434),  # kill, tkill, tgkill and their like
            *(
                101,
                311,
                272,
                308,
                165,
                321,
            ),  # ptrace, process_vm_writev, unshare, setns, mount, bpf
            *(76, 90, 91, 92, 93, 94, 260, 268, 452),  # truncate, chmod, chown: not Landlock's
            *(188, 189, 190, 197, 198, 199),  # setxattr, removexattr
        ),
    ),
    "aarch64": (
        0xC00000B7,
        220,
        (
            *(198, 425),
            *(157, 154),
            *(129, 130, 131, 138, 240, 424, 434),
            *(117, 271, 97, 268, 40, 280),
            *(45, 52, 53, 54, 55, 452),
            *(5, 6, 7, 14, 15, 16),
        ),
    ),
}
CLONE3 = 435
CLONE_THREAD = 0x10000
EPERM, ENOSYS = 1, 38
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06


def call(name: str, *arguments: object) -> None:
    """Call a C function that returns a negative number on failure."""
    if getattr(LIBC, name)(*arguments) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")


def syscall_filter() -> bytes:
    """The seccomp program: no sockets, no new processes, no signals to others."""
    architecture, clone, denied = ARCHITECTURES[platform.machine()]
    code = [
        (LOAD, 0, 0, 4),  # the architecture
        (EQUAL, 1, 0, architecture),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, 0),  # the number of the call
        (AT_LEAST, 0, 1, 0x40000000),  # the x32 interface has the same calls under other numbers
        (RETURN, 0, 0, ERRNO | EPERM),
    ]
    for number in denied:
        code += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERRNO | EPERM)]
    code += [
        (EQUAL, 0, 1, CLONE3),  # its flags cannot be read: libc falls back to clone
        (RETURN, 0, 0, ERRNO | ENOSYS),
        (EQUAL, 0, 3, clone),
        (LOAD, 0, 0, 16),  # its flags: threads are welcome
        (ANY_BIT, 1, 0, CLONE_THREAD),
        (RETURN, 0, 0, ERRNO | EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in code)


def deny_calls() -> None:
    """Install the filter for this process, past `exec`."""
    code = syscall_filter()
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(buffer))
    call("prctl", 22, 2, ctypes.c_char_p(program), 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


EXECUTE, WRITE, READ, LIST = 1, 2, 4, 8  # the first of Landlock's rights (linux/landlock.h)
ALL_RIGHTS = (1 << 13) - 1  # those that every kernel with Landlock knows


def confine_files(folder: Path) -> None:
    """Leave the program its folder, and what Python itself reads."""
    rights = struct.pack("Q", ALL_RIGHTS)
    ruleset = LIBC.syscall(444, ctypes.c_char_p(rights), 8, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "no Landlock in this kernel (Linux 5.13 and later)")
    system = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
    python = (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix)
    for path in {*system, *python}:
        allow(ruleset, Path(path), EXECUTE | READ | LIST)
    for path in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        allow(ruleset, Path(path), READ | WRITE)
    allow(ruleset, folder, ALL_RIGHTS)
    call("syscall", 446, ruleset, 0)  # landlock_restrict_self
    os.close(ruleset)


def allow(ruleset: int, path: Path, rights: int) -> None:
    """Add a rule for a path and what lies below it; a missing path needs none."""
    if not path.exists():
        return
    if not path.is_dir():
        rights &= EXECUTE | READ | WRITE
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, descriptor)
    call("syscall", 445, ruleset, 1, ctypes.c_char_p(rule), 0)  # landlock_add_rule, PATH_BENEATH
    os.close(descriptor)


def main() -> None:
    """Give up power, then run the program as a module that is not `__main__`."""
    file = Path(sys.argv[1]).resolve()
    seconds, memory, size, protect = map(int, sys.argv[2:])
    try:
        for kind, limit in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, size),
            (resource.RLIMIT_NOFILE, 64),
            (resource.RLIMIT_CORE, 0),
        ):
            resource.setrlimit(kind, (limit, limit))
        call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
        if protect:
            confine_files(file.parent)
        deny_calls()
    except (OSError, KeyError, ValueError, AttributeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(REFUSED)
    sys.argv = [str(file)]
    runpy.run_path(str(file), run_name="sandboxed")


if __name__ == "__main__":
    main()

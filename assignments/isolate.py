"""Run a command that can reach nothing but this Python and one folder.

    python -I isolate.py FOLDER COMMAND...      (started by grade.py; Linux 5.12 or newer)

COMMAND sees a file system that holds the system's libraries, this Python with its packages, and
FOLDER as /submission, all of it read-only, and /scratch, 64 MB that vanish with it. It has no
terminal, no network, and no process but its own: one, with one thread, that ends with the process
which started it. A user needs user namespaces for that. Root does not; for root COMMAND runs as a
user of its own.
"""

import ctypes
import importlib.util
import os
import signal
import sys
from pathlib import Path

SHOWN = ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/lib", "/lib64", "/nix/store")
SHOWN += ("/etc/ld.so.cache", "/dev/null", "/dev/urandom", sys.prefix, sys.base_prefix)
FOLDER = "/submission"
SCRATCH = "/scratch"
PLACE = "/proc"  # where the new root is built: every system has this folder, and nothing needs it
# Of Linux's headers.
NEW_USER = 0x10000000
NEW_MOUNT_IPC_PID_NET = 0x00020000 | 0x08000000 | 0x20000000 | 0x40000000
READ_ONLY = 1 | 2  # and set-uid programs run as who starts them
BIND = 0x1000 | 0x4000  # with what is mounted below
PRIVATE = 0x40000 | 0x4000
DETACH = 2
MOUNT_SETATTR = 442
RECURSIVE = 0x8000
DEATH_SIGNAL = 1


def call(name: str, *arguments):
    """Call a function of the C library; OSError when it fails."""
    if getattr(ctypes.CDLL(None), name)(*arguments) < 0:
        raise OSError(name)


def mount(source, target, kind: bytes | None = None, flags=0, options: bytes | None = None):
    call("mount", os.fsencode(source), os.fsencode(target), kind, flags, options)


def stay_behind():
    """Go on as a child that ends with this process, which waits for it."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(status != 0)
    call("prctl", DEATH_SIGNAL, signal.SIGKILL)


def enter_new_root(folder: str):
    """Put what COMMAND sees, the folder as /submission, in the place of the file system."""
    mount("none", "/", None, PRIVATE)
    mount("none", PLACE, b"tmpfs", 0, b"mode=755")
    packages = Path(importlib.util.find_spec("torch").origin).parent.parent
    for path in filter(os.path.exists, (*SHOWN, str(packages))):
        shown = Path(PLACE + path)
        shown.parent.mkdir(parents=True, exist_ok=True)
        if os.path.isdir(path):
            shown.mkdir(exist_ok=True)
        else:
            shown.touch()
        mount(path, shown, None, BIND)
    for path in (FOLDER, SCRATCH, "/proc"):
        os.mkdir(PLACE + path)
    mount(folder, PLACE + FOLDER, None, BIND)
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY)
    call("syscall", MOUNT_SETATTR, 0, PLACE.encode(), RECURSIVE, attributes, 32)
    mount("none", PLACE + SCRATCH, b"tmpfs", 0, b"mode=777,size=64m")
    mount("none", PLACE + "/proc", b"proc", READ_ONLY)
    os.chdir(PLACE)
    call("pivot_root", b".", b".")
    call("umount2", b".", DETACH)
    os.chdir(FOLDER)


def main():
    import resource  # POSIX alone has it

    folder, *command = sys.argv[1:]
    user = os.getuid()
    group = os.getgid()
    nobody = 2**30 + os.getpid()  # a user who owns nothing and runs nothing else
    call("prctl", DEATH_SIGNAL, signal.SIGKILL)
    call("unshare", NEW_MOUNT_IPC_PID_NET | (NEW_USER if user else 0))
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    stay_behind()
    enter_new_root(folder)
    stay_behind()  # as process 1, with which all others end
    if user:
        call("unshare", NEW_USER)  # without rights over what was mounted
    else:
        os.setgroups([])
        os.setgid(nobody)
        os.setuid(nobody)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    os.execv(command[0], command)


if __name__ == "__main__":
    main()

"""Run as root on the host, just before bubblewrap: give up root without losing sight of the folders to be bound.

    python -I -S stage.py '{"uid": 65534, "binds": {"/usr": "/usr", ...}, "argv": ["bwrap", ...]}'

Why: limits on processes do not bind root, and a room that root built is a room whose owner is root. So bubblewrap runs
as an unprivileged user. But that user may be unable to reach a source such as a Python below `/root`. This program
therefore takes a mount namespace of its own (nothing of it is seen outside), binds each source below a fresh `/tmp`,
drops to the user, and becomes `argv`, in which `@name` stands for the staged path of the source called `name`.

An ordinary user's sandbox needs none of this. Standard library only.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

CLONE_NEWNS = 0x00020000
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
O_PATH = 0o10000000
STAGE = "/tmp"


def main() -> None:
    """Stage the binds, drop root, become the command. Any failure is an exception and a status that is not 0."""
    job = json.loads(sys.argv[1])
    libc = ctypes.CDLL(None, use_errno=True)

    def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
        if libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()):
            error = ctypes.get_errno()
            raise OSError(error, f"mount {source} on {target}: {os.strerror(error)}")

    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "root may not make a mount namespace here")
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    # Opened before /tmp is covered, since sources may lie there; opened after unshare, so that they may be bound.
    sources = {name: (os.open(path, O_PATH), os.path.isdir(path)) for name, path in job["binds"].items()}
    mount("tmpfs", STAGE, "tmpfs", 0, "mode=755,size=1m")
    for name, (fd, is_folder) in sources.items():
        target = f"{STAGE}/{name}"
        if is_folder:
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/proc/self/fd/{fd}", target, "", MS_BIND | MS_REC)
        os.close(fd)
    os.chdir("/")
    os.setgroups([])
    os.setresgid(job["uid"], job["uid"], job["uid"])
    os.setresuid(job["uid"], job["uid"], job["uid"])
    argv = [f"{STAGE}/{word[1:]}" if word.startswith("@") else word for word in job["argv"]]
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main()

"""nchan, the pub/sub module of nginx: the fan-out of many in production, in C.

From Debian's packages, unpacked into a folder that is kept; nothing is installed.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.machine import Process, free_port, process, wait_until

FOLDER = Path(__file__).parent / ".nchan"
PUBLISH, WATCH = "/publish?id=1", "/watch?id=1"
_TEMP = Path("/var/lib/nginx")
_CONF = """\
load_module {root}/usr/lib/nginx/modules/ngx_nchan_module.so;
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 20000; }}
http {{
  access_log off;
  keepalive_requests 10000000;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /publish {{
      nchan_publisher;
      nchan_channel_id $arg_id;
      nchan_message_buffer_length 10000;
    }}
    location = /watch {{
      nchan_subscriber eventsource;
      nchan_channel_id $arg_id;
      nchan_subscriber_first_message oldest;
    }}
  }}
}}
"""


@contextmanager
def nchan(cores: set[int]) -> Iterator[tuple[Process, int]]:
    """nginx and its port. Raises LookupError where Debian's packages cannot be had."""
    root = _unpacked()
    port = free_port()
    conf = FOLDER / "nginx.conf"
    conf.write_text(_CONF.format(root=root, folder=FOLDER, port=port))
    with process([str(root / "usr/sbin/nginx"), "-c", str(conf), "-e", "stderr"], cores) as running:
        wait_until(port)
        yield running, port


def _unpacked() -> Path:
    root = FOLDER / "root"
    try:
        _TEMP.mkdir(exist_ok=True)  # The path is compiled into it.
        if not root.exists():
            _unpack(root)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LookupError(f"nginx with nchan cannot be had here: {error}") from None
    return root


def _unpack(root: Path) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise LookupError("nginx with nchan is had from Debian's packages only")
    packages = FOLDER / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    for argv in (["update", "-qq"], ["download", "-qq", "nginx", "libnginx-mod-nchan"]):
        subprocess.run(["apt-get", *argv], cwd=packages, check=True, capture_output=True)
    for package in packages.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, root], check=True)

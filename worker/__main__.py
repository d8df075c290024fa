"""`python -m worker`: one worker process. `python -m worker check`: is one alive on this host?"""

import asyncio
import sys

from arq import Worker

from relay.descriptors import allow_every_descriptor
from relay.errors import ConfigurationError
from relay.heap import spare_the_collector
from relay.logs import configure_logs
from relay.settings import Settings, load_settings, warn_of_misspelt
from worker.health import is_healthy


def main() -> int:
    try:
        if sys.argv[1:] not in ([], ["check"]):
            raise ConfigurationError(
                "python -m worker takes no arguments but `check`: its settings are variables."
            )
        settings = load_settings()
        configure_logs("worker", settings.log_format)
        if sys.argv[1:] == ["check"]:
            return 0 if asyncio.run(is_healthy(settings)) else 1
        warn_of_misspelt()
        worker = _create(settings)
    except ConfigurationError as error:
        sys.stderr.write(f"relay: {error.message}\n")
        return 2
    allow_every_descriptor()
    spare_the_collector()
    worker.run()
    return 0


def _create(settings: Settings) -> Worker:
    # Imported here, for they take half a second that a health check need not wait.
    import uvloop  # noqa: PLC0415

    from worker.main import create_worker  # noqa: PLC0415

    asyncio.set_event_loop(uvloop.new_event_loop())
    return create_worker(settings)


if __name__ == "__main__":
    sys.exit(main())

"""`python -m worker`: one worker process. `python -m worker check`: is one alive on this host?"""

import asyncio
import sys

from relay.errors import ConfigurationError
from relay.logs import configure_logs
from relay.settings import load_settings, warn_of_misspelt
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
        from worker.main import run  # noqa: PLC0415 - half a second, which no check need wait for

        run(settings)
    except ConfigurationError as error:
        sys.stderr.write(f"relay: {error.message}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

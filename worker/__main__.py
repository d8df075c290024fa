"""`python -m worker`: one worker process. `python -m worker check`: is one alive on this host?"""

import asyncio
import sys

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
        import uvloop  # noqa: PLC0415 - a health check need not wait for it

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_work(settings))
    except ConfigurationError as error:
        sys.stderr.write(f"relay: {error.message}\n")
        return 2
    return 0


async def _work(settings: Settings) -> None:
    from worker.main import create_worker  # noqa: PLC0415 - nor for this, half a second

    # In the loop that runs: uvloop loses a signal for which it has a handler and does not run yet.
    worker = create_worker(settings)
    allow_every_descriptor()
    spare_the_collector()
    try:
        await worker.async_run()
    except asyncio.CancelledError:
        pass  # By a signal.
    finally:
        await worker.close()


if __name__ == "__main__":
    sys.exit(main())

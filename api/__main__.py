"""`python -m api`: one API process."""

import sys
from contextlib import suppress

from api.app import create_app
from api.server import create_server
from relay.descriptors import allow_every_descriptor
from relay.errors import ConfigurationError
from relay.heap import spare_the_collector
from relay.logs import configure_logs
from relay.settings import load_settings, warn_of_misspelt


def main() -> int:
    try:
        if sys.argv[1:]:
            raise ConfigurationError(
                "python -m api takes no arguments: set RELAY_HOST and RELAY_PORT, or use relay api."
            )
        settings = load_settings()
        configure_logs("api", settings.log_format)
        warn_of_misspelt()
        server = create_server(create_app(settings), settings)
    except ConfigurationError as error:
        sys.stderr.write(f"relay: {error.message}\n")
        return 2
    allow_every_descriptor()
    spare_the_collector()
    with suppress(KeyboardInterrupt):  # uvicorn raises it once more when it has shut down.
        server.run()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())

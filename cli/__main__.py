"""`relay`, and `python -m cli`."""

import sys


def run() -> None:
    try:
        from cli.main import app  # noqa: PLC0415 - a Ctrl-C while it loads is no fault either

        app(prog_name="relay")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    run()
